"""The loop that looks at containers: which have shares, which use how much of a GPU, and whether a GPU is too full.

Knows neither NVML nor what a session is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio

from sgpu.lib.concurrency import next_beat, race
from sgpu.lib.logs import OnChange, few
from sgpu.lib.sizes import GIB, part_of
from sgpu.lib.threads import run_in_thread
from sgpu.node.container import NO_POD, OtherUse, Owners, StaleAnswer
from sgpu.node.figures import Figures
from sgpu.node.gpu import label
from sgpu.node.guard import Sample
from sgpu.node.notices import Notice, Reason
from sgpu.node.state import NodeState
from sgpu.node.usage import Usage
from sgpu.pods import processes
from sgpu.pods.held import other_uses
from sgpu.pods.holders import TIMEOUT, Lister, PodResourcesError, open_lister
from sgpu.pods.recorded import Recorded

logger = logging.getLogger(__name__)

#: Failures in a row after which the kubelet's last list no longer counts.
TOLERATED: Final = 3
#: Of no processes.
NO_OWNERS: Final = Owners({}, frozenset(), frozenset(), {})
#: Seconds between two looks, however often the kubelet gives out devices meanwhile.
SHORTEST_PAUSE: Final = 1.0


@attrs.frozen
class WatchOptions:
    """Places to look, and the seconds between looks. `watermark`: part of a GPU's memory; 0: never withhold."""

    socket: Path
    interval: float
    watermark: float
    places: processes.Places
    plugin_directory: Path


async def watch_pods(
    options: WatchOptions,
    node: NodeState,
    expect: Callable[[float], None] = lambda seconds: None,
    look: Callable[[Sample | None], None] = lambda sample: None,
) -> NoReturn:
    """List holders, attribute processes and withhold the free shares of full GPUs, each interval and at each Allocate.

    `expect` is called each time with the seconds until it is called again at the latest, and `look` with the attributed
    processes; None where they or the holders are unknown.
    """
    recorded = Recorded(options.plugin_directory, options.places)
    async with open_lister(options.socket) as lister, trio.open_nursery() as nursery:
        nursery.start_soon(recorded.watch)
        await _look_again_and_again(options, node, lister, recorded, expect, look)


async def _look_again_and_again(
    options: WatchOptions,
    node: NodeState,
    lister: Lister,
    recorded: Recorded,
    expect: Callable[[float], None],
    look: Callable[[Sample | None], None],
) -> NoReturn:
    problem = OnChange(logger, logging.WARNING)
    attribution = _Attribution(options.places, node.usage)
    others = _OtherPlugins()
    resources: tuple[str, ...] = ()
    failures = 0
    while True:
        changes = (recorded.changed.next, node.pods_appeared.next)
        try:
            expect(TIMEOUT + options.interval)
            # By resource: a share's id does not say under which of them it was handed out. Those of before still count.
            resources = tuple(dict.fromkeys((*node.resources(), *resources)))
            held = await recorded.add(await lister.list_holders(resources, node.claims.values()))
            node.set_holders(held.shares)
            node.set_claimants(held.claimants)
            stale, node.usage.stale_answers = node.usage.stale_answers, recorded.stale(held, node.gpus)
            for answer in sorted(set(node.usage.stale_answers or ()).difference(stale or ())):
                node.notices.add(_stale(answer))
            node.usage.others = other_uses(held.others, node.gpus)
            others.report(node.usage.others)
            problem.clear()
            failures = 0
        except PodResourcesError as error:
            failures += 1
            if node.usage.holders is None or failures >= TOLERATED:
                node.set_holders(None)
                problem.report(f"cannot list allocated shares: {error}; withholding is disabled")
        sample = await attribution.update()
        look(None if failures else sample)
        if node.usage.holders is None or not failures:  # else a kubelet restarts; its last list counts a while longer
            withhold(options.watermark, node)
        # A kubelet that restarts is given its time, whatever it writes meanwhile.
        await _wait((trio.Event(),) if failures else changes, options.interval)


async def _wait(changes: Iterable[trio.Event], interval: float) -> None:
    """Wait until the next look is due, or until what containers have may have changed."""
    earliest = trio.current_time() + min(SHORTEST_PAUSE, interval)
    with trio.move_on_at(max(earliest, next_beat(interval))):
        await race(*(change.wait for change in changes))
        await trio.sleep_until(earliest)


class _OtherPlugins:
    """Logs which GPUs another plugin gave out: once for each GPU and resource, with the pods that have it then."""

    def __init__(self) -> None:
        self._known: frozenset[tuple[str, str]] = frozenset()

    def report(self, uses: Mapping[str, Collection[OtherUse]]) -> None:
        pods: dict[tuple[str, str], list[str]] = {}
        for uuid, each in uses.items():
            for use in each:
                pods.setdefault((uuid, use.resource), []).append(str(use.container))
        for (uuid, resource), names in sorted(pods.items()):
            if (uuid, resource) not in self._known:
                message = "%s: also given out as %s, not by this daemon, to %s; placement counts that"
                logger.warning(message, label(uuid), resource, few(names))
        self._known = frozenset(pods)


