"""The loop that looks at containers: which have shares, which use how much of a GPU, and whether a GPU is too full.

Knows neither NVML nor what a session is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio

from sgpu.lib.logs import OnChange
from sgpu.lib.sizes import GIB, part_of
from sgpu.node.container import NO_POD
from sgpu.node.figures import Figures
from sgpu.node.gpu import Gpu
from sgpu.node.guard import Sample
from sgpu.node.state import NodeState
from sgpu.node.usage import Usage
from sgpu.pods import processes
from sgpu.pods.holders import TIMEOUT, PodResourcesError, list_holders
from sgpu.pods.stale import ADVICE, stale_answers
from sgpu.pods.unlisted import Holders, Unlisted, merge

logger = logging.getLogger(__name__)

#: Failures in a row after which the kubelet's last list no longer counts.
TOLERATED: Final = 3


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
    """List holders, attribute processes and withhold the free shares of full GPUs, each interval.

    `expect` is called each time with the seconds until it is called again at the latest, and `look` with the attributed
    processes; None where they or the holders are unknown.
    """
    problem = OnChange(logger, logging.WARNING)
    attribution = _Attribution(options.places, node.usage)
    checkpoint = _Checkpoint(options)
    resources: tuple[str, ...] = ()
    failures = 0
    while True:
        try:
            expect(TIMEOUT + options.interval)
            # By resource: a share's id does not say under which of them it was handed out. Those of before still count.
            resources = tuple(dict.fromkeys((*node.policy.resources(), *resources)))
            holders = await checkpoint.add(await list_holders(options.socket, resources))
            node.set_holders(holders)
            checkpoint.report_stale(holders, node.gpus)
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
        await trio.sleep(options.interval)


class _Checkpoint:
    """Adds the holders that only the kubelet's checkpoint has, and reports stored answers that are no longer right."""

    def __init__(self, options: WatchOptions) -> None:
        self._unlisted = Unlisted(options.plugin_directory, options.places)
        self._found = OnChange(logger, logging.INFO)
        self._problem = OnChange(logger, logging.WARNING)
        self._stale = OnChange(logger, logging.WARNING)

    async def add(self, listed: Holders) -> Holders:
        """Return these holders and those that the kubelet does not list."""
        found: Holders = {}
        try:
            if self._unlisted.may_find(listed):
                found = await trio.to_thread.run_sync(self._unlisted.find, listed, abandon_on_cancel=True)
        except (OSError, ValueError) as error:
            self._problem.report(
                f"cannot read the kubelet's checkpoint: {error}; shares that init containers have may be withheld"
            )
            return listed
        self._problem.clear()
        pods = ", ".join(sorted({str(container) for each in found.values() for container in each.values()}))
        self._found.update(f"the kubelet does not list the shares of init containers: {pods}" if pods else "")
        return merge(listed, found)

    def report_stale(self, holders: Holders, gpus: Iterable[Gpu]) -> None:
        """Log the pods to which the kubelet would give other GPUs than those of their shares."""
        stale = stale_answers(self._unlisted.checkpoint, holders, gpus)
        pods = ", ".join(map(str, stale))
        self._stale.update(
            f"GPUs have other device nodes than in the kubelet's stored answers: containers that start again get the "
            f"wrong GPU in {pods}; {ADVICE}"
            if stale
            else ""
        )


class _Attribution:
    """Attributes the processes that the driver listed last to containers, and logs why where it can't."""

    def __init__(self, places: processes.Places, usage: Usage) -> None:
        self._places = places
        self._usage = usage
        self._problem = OnChange(logger, logging.WARNING)
        self._unknown = OnChange(logger, logging.WARNING)
        self._mps: frozenset[str] = frozenset()  # GPUs with an MPS server

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
            # A disk that hangs must not keep the daemon from stopping.
            owners = await trio.to_thread.run_sync(
                processes.find_owners, self._places, pids, now - sampled_at, abandon_on_cancel=True
            )
        except processes.UnattributableError as error:
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
            logger.info("GPU %s: an MPS server uses it; what is unknown of its clients is shown as the server's", uuid)
        self._mps = mps
        return Sample(sampled_at, fresh, owners)


def withhold(watermark: float, node: NodeState) -> None:
    """Withhold the free shares of full GPUs, and log which and who uses them."""
    before, now = node.update_pressure(watermark)
    for uuid in sorted(now - before):
        users = _users(node.usage.pods(uuid)) or "no pod that has a share of it"
        used = _used(node.usage.figures[uuid])
        logger.warning("GPU %s: memory is full, %s used by %s; its free shares are withheld", uuid, used, users)
    for uuid in sorted(before - now):
        logger.warning("GPU %s: its free shares are no longer withheld", uuid)


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
