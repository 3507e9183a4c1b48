"""A lock among processes, by a file that only they can open. Trio only: waiting for it blocks no other task."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

#: Seconds between attempts, and until it is given up.
INTERVAL: Final = 0.01
TIMEOUT: Final = 20.0


@asynccontextmanager
async def locked(path: Path) -> AsyncIterator[None]:
    """Hold the lock in here. It ends with the process, however that ends. Raises OSError, also where it is too late."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await _acquire(descriptor, path)
        yield
    finally:
        os.close(descriptor)


async def _acquire(descriptor: int, path: Path) -> None:
    with trio.move_on_after(TIMEOUT):
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                await trio.sleep(INTERVAL)
    raise OSError(errno.EBUSY, f"another process has held the lock for {TIMEOUT:g} s", str(path))
