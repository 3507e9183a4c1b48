"""Where a GPU is on the node's PCI buses, by the kernel: claims can ask for a network card of the same root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

#: A PCIe root complex among the directories that lead to a device.
_ROOT: Final = re.compile(r"pci[0-9a-f]{4}:[0-9a-f]{2}")


def pcie_root(sysfs_directory: Path, bus_id: str) -> str:
    """Return the PCIe root of a device, as `pci0000:3a`; empty where the kernel does not say."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        address = f"{int(domain, 16):04x}:{rest}"  # NVML writes the domain in eight digits, the kernel in four
        parts = (sysfs_directory / "bus/pci/devices" / address).readlink().parts
    except (OSError, ValueError):
        return ""
    return next(filter(_ROOT.fullmatch, parts), "")
