"""A directory, and a way to wait for changes in it: with inotify, or by polling where the kernel has none left.

Trio only: knows neither kubelet nor settings.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import inotify_simple
import trio

from sgpu.lib.concurrency import Broadcast, wait_until
from sgpu.lib.logs import OnChange

logger = logging.getLogger(__name__)

#: Events after which a name in the directory may mean another file, or a file have other content.
_CHANGES: Final = (
    inotify_simple.flags.CREATE
    | inotify_simple.flags.DELETE
    | inotify_simple.flags.CLOSE_WRITE
    | inotify_simple.flags.MOVED_FROM
    | inotify_simple.flags.MOVED_TO
    | inotify_simple.flags.DELETE_SELF
    | inotify_simple.flags.MOVE_SELF
    | inotify_simple.flags.ONLYDIR
)
#: Seconds between two looks where inotify can't be used.
POLL_INTERVAL: Final = 0.5
#: What the kernel refuses with, and which limit that is (inotify(7)).
LIMITS: Final = {
    errno.EMFILE: "fs.inotify.max_user_instances (or this process's open files)",
    errno.ENFILE: "fs.file-max",
    errno.ENOSPC: "fs.inotify.max_user_watches",
}


class Directory:
    """A watched directory. Needs `watch` to run."""

    def __init__(self, path: Path, inotify: inotify_simple.INotify | None) -> None:
        self.path = path
        self.changed = Broadcast()
        self._inotify = inotify
        self._watched = False
        self._limit = OnChange(logger, logging.WARNING)

    def renew(self) -> None:
        """Watch what is at the path now, which may be a new directory. Raises OSError when it can't be watched.

        To open another in its place would do as well, but to close one takes the kernel some 20 ms.
        """
        self._watched = False
        if self._inotify is not None:
            try:
                self._inotify.add_watch(self.path, _CHANGES)
                self._watched = True
            except OSError as error:
                self._limit.report(limit_reached(self.path, error))
        if not self._watched and not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(self.path))

    async def watch(self) -> None:
        """Notify of changes, until cancelled. Without inotify, of each moment at which there may have been one."""
        while True:
            if self._inotify is not None and self._watched:
                await trio.lowlevel.wait_readable(self._inotify.fileno())
                self._inotify.read(timeout=0)  # what changed is looked up, not read: events can be lost, files can't
            else:
                await trio.sleep(POLL_INTERVAL)
            self.changed.notify()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; it is asked now and after each change. It must not block."""
        await wait_until(condition, self.changed)


@contextmanager
def open_directory(path: Path) -> Iterator[Directory]:
    """Open a directory, whose changes are queued from here on. Raises OSError when it can't be watched."""
    try:
        inotify = inotify_simple.INotify(nonblocking=True)
    except OSError as error:
        logger.warning("%s", limit_reached(path, error))
        directory = Directory(path, None)
        directory.renew()
        yield directory
        return
    with inotify:
        directory = Directory(path, inotify)
        directory.renew()
        yield directory


def limit_reached(path: Path, error: OSError) -> str:
    """Say which limit of the kernel is reached. Raises any other error."""
    if error.errno not in LIMITS:
        raise error
    return f"cannot watch {path} with inotify ({error.strerror}), polling it: raise {LIMITS[error.errno]} on the node"
