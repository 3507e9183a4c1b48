"""The version of NVIDIA's module in the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.driver.kernelmodule import module_version

pytestmark = pytest.mark.pure

SYSFS, PROC = "sys/module/nvidia/version", "proc/driver/nvidia/version"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.261.03  Release Build  (root@host)  Wed\n"
PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Wed Jun  4 19:02:33 UTC 2025\nGCC: 12.2"


@pytest.mark.parametrize(
    ("files", "version"),
    [
        pytest.param({}, "", id="not loaded"),
        pytest.param({SYSFS: "535.261.03\n", PROC: "NVRM version: x  1.2  y\n"}, "535.261.03", id="sysfs"),
        pytest.param({PROC: PROPRIETARY}, "535.261.03", id="proprietary module"),
        pytest.param({PROC: OPEN}, "535.261.03", id="open module"),
        pytest.param({PROC: "NVRM version: x  550.54  y\n"}, "550.54", id="two numbers"),
        pytest.param({PROC: "GCC version: 12.2.0 \n"}, "", id="no banner"),
    ],
)
def test_version(tmp_path: Path, files: dict[str, str], version: str) -> None:
    """Read the version from sysfs, or from the module's banner where there is none."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert module_version(tmp_path / "proc", tmp_path / "sys") == version
