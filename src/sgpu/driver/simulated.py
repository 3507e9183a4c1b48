"""Simulated GPUs: the node gets them as it gets real ones, for clusters, tests and demonstrations without a driver."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs
import trio

from sgpu.lib.files import read_regular_file
from sgpu.lib.threads import run_in_thread
from sgpu.node.gpu import Gpu, Health
from sgpu.node.state import NodeState

logger = logging.getLogger(__name__)

#: Seconds between looks at the file of faults.
INTERVAL: Final = 0.2
#: Any fixed value does; it makes the UUIDs of simulated GPUs the same at every start and unlike any card's.
_NAMESPACE: Final = uuid.UUID("5f0c1b7e-7d5a-4c5e-9a55-5b8c1d0e6a01")
#: Digits. More is no number of a GPU.
_NUMBER_LENGTH: Final = 9
#: Bytes each pretends to have: a Tesla T4's.
_MEMORY: Final = 16 * 1024**3


def simulated_gpus(count: int, now: float = 0.0) -> tuple[Gpu, ...]:
    """Return `count` simulated GPUs, healthy from now on."""
    return tuple(
        Gpu(
            uuid=f"GPU-{uuid.uuid5(_NAMESPACE, str(index))}",
            name=f"simulated GPU {index}",
            pci_bus_id=f"00000000:{index:02X}:00.0",
            device_nodes=(),
            memory_bytes=_MEMORY,
            memory_total=_MEMORY,
            since=now,
            simulated=True,
        )
        for index in range(count)
    )


async def simulate(node: NodeState, count: int, faults_file: str) -> None:
    """Give the node simulated GPUs, faulty for as long as the file of faults says so (empty: there is none)."""
    gpus = simulated_gpus(count, time.time())
    node.set_gpus(gpus)
    while faults_file:
        before, faults = gpus, await run_in_thread(read_faults, Path(faults_file))
        gpus = with_faults(gpus, faults, time.time())
        node.set_gpus(gpus)
        for old, gpu in zip(before, gpus, strict=True):
            if gpu.health is not old.health:
                logger.warning("GPU %s is %s", gpu.uuid, f"unhealthy: {gpu.reason}" if gpu.reason else "healthy again")
        await trio.sleep(INTERVAL)


def read_faults(path: Path) -> Mapping[int, str]:
    """Return the faulty GPUs of a file and why: one to a line, its number and optionally a reason.

    No faults if the file is not there or can't be read.
    """
    try:
        lines = read_regular_file(path).decode("utf-8", "replace").splitlines()
    except OSError:  # not there, or half way of being replaced
        return {}
    faults = {}
    for line in lines:
        number, *reason = line.split(maxsplit=1) or [""]
        if number.isdecimal() and len(number) <= _NUMBER_LENGTH:
            faults[int(number)] = "".join(reason).strip() or "simulated fault"
    return faults


def with_faults(gpus: tuple[Gpu, ...], faults: Mapping[int, str], now: float) -> tuple[Gpu, ...]:
    """Return the same GPUs, those in `faults` unhealthy with that reason, and no others; changed ones since now."""
    return tuple(_with_reason(gpu, faults.get(index, ""), now) for index, gpu in enumerate(gpus))


def _with_reason(gpu: Gpu, reason: str, now: float) -> Gpu:
    health = Health.UNHEALTHY if reason else Health.HEALTHY
    since = gpu.since if gpu.health is health else now
    return attrs.evolve(gpu, health=health, reason=reason, since=since)
