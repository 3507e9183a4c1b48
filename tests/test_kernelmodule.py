"""Which version of NVIDIA's module the kernel has loaded, by what it says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.kernelmodule import module_version

VERSION = "535.261.03"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_none(tmp_path: Path) -> None:
    """No module, or none that can be seen from here."""
    assert module_version(tmp_path, tmp_path) == ""


def test_sysfs(tmp_path: Path) -> None:
    """Which has the version alone, and is asked first."""
    write(tmp_path / "sys/module/nvidia/version", f"{VERSION}\n")
    write(tmp_path / "proc/driver/nvidia/version", "NVRM version: x  1.2  y\n")
    assert module_version(tmp_path / "proc", tmp_path / "sys") == VERSION


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        pytest.param(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Wed Jun  4 19:02:33 UTC 2025\nGCC: 12.2",
            VERSION,
            id="proprietary",
        ),
        pytest.param(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.261.03  Release Build  (root@host)  Wed\n",
            VERSION,
            id="open",
        ),
        pytest.param("something else\n", "", id="neither"),
    ],
)
def test_banner(tmp_path: Path, banner: str, version: str) -> None:
    """Where there is no /sys."""
    write(tmp_path / "driver/nvidia/version", banner)
    assert module_version(tmp_path, tmp_path / "sys") == version
