"""Why a process does not answer, as far as the kernel says. Knows no GPU and no service."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from sgpu.driver.kernelmodule import read_text

_STATE: Final = re.compile(r"^State:\s*(\w)", re.MULTILINE)
_DESCRIPTORS: Final = re.compile(r"^Max open files\s+(\d+)", re.MULTILINE)


def silence(proc: Path, pid: int) -> tuple[str, str] | None:
    """Return why this process does not answer, and what to do; None where nothing is seen, as of pid 0."""
    process = proc / str(pid)
    state = _STATE.search(read_text(process / "status"))
    if state and state[1] in "Tt":
        return f"process {pid} is stopped, by a signal or a debugger", f"`kill -CONT {pid}`, or delete its pod"
    if state and state[1] == "D":
        return (
            f"process {pid} waits for the kernel",
            "a disk or a driver hangs: see `dmesg`; if it lasts, reboot the node",
        )
    limit = _DESCRIPTORS.search(read_text(process / "limits"))
    try:
        used = len(os.listdir(process / "fd"))
    except OSError:
        return None
    if limit and used >= int(limit[1]):
        return (
            f"process {pid} has all of its {limit[1]} file descriptors open",
            "raise the limit (ulimit -n) of the container",
        )
    return None
