"""PCIe roots, by links as the kernel has them in sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.dra.pci import pcie_root


@pytest.mark.parametrize(
    ("target", "root"),
    [
        ("../../../devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0", "pci0000:3a"),
        ("../../../devices/LNXSYSTM:00/VMBUS:00/0000:3b:00.0", ""),
        (None, ""),
    ],
    ids=["card", "virtual machine", "unknown"],
)
def test_pcie_root(tmp_path: Path, target: str | None, root: str) -> None:
    """As other drivers have it, so that a claim can ask for both on one root."""
    devices = tmp_path / "bus/pci/devices"
    devices.mkdir(parents=True)
    if target:
        (devices / "0000:3b:00.0").symlink_to(target)
    assert pcie_root(tmp_path, "00000000:3B:00.0") == root


def test_no_address() -> None:
    """What a simulated GPU could have."""
    assert pcie_root(Path("/nowhere"), "x") == ""
