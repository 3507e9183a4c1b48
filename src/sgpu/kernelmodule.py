"""The driver's part in the kernel, as the kernel's files tell of it. Imports nothing of sgpu."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

#: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Thu …", or "… Open Kernel Module for x86_64  550.54.15 …
_BANNER: Final = re.compile(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", re.MULTILINE)


def module_version(proc: Path, sysfs: Path) -> str:
    """The version of the module `nvidia`; empty where it is not loaded, or can't be seen in these directories."""
    if version := read_text(sysfs / "module/nvidia/version").strip():
        return version
    banner = _BANNER.search(read_text(proc / "driver/nvidia/version"))
    return banner[1] if banner else ""


def read_text(path: Path) -> str:
    """The content of one of the kernel's files; empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
