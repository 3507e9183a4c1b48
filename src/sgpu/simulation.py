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


def simulated_devices(count: int, shares: int) -> tuple[Device, ...]:
    """`count` healthy simulated GPUs."""
    return tuple(
        Device(
            uuid=f"GPU-{uuid.uuid5(_NAMESPACE, str(index))}",
            name=f"simulated GPU {index}",
            pci_bus_id=f"00000000:{index:02X}:00.0",
            shares=shares,
            device_nodes=(),
            memory_bytes=_MEMORY,
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


def with_faults(devices: tuple[Device, ...], faults: Mapping[int, str]) -> tuple[Device, ...]:
    """The same GPUs, those named by `faults` unhealthy with that reason."""
    return tuple(
        attrs.evolve(device, health=Health.UNHEALTHY, reason=faults[index]) if index in faults else device
        for index, device in enumerate(devices)
    )
