"""A directory, and a way to wait for changes in it, with inotify. Trio only: knows neither kubelet nor settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import inotify_simple
import trio

from sgpu.lib.concurrency import Broadcast, wait_until

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


class Directory:
    """A watched directory. Needs `watch` to run."""

    def __init__(self, path: Path, inotify: inotify_simple.INotify) -> None:
        self.path = path
        self.changed = Broadcast()
        self._inotify = inotify

    def renew(self) -> None:
        """Watch what is at the path now, which may be a new directory. Raises OSError when it can't be watched.

        To open another in its place would do as well, but to close one takes the kernel some 20 ms.
        """
        self._inotify.add_watch(self.path, _CHANGES)

    async def watch(self) -> None:
        """Notify of changes, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._inotify.fileno())
            self._inotify.read(timeout=0)  # what changed is looked up, not read: events can be lost, files can't
            self.changed.notify()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; it is asked now and after each change. It must not block."""
        await wait_until(condition, self.changed)


@contextmanager
def open_directory(path: Path) -> Iterator[Directory]:
    """Open a directory, whose changes are queued from here on. Raises OSError when it can't be watched."""
    with inotify_simple.INotify(nonblocking=True) as inotify:
        directory = Directory(path, inotify)
        directory.renew()
        yield directory
