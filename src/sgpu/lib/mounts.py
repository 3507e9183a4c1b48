"""Mounts that one process has for itself: device nodes that it can't open."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: From <sched.h> and <sys/mount.h>, the same on all architectures.
_CLONE_NEWNS: Final = 0x20000
_MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SLAVE = 4, 32, 4096, 16384, 1 << 19


def deny_devices(nodes: Iterable[Path]) -> None:
    """Let every attempt of this process to open these device nodes fail with EACCES, as long as it runs.

    Other processes are not affected, except those that it starts. Call it before it has threads: each has its own
    view of mounts. Raises OSError, EPERM without CAP_SYS_ADMIN.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: object) -> None:
        if getattr(libc, function)(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, f"{function}: {os.strerror(number)}")

    def mount(source: bytes | None, target: bytes, flags: int) -> None:
        call("mount", source, target, None, ctypes.c_ulong(flags), None)

    call("unshare", _CLONE_NEWNS)
    mount(None, b"/", _MS_REC | _MS_SLAVE)  # what follows is not seen outside
    for node in map(os.fsencode, nodes):
        mount(node, node, _MS_BIND)
        mount(None, node, _MS_REMOUNT | _MS_BIND | _MS_NODEV)
