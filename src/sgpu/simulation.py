"""GPUs that are not there: devices like any other, for clusters, tests and demonstrations without a driver."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from sgpu.device import Device, Health

#: Any fixed value does; it makes the UUIDs of simulated GPUs the same at every start and unlike any card's.
_NAMESPACE: Final = uuid.UUID("5f0c1b7e-7d5a-4c5e-9a55-5b8c1d0e6a01")
#: Digits. More is no number of a GPU.
_NUMBER_LENGTH: Final = 9
#: Bytes each pretends to have: a Tesla T4's.
_MEMORY: Final = 16 * 1024**3


def simulated_devices(count: int, shares: int, now: float = 0.0) -> tuple[Device, ...]:
    """`count` simulated GPUs, healthy from now on."""
    return tuple(
        Device(
            uuid=f"GPU-{uuid.uuid5(_NAMESPACE, str(index))}",
            name=f"simulated GPU {index}",
            pci_bus_id=f"00000000:{index:02X}:00.0",
            shares=shares,
            device_nodes=(),
            memory_bytes=_MEMORY,
            since=now,
            simulated=True,
        )
        for index in range(count)
    )


def read_faults(path: Path) -> Mapping[int, str]:
    """The GPUs that a file says are faulty: one to a line, its number and optionally a reason.

    None if the file is not there or can't be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not there, or half way of being replaced
        return {}
    faults = {}
    for line in lines:
        number, *reason = line.split(maxsplit=1) or [""]
        if number.isdecimal() and len(number) <= _NUMBER_LENGTH:
            faults[int(number)] = "".join(reason).strip() or "simulated fault"
    return faults


def with_faults(devices: tuple[Device, ...], faults: Mapping[int, str], now: float) -> tuple[Device, ...]:
    """The same GPUs, those named by `faults` unhealthy with that reason, and no others; some of them since now."""
    return tuple(_with_reason(device, faults.get(index, ""), now) for index, device in enumerate(devices))


def _with_reason(device: Device, reason: str, now: float) -> Device:
    health = Health.UNHEALTHY if reason else Health.HEALTHY
    since = device.since if device.health is health else now
    return attrs.evolve(device, health=health, reason=reason, since=since)
