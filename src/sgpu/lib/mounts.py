"""Mounts that one process has for itself: device nodes that it can't open."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

#: From <sched.h> and <sys/mount.h>, the same on all architectures.
_CLONE_NEWNS: Final = 0x20000
_MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SLAVE = 4, 32, 4096, 16384, 1 << 19


def separate() -> None:
    """Give this process, and those that it starts, mounts of their own: no other sees what is mounted from now on.

    Call it before there are threads: each has its own view. Raises OSError, EPERM without CAP_SYS_ADMIN.
    """
    _call("unshare", _CLONE_NEWNS)
    _mount(None, b"/", _MS_REC | _MS_SLAVE)


def deny_device(node: Path) -> None:
    """Let each attempt to open a device node fail with EACCES, after `separate`. Raises OSError."""
    path = os.fsencode(node)
    _mount(path, path, _MS_BIND)
    _mount(None, path, _MS_REMOUNT | _MS_BIND | _MS_NODEV)


def _mount(source: bytes | None, target: bytes, flags: int) -> None:
    _call("mount", source, target, None, ctypes.c_ulong(flags), None)


def _call(function: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
