"""The loop that looks at how the GPUs are used, and withholds the free shares of those whose memory is full.

Knows neither NVML nor what a session is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio

from sgpu import pressure
from sgpu.catalog import Catalog
from sgpu.inventory import Inventory
from sgpu.logs import OnChange
from sgpu.podresources import TIMEOUT, PodResourcesError, list_holders
from sgpu.pressure import MemorySample
from sgpu.usage import Sample, Usage

logger = logging.getLogger(__name__)

GIB: Final = 1 << 30
#: Failures in a row after which it counts as not known who has which share.
TOLERATED: Final = 3


@attrs.frozen
class Sampling:
    """What is looked at, and how often (seconds). `watermark`: the part of a GPU's memory; 0: never withhold."""

    socket: Path
    interval: float
    watermark: float


async def sample(
    sampling: Sampling, catalog: Catalog, usage: Usage, expect: Callable[[float], None] = lambda seconds: None
) -> NoReturn:
    """For ever: ask the kubelet who has which share, keep those known, and withhold what should not be given away.

    `expect` is told, each time, within how many seconds it is told again.
    """
    trouble = OnChange(logger, logging.WARNING)
    pressed: frozenset[str] = frozenset()
    failures = 0
    while True:
        try:
            # Each resource by itself: a share's id does not say as which of them it was given away.
            resources = dict.fromkeys((*catalog.policy.resources(), *catalog.inventories))
            expect(TIMEOUT * len(resources) + sampling.interval)
            held = {resource: await list_holders(sampling.socket, (resource,)) for resource in resources}
            usage.held({share_id: holder for holders in held.values() for share_id, holder in holders.items()})
            catalog.keep({resource: frozenset(holders) for resource, holders in held.items()})
            trouble.clear()
            failures = 0
        except PodResourcesError as error:
            failures += 1
            if usage.holders is not None and failures < TOLERATED:
                await trio.sleep(sampling.interval)  # a kubelet that restarts; what it said last holds a while longer
                continue
            usage.held(None)
            trouble.report(f"which shares are in use is not known, so that none is withheld: {error}")
        pressed = withhold(sampling.watermark, catalog.inventories.values(), usage, pressed, trio.current_time())
        await trio.sleep(sampling.interval)


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
            pods = ", ".join(usage.pods(uuid)) or "no pod that has a share of it"
            words = f"{full.used / GIB:.1f} of {full.total / GIB:.1f} GiB are used, by {pods}"
            logger.warning("GPU %s: its memory is full: %s; its free shares are withheld", uuid, words)
    for uuid in sorted(before - pressed):
        logger.warning("GPU %s: its free shares are no longer withheld", uuid)
    return pressed


def _memory(sample: Sample) -> MemorySample | None:
    if sample.memory_total is None or sample.memory_free is None:
        return None
    return MemorySample(used=sample.memory_total - sample.memory_free, total=sample.memory_total)
