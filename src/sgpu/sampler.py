"""The loop that looks at how the GPUs are used, and by whom; it withholds the free shares of those that are full.

Knows neither NVML nor what a session is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio

from sgpu import pressure, processes
from sgpu.catalog import Catalog
from sgpu.inventory import Inventory
from sgpu.logs import OnChange
from sgpu.podresources import TIMEOUT, PodResourcesError, list_holders
from sgpu.pressure import MemorySample
from sgpu.units import GIB, part_of
from sgpu.usage import NO_POD, Sample, Usage

logger = logging.getLogger(__name__)

#: Failures in a row after which it counts as not known who has which share.
TOLERATED: Final = 3


@attrs.frozen
class Sampling:
    """What is looked at, and how often (seconds). `watermark`: the part of a GPU's memory; 0: never withhold.

    `places`: where it is found out whose a process is.
    """

    socket: Path
    interval: float
    watermark: float
    places: processes.Places


async def sample(
    sampling: Sampling, catalog: Catalog, usage: Usage, expect: Callable[[float], None] = lambda seconds: None
) -> NoReturn:
    """For ever: ask the kubelet who has which share, keep those known, and withhold what should not be given away.

    `expect` is told, each time, within how many seconds it is told again.
    """
    trouble = OnChange(logger, logging.WARNING)
    attribution = _Attribution(sampling.places, usage)
    pressed: frozenset[str] = frozenset()
    failures = 0
    while True:
        try:
            expect(TIMEOUT + sampling.interval)
            # By resource: a share's id does not say as which of them it was given away.
            resources = tuple(dict.fromkeys((*catalog.policy.resources(), *catalog.inventories)))
            held = await list_holders(sampling.socket, resources)
            usage.held({share_id: holder for holders in held.values() for share_id, holder in holders.items()})
            catalog.keep({resource: frozenset(holders) for resource, holders in held.items()})
            trouble.clear()
            failures = 0
        except PodResourcesError as error:
            failures += 1
            if usage.holders is None or failures >= TOLERATED:
                usage.held(None)
                trouble.report(f"which shares are in use is not known, so that none is withheld: {error}")
        await attribution.update()
        if usage.holders is None or not failures:  # else a kubelet restarts; what it said last holds a while longer
            pressed = withhold(sampling.watermark, catalog.inventories.values(), usage, pressed, trio.current_time())
        await trio.sleep(sampling.interval)


class _Attribution:
    """Finds out whose the processes are that the driver told of last, and says where that can't be told."""

    def __init__(self, places: processes.Places, usage: Usage) -> None:
        self._places = places
        self._usage = usage
        self._trouble = OnChange(logger, logging.WARNING)
        self._mps: frozenset[str] = frozenset()  # GPUs with a server of it

    async def update(self) -> None:
        """Once. What is read is the kernel's and a directory of the node, so that it does not take long."""
        now = trio.current_time()
        samples = self._usage.fresh(now)
        told = {uuid: sample.processes for uuid, sample in samples.items() if sample.processes is not None}
        if not told:  # by no driver, or none that knows
            self._usage.owned({}, None)
            return
        pids = {process.pid for each in told.values() for process in each}
        try:
            # A disk that hangs must not keep the daemon from stopping.
            owners = await trio.to_thread.run_sync(
                processes.find_owners, self._places, pids, now - self._usage.sampled_at, abandon_on_cancel=True
            )
        except processes.NotToldError as error:
            self._usage.owned({}, None, str(error))
            self._trouble.report(f"which pod uses how much of a GPU is not known: {error}")
            return
        self._trouble.clear()
        self._usage.owned(samples, owners.containers)
        mps = frozenset(uuid for uuid, each in told.items() if any(process.pid in owners.mps for process in each))
        for uuid in sorted(mps - self._mps):
            logger.info(
                "GPU %s: an MPS server uses it; what is not known of its clients is shown as the server's", uuid
            )
        self._mps = mps


def withhold(
    watermark: float, inventories: Iterable[Inventory], usage: Usage, before: frozenset[str], now: float
) -> frozenset[str]:
    """List the free shares of the GPUs under pressure as unhealthy, and no others. Returns those GPUs' UUIDs."""
    allocated = usage.allocated(now)
    samples = {uuid: _memory(known) for uuid, known in usage.samples.items()}
    # A share that is in use must never be withheld: as long as it is not known which are, none is.
    pressed = frozenset() if allocated is None else pressure.under_pressure(samples, before, watermark)
    for inventory in inventories:
        inventory.withhold(pressure.withheld(inventory.devices, allocated or frozenset(), pressed))
    for uuid in sorted(pressed - before):
        if full := samples[uuid]:
            pods = _words(usage.pods(uuid)) or "no pod that has a share of it"
            words = f"{part_of(full.used, full.total)} are used, by {pods}"
            logger.warning("GPU %s: its memory is full: %s; its free shares are withheld", uuid, words)
    for uuid in sorted(before - pressed):
        logger.warning("GPU %s: its free shares are no longer withheld", uuid)
    return pressed


def _words(pods: Mapping[str, int | None]) -> str:
    """Who uses a GPU, as far as it is known. Those that use nothing are named only where nobody is known to use it."""
    users = {pod: used for pod, used in pods.items() if used != 0} or dict.fromkeys(pods)
    return ", ".join(
        (pod or NO_POD) + ("" if used is None else f" ({used / GIB:.1f} GiB)") for pod, used in users.items()
    )


def _memory(sample: Sample) -> MemorySample | None:
    if sample.memory_total is None or sample.memory_free is None:
        return None
    return MemorySample(used=sample.memory_total - sample.memory_free, total=sample.memory_total)
