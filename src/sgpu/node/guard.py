"""Which containers use more of a GPU's memory than they may, and which of their processes is to be ended.

Pure: samples of the driver in, choices out. What is unknown decides nothing. Knows neither signals nor /proc nor trio.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import attrs

from sgpu.node.container import Container, Owners, Process
from sgpu.node.figures import Figures, ProcessUse

#: Samples in a row in which a container must use too much. While it loads a model, it may need more for a moment.
SAMPLES: Final = 3


@attrs.frozen
class GuardPolicy:
    """When the guard acts.

    `threshold`: the part of a GPU's memory that must be in use. A container may use, on top of its part of the memory,
    `tolerance_part` of that and `tolerance_bytes`. `exempt` are namespaces.
    """

    threshold: float
    tolerance_part: float
    tolerance_bytes: int
    exempt: frozenset[str]

    def tolerance(self, allowed: int) -> int:
        """Return the bytes that a container may use on top of those."""
        return int(allowed * self.tolerance_part) + self.tolerance_bytes


@attrs.frozen
class Sample:
    """One sample of the driver: when it was taken (monotonic seconds), the figures by UUID, and whose processes."""

    time: float
    figures: Mapping[str, Figures]
    owners: Owners


@attrs.frozen
class OverUse:
    """A container that uses more of a GPU's memory than it may; all in bytes.

    `process` is its largest on that GPU. `mps`: an MPS server uses the GPU, whose clients an end could take along.
    """

    uuid: str
    container: Container
    used: int
    allowed: int
    tolerance: int
    gpu_used: int
    gpu_total: int
    process: Process
    process_memory: int
    mps: bool


@attrs.frozen
class _Streak:
    samples: int
    use: OverUse


class OverUsers:
    """The containers that use too much, sample after sample, and the choice of which is ended."""

    def __init__(self, policy: GuardPolicy) -> None:
        self._policy = policy
        self._streaks: Mapping[str, Mapping[Container, _Streak]] = {}  # by UUID
        self._sampled_at = float("-inf")
        self._ending: dict[str, Process] = {}
        self._ended_at: dict[str, float] = {}
        self._samples: Counter[str] = Counter()  # since then
        self._given_up: frozenset[Process] = frozenset()

    def take(self, sample: Sample | None, allowed: Mapping[str, Mapping[Container, int]]) -> list[OverUse]:
        """Take a sample, and return the containers that are over-users since this one. None: all is unknown.

        `allowed` has the bytes that each container may use, by UUID.
        """
        if sample is None:
            self._streaks = {}
            return []
        if sample.time <= self._sampled_at:  # it was taken before
            return []
        before, streaks = self._streaks, {}
        for uuid, figures in sample.figures.items():
            uses = over_uses(uuid, figures, sample.owners, allowed.get(uuid, {}), self._policy)
            counts = {container: streak.samples for container, streak in before.get(uuid, {}).items()}
            streaks[uuid] = {use.container: _Streak(counts.get(use.container, 0) + 1, use) for use in uses}
            self._samples[uuid] += sample.time > self._ended_at.get(uuid, float("-inf"))
        self._streaks, self._sampled_at = streaks, sample.time
        self._given_up &= frozenset(sample.owners.processes.values())
        return [streak.use for each in streaks.values() for streak in each.values() if streak.samples == SAMPLES]

    def named(self) -> Mapping[str, list[OverUse]]:
        """Return the over-users of each GPU: those that used too much in the last samples."""
        return {
            uuid: [streak.use for streak in each.values() if streak.samples >= SAMPLES]
            for uuid, each in self._streaks.items()
        }

    def last(self, uuid: str, container: Container) -> OverUse | None:
        """Return what a container used of a GPU in the last sample; None unless that was too much."""
        streak = self._streaks.get(uuid, {}).get(container)
        return streak.use if streak else None

    def choose(self) -> list[OverUse]:
        """Return the over-users to end: of each GPU the one that is most bytes over its part. Report each as `done`.

        None on a GPU where one is being ended, or was less than three samples ago.
        """
        chosen = []
        for uuid, uses in self.named().items():
            victims = [use for use in uses if not use.mps and use.process not in self._given_up]
            victim = max(victims, key=lambda use: use.used - use.allowed, default=None)
            if not victim or uuid in self._ending or self._samples[uuid] < SAMPLES:
                continue
            if victim.process not in self._ending.values():  # it can use several GPUs
                self._ending[uuid] = victim.process
                chosen.append(victim)
        return chosen

    def done(self, use: OverUse, now: float, *, give_up: bool) -> None:
        """Record that nothing more is done about one that was chosen. `give_up`: never choose the process again."""
        del self._ending[use.uuid]
        self._ended_at[use.uuid] = now
        self._samples[use.uuid] = 0
        if give_up:
            self._given_up |= {use.process}


def over_uses(
    uuid: str, figures: Figures, owners: Owners, allowed: Mapping[Container, int], policy: GuardPolicy
) -> Iterator[OverUse]:
    """Yield the containers that use more of a GPU than they may, if it is full and all of that is known."""
    total, used = figures.memory_total, figures.memory_used
    pids = {process.pid for process in figures.processes or ()}
    if not total or used is None or used <= total * policy.threshold or pids & owners.unknown:
        return
    for container, memory in _known_memory(figures.processes or (), owners).items():
        if container not in allowed or container.namespace in policy.exempt:
            continue
        tolerance = policy.tolerance(allowed[container])
        if sum(memory.values()) > allowed[container] + tolerance:
            largest = max(memory, key=lambda pid: memory[pid])
            yield OverUse(
                uuid=uuid,
                container=container,
                used=sum(memory.values()),
                allowed=allowed[container],
                tolerance=tolerance,
                gpu_used=used,
                gpu_total=total,
                process=owners.processes[largest],
                process_memory=memory[largest],
                mps=bool(pids & owners.mps),
            )


def _known_memory(processes: Iterable[ProcessUse], owners: Owners) -> Mapping[Container, Mapping[int, int]]:
    """Return bytes by process id, of each container whose use is known and its own: an MPS server's may be others'."""
    memory: defaultdict[Container, dict[int, int]] = defaultdict(dict)
    unknown = set()
    for process in processes:
        container = owners.containers.get(process.pid)
        if container is None:
            continue
        if process.memory is None or process.pid in owners.mps:
            unknown.add(container)
        else:
            memory[container][process.pid] = process.memory
    return {container: known for container, known in memory.items() if container not in unknown}
