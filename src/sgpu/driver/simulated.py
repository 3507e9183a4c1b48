"""Simulated GPUs: the node gets them as it gets real ones, for clusters, tests and demonstrations without a driver."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import trio

from sgpu.lib.files import read_regular_file
from sgpu.lib.sizes import GIB
from sgpu.lib.threads import run_in_thread
from sgpu.node.gpu import MIG_PREFIX, Gpu, Health, MigInstance, label
from sgpu.node.state import NodeState

logger = logging.getLogger(__name__)

#: Seconds between looks at the file of faults.
INTERVAL: Final = 0.2
#: Any fixed value does; it makes the UUIDs of simulated GPUs the same at every start and unlike any card's.
_NAMESPACE: Final = uuid.UUID("5f0c1b7e-7d5a-4c5e-9a55-5b8c1d0e6a01")
#: Digits. More is no number of a GPU.
_NUMBER_LENGTH: Final = 9
#: Bytes each pretends to have: a Tesla T4's.
_MEMORY: Final = 16 * GIB
#: Bytes of one with MIG instances, if those have no more: an A100's.
_MIG_MEMORY: Final = 80 * GIB
#: "1g.10gb" has 10 GiB.
_PROFILE_MEMORY: Final = re.compile(r"\.(\d+)gb")
#: "0" is a GPU, "0/1" an instance of it.
_FAULTY: Final = re.compile(rf"(\d{{1,{_NUMBER_LENGTH}}})(?:/(\d{{1,{_NUMBER_LENGTH}}}))?", re.ASCII)

#: Number of a GPU, or of a GPU and its MIG instance.
Number = int | tuple[int, int]


def simulated_gpus(count: int, now: float = 0.0, profiles: str = "") -> tuple[Gpu, ...]:
    """Return `count` simulated GPUs, healthy from now on, with MIG instances of these `profiles` (with commas)."""
    gpus = _whole_gpus(count, now)
    if not profiles:
        return gpus
    return tuple(_with_instances(gpu, index, profiles.split(","), now) for index, gpu in enumerate(gpus))


def _with_instances(gpu: Gpu, index: int, profiles: Sequence[str], now: float) -> Gpu:
    instances = tuple(
        MigInstance(
            uuid=f"{MIG_PREFIX}{uuid.uuid5(_NAMESPACE, f'{index}/{number}/{profile}')}",
            name=f"{gpu.name} MIG {profile}",
            profile=profile,
            memory_bytes=int("".join(_PROFILE_MEMORY.findall(profile))) * GIB,
            since=now,
        )
        for number, profile in enumerate(profiles)
    )
    memory = max(_MIG_MEMORY, sum(instance.memory_bytes or 0 for instance in instances))
    return attrs.evolve(
        gpu, memory_bytes=memory, memory_total=memory, mig_mode=True, mig_pending=True, instances=instances
    )


def _whole_gpus(count: int, now: float) -> tuple[Gpu, ...]:
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


async def simulate(node: NodeState, count: int, faults_file: str, profiles: str = "") -> None:
    """Give the node simulated GPUs, faulty for as long as the file of faults says so (empty: there is none)."""
    gpus = simulated_gpus(count, time.time(), profiles)
    node.set_gpus(gpus)
    while faults_file:
        before, faults = gpus, await run_in_thread(read_faults, Path(faults_file))
        gpus = with_faults(gpus, faults, time.time())
        node.set_gpus(gpus)
        for old, new in zip(_all_parts(before), _all_parts(gpus), strict=True):
            if bool(new.reason) is not bool(old.reason):
                logger.warning(
                    "%s is %s", label(new.uuid), f"unhealthy: {new.reason}" if new.reason else "healthy again"
                )
        await trio.sleep(INTERVAL)


def _all_parts(gpus: Iterable[Gpu]) -> Iterator[Gpu | MigInstance]:
    for gpu in gpus:
        yield gpu
        yield from gpu.instances


def read_faults(path: Path) -> Mapping[Number, str]:
    """Return the faulty GPUs and MIG instances of a file and why: one to a line, its number and optionally a reason.

    No faults if the file is not there or can't be read.
    """
    try:
        lines = read_regular_file(path).decode("utf-8", "replace").splitlines()
    except OSError:  # not there, or half way of being replaced
        return {}
    faults: dict[Number, str] = {}
    for line in lines:
        number, *reason = line.split(maxsplit=1) or [""]
        if found := _FAULTY.fullmatch(number):
            key = int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))
            faults[key] = "".join(reason).strip() or "simulated fault"
    return faults


def with_faults(gpus: tuple[Gpu, ...], faults: Mapping[Number, str], now: float) -> tuple[Gpu, ...]:
    """Return the same GPUs, those in `faults` unhealthy with that reason, and no others; changed ones since now."""
    return tuple(_with_reasons(gpu, index, faults, now) for index, gpu in enumerate(gpus))


def _with_reasons(gpu: Gpu, index: int, faults: Mapping[Number, str], now: float) -> Gpu:
    reason = faults.get(index, "")
    instances = tuple(
        attrs.evolve(instance, reason=of_instance, since=_since(instance, of_instance, now))
        for number, instance in enumerate(gpu.instances)
        for of_instance in (faults.get((index, number), ""),)
    )
    health = Health.UNHEALTHY if reason else Health.HEALTHY
    return attrs.evolve(gpu, health=health, reason=reason, since=_since(gpu, reason, now), instances=instances)


def _since(known: Gpu | MigInstance, reason: str, now: float) -> float:
    return known.since if bool(known.reason) is bool(reason) else now
