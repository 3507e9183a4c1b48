"""How the GPUs are used, as last seen: who has which share, how full and busy each GPU is, and whose processes do that.

Changing state, but nothing waits for it: it is looked at when a choice is to be made. Times are monotonic seconds and
passed in. Knows neither trio, nor gRPC, nor NVML.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter
from typing import Final

import attrs

from sgpu.device import SEPARATOR, Device
from sgpu.placement import GpuLoad
from sgpu.recent import Recent
from sgpu.report import ProcessReport
from sgpu.snapshot import ContainerUse

#: Sample intervals after which a sample is too old to choose by.
STALE_AFTER: Final = 3


@attrs.frozen(cache_hash=True)
class Holder:
    """A container that has a share, or uses a GPU without one."""

    namespace: str
    pod: str
    container: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}"


#: Whose the processes are that belong to no pod.
NOBODY: Final = Holder("", "", "")
#: What the log calls them.
NO_POD: Final = "processes of no pod"


@attrs.frozen
class Sample:
    """A GPU at one moment: bytes of memory, percent of time that it was busy, and the processes that use it.

    None: the driver does not tell.
    """

    memory_total: int | None
    memory_free: int | None
    utilisation: int | None
    processes: tuple[ProcessReport, ...] | None = None


class Usage:
    """What is known. `holders` is None as long as the kubelet does not tell."""

    def __init__(self, interval: float) -> None:
        self.holders: Mapping[str, Holder] | None = None
        self.samples: Mapping[str, Sample] = {}
        self.recent = Recent()
        #: Whether the driver's processes can be told apart by container.
        self.processes_known = False
        #: Why they can't, where there are any; empty where they can, or nobody has looked yet.
        self.processes_trouble = ""
        self._shares: Mapping[str, Counter[Holder]] = {}  # how many are held, by UUID; as long as `holders` is
        self._processes: Mapping[str, Mapping[Holder, list[ProcessReport]]] = {}  # of the GPUs that tell theirs
        #: When the last samples were taken.
        self.sampled_at = float("-inf")
        self._interval = interval
        self._uses: dict[str, tuple[ContainerUse, ...]] = {}  # as long as neither shares nor processes are others

    def sampled(self, samples: Mapping[str, Sample], now: float) -> None:
        """New samples, by UUID."""
        self.samples, self.sampled_at = samples, now

    def fresh(self, now: float) -> Mapping[str, Sample]:
        """The samples, unless they are too old to go by."""
        return {} if now - self.sampled_at > STALE_AFTER * self._interval else self.samples

    def held(self, holders: Mapping[str, Holder] | None) -> None:
        """The kubelet told who has which share, or no longer does (None)."""
        self.holders = holders
        self._uses = {}
        self._shares = shares = defaultdict[str, Counter[Holder]](Counter)
        for share_id, holder in (holders or {}).items():
            shares[_uuid(share_id)][holder] += 1
        if holders is not None:
            self.recent.seen(holders.keys())

    def owned(
        self, samples: Mapping[str, Sample], owners: Mapping[int, Holder | None] | None, trouble: str = ""
    ) -> None:
        """Whose the processes of these samples are, or that it can't be told (None) and why.

        None for a process: no pod's. One that is not in `owners` has ended.
        """
        self.processes_known = owners is not None
        self.processes_trouble = trouble
        self._uses = {}
        self._processes = {
            uuid: _by_owner(sample.processes, owners)
            for uuid, sample in samples.items()
            if owners is not None and sample.processes is not None
        }

    def allocated(self, now: float) -> frozenset[str] | None:
        """The ids of all shares that a container has or was given moments ago; None if that is not known."""
        return None if self.holders is None else frozenset(self.holders) | self.recent.share_ids(now)

    def loads(self, devices: Iterable[Device], now: float) -> Mapping[str, GpuLoad]:
        """What a choice among these GPUs goes by."""
        holders = self.holders
        # Only the few that were just given are counted here: those held can be thousands, and a kubelet waits.
        given = Counter(_uuid(share_id) for share_id in self.recent.share_ids(now) if share_id not in (holders or ()))
        expected = self.recent.expected_bytes(now)
        samples = self.fresh(now)
        loads = {}
        for device in devices:
            sample = samples.get(device.uuid)
            free = sample.memory_free if sample else None
            held = sum(self._shares.get(device.uuid, Counter()).values())
            loads[device.uuid] = GpuLoad(
                allocated=None if holders is None else held + given[device.uuid],
                shares=device.shares,
                free_memory=None if free is None else max(free - expected.get(device.uuid, 0), 0),
                utilisation=sample.utilisation if sample else None,
            )
        return loads

    def uses(self, uuid: str) -> tuple[ContainerUse, ...]:
        """What each container has and takes of this GPU, in order; last time's, as long as nothing newer is known."""
        if uuid in self._uses:  # asked for by metrics, `status` and the log
            return self._uses[uuid]
        shares: Mapping[Holder, int] = self._shares.get(uuid, Counter())
        processes = self._processes.get(uuid)
        containers = sorted({*shares, *(processes or ())}, key=attrgetter("namespace", "pod", "container"))
        self._uses[uuid] = tuple(
            _use(container, shares.get(container, 0), None if processes is None else processes.get(container, []))
            for container in containers
        )
        return self._uses[uuid]

    def pods(self, uuid: str) -> Mapping[str, int | None]:
        """Bytes of this GPU's memory by pod (namespace/name) that has a share of it or uses it, most first.

        None: not known. Those of no pod are under an empty name.
        """
        memory: dict[str, list[int | None]] = defaultdict(list)
        for use in self.uses(uuid):
            memory[f"{use.namespace}/{use.pod}" if use.pod else ""].append(use.memory_used)
        pods = [(_sum(known), pod) for pod, known in memory.items()]
        return {pod: used for used, pod in sorted(pods, key=lambda pair: (-(pair[0] or 0), pair[1]))}


def _by_owner(
    processes: Iterable[ProcessReport], owners: Mapping[int, Holder | None]
) -> Mapping[Holder, list[ProcessReport]]:
    found = defaultdict(list)
    for process in processes:
        if process.pid in owners:
            found[owners[process.pid] or NOBODY].append(process)
    return found


def _use(container: Holder, shares: int, processes: Collection[ProcessReport] | None) -> ContainerUse:
    memory = utilisation = None
    if processes is not None:
        memory = _sum(process.memory for process in processes)
        utilisation = _sum(process.utilisation for process in processes)
    return ContainerUse(
        namespace=container.namespace,
        pod=container.pod,
        container=container.container,
        shares=shares,
        memory_used=memory,
        utilisation=None if utilisation is None else min(utilisation, 100),  # each is rounded by itself
        processes=len(processes or ()),
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    """None where one of them is not known: a part would be taken for all."""
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def _uuid(share_id: str) -> str:
    return share_id.rpartition(SEPARATOR)[0]
