"""The driver's kernel module, by the kernel's own files. Imports nothing of sgpu."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

#: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Thu …", or "… Open Kernel Module for x86_64  550.54.15 …
_BANNER: Final = re.compile(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", re.MULTILINE)


def module_version(proc: Path, sysfs: Path) -> str:
    """Return the version of the module `nvidia`; empty where it is not loaded, or not visible in these directories."""
    if version := read_text(sysfs / "module/nvidia/version").strip():
        return version
    banner = _BANNER.search(read_text(proc / "driver/nvidia/version"))
    return banner[1] if banner else ""


def read_text(path: Path) -> str:
    """Return the content of one of the kernel's files; empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