class _Attribution:
    """Attributes the processes that the driver listed last to containers, and logs why where it can't."""

    def __init__(self, places: processes.Places, usage: Usage) -> None:
        self._places = places
        self._usage = usage
        self._problem = OnChange(logger, logging.WARNING)
        self._unknown = OnChange(logger, logging.WARNING)
        self._mps: frozenset[str] = frozenset()  # GPUs with an MPS server
        self._works = False  # the last look found where to look

    async def update(self) -> Sample | None:
        """Attribute them once. What is read is the kernel's and a directory of the node: it does not take long.

        Returns None where they are unknown.
        """
        now, sampled_at = trio.current_time(), self._usage.sampled_at
        fresh = self._usage.fresh(now)
        listed = {uuid: known.processes for uuid, known in fresh.items() if known.processes is not None}
        if not listed:  # by no driver, or none that can
            self._usage.set_owners({}, None)
            return None
        pids = {process.pid for each in listed.values() for process in each}
        try:
            # A disk that hangs must not keep the daemon from stopping. No thread for no processes.
            owners = NO_OWNERS
            if pids or not self._works:
                owners = await run_in_thread(
                    processes.find_owners, self._places, pids, now - sampled_at, abandon_on_cancel=True
                )
            self._works = True
        except processes.UnattributableError as error:
            self._works = False
            self._usage.set_owners({}, None, str(error))
            self._problem.report(f"cannot attribute GPU memory to pods: {error}")
            return None
        self._problem.clear()
        self._usage.set_owners(fresh, owners.containers, unknown=owners.unknown)
        if owners.unknown:
            self._unknown.report(
                f"cannot attribute {len(owners.unknown)} process(es) of pods to containers, as they run in a pause "
                f"container or a sandbox: what the pods on their GPUs use is unknown"
            )
        else:
            self._unknown.clear()
        mps = frozenset(uuid for uuid, each in listed.items() if any(process.pid in owners.mps for process in each))
        for uuid in sorted(mps - self._mps):
            logger.info(
                "%s: an MPS server uses it; what is unknown of its clients is shown as the server's", label(uuid)
            )
        self._mps = mps
        return Sample(sampled_at, fresh, owners)


def withhold(watermark: float, node: NodeState) -> None:
    """Withhold the free shares of full GPUs, and log which and who uses them."""
    before, now = node.update_pressure(watermark)
    for uuid in sorted(now - before):
        users = _users(node.usage.pods(uuid)) or "no pod that has a share of it"
        used = _used(node.usage.figures[uuid])
        logger.warning("%s: memory is full, %s used by %s; its free shares are withheld", label(uuid), used, users)
        node.notices.add(_full(uuid, used, node.usage.pods(uuid)))
    for uuid in sorted(before - now):
        logger.warning("%s: its free shares are no longer withheld", label(uuid))


def _full(uuid: str, used: str, pods: Mapping[str, int | None]) -> Notice:
    """Return the notice for the pod that uses most, if it is known: only its own user may know how much that is."""
    pod, most = max(
        ((pod, memory or 0) for pod, memory in pods.items() if pod), key=lambda each: each[1], default=("", 0)
    )
    message = f"{label(uuid)}: memory is full, {used} used"
    if most:
        message += f", {most / GIB:.1f} GiB of it by this pod"
    message += "; programs that need more will fail, and no new pods get shares of it"
    return Notice(Reason.MEMORY_FULL, uuid, message, pod if most else "")


def _stale(answer: StaleAnswer) -> Notice:
    message = (
        f"a container that starts again gets {', '.join(answer.stored)} instead of {', '.join(answer.right)}, because "
        "the kubelet has stored the GPU's device node of before a reboot; delete the pod: a new one gets the right GPU"
    )
    return Notice(Reason.ANSWER_STALE, "", message, answer.pod)


def _users(pods: Mapping[str, int | None]) -> str:
    """Name those that use a GPU, as far as it is known. Those that use nothing are named only if no others do."""
    users = {pod: used for pod, used in pods.items() if used != 0} or dict.fromkeys(pods)
    return ", ".join(
        (pod or NO_POD) + ("" if used is None else f" ({used / GIB:.1f} GiB)") for pod, used in users.items()
    )


def _used(figures: Figures) -> str:
    """Say how much memory is used; for figures that are known."""
    total, free = figures.memory_total or 0, figures.memory_free or 0
    return part_of(total - free, total)
