"""The cgroup directories of pods and of their containers, as they come and go.

inotify reports a new one within microseconds. All that is read here is the kernel's memory. Knows neither NVML nor
shares.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import inotify_simple
import trio

from sgpu.lib.concurrency import Broadcast
from sgpu.lib.inotify import limit_reached
from sgpu.lib.logs import OnChange
from sgpu.node.limits import PodCgroups
from sgpu.pods import cgroups

logger = logging.getLogger(__name__)

#: Directories between the top and the kubelet's: a node that is a container has its own at `docker/<id>/kubelet`.
_DEPTH: Final = 5
_CHANGES: Final = (
    inotify_simple.flags.CREATE
    | inotify_simple.flags.DELETE
    | inotify_simple.flags.MOVED_TO
    | inotify_simple.flags.ONLYDIR
)


class CgroupTree:
    """The pods of this node. `changed` notifies of new ones; `changed_beside`, too, of changes in directories beside
    (`watch_beside`).
    """

    def __init__(self, root: Path, inotify: inotify_simple.INotify | None) -> None:
        self.changed = Broadcast()
        self.changed_beside = Broadcast()
        self._root = str(root)
        self._inotify = inotify
        self._limit = OnChange(logger, logging.WARNING)
        self._watched: dict[int, str] = {}
        self._watches: dict[str, int] = {}  # the same by directory
        self._beside: frozenset[str] = frozenset()
        self._parents: set[str] = set()  # directories that have pods
        self._pods: dict[str, PodCgroups] = {}  # by directory

    def pods(self) -> tuple[PodCgroups, ...]:
        """Return the pods that are there now."""
        return tuple(self._pods.values())

    def scan(self) -> None:
        """Look at everything anew. It walks the top of the tree: call it seldom."""
        for directory in (*self._pods, *self._parents):
            self._forget(directory)
        for root in _roots(self._root, _DEPTH):
            self._look_at_parent(root)

    def parents(self) -> tuple[str, ...]:
        """Return the directories that have pods: the kubelet's, and one for each class."""
        return tuple(sorted(self._parents))

    def has_kubelet(self) -> bool:
        """Return whether there is a kubelet's directory."""
        return bool(self._parents)

    def follows(self) -> bool:
        """Return whether `watch` sees what comes and goes. If not, `scan` from time to time."""
        return self._inotify is not None and self.has_kubelet()

    def watch_beside(self, directories: Iterable[Path]) -> None:
        """Notify of changes in these directories, too. One that can't be watched is left out."""
        self._beside = frozenset(map(str, directories))
        for directory in self._beside:
            self._watch(directory)

    def follows_beside(self) -> bool:
        """Return whether `watch` sees what changes in all directories beside. If not, look at them each time."""
        return self._beside <= self._watches.keys()

    async def watch(self) -> None:
        """Follow changes until cancelled. Without inotify there are none: call `scan` each time."""
        if self._inotify is None:
            await trio.sleep_forever()
        while True:
            await trio.lowlevel.wait_readable(self._inotify.fileno())
            changed: set[str] = set()  # each of them is looked at once
            overflow = False
            for event in self._inotify.read(timeout=0):
                directory = self._watched.get(event.wd, "")
                changed.add(directory)
                if event.mask & inotify_simple.flags.Q_OVERFLOW:
                    overflow = True
                elif event.mask & inotify_simple.flags.IGNORED:
                    self._forget(directory)
                elif event.mask & inotify_simple.flags.DELETE:
                    self._forget(f"{directory}/{event.name}")  # another one may have its name by now
            if overflow:
                self.scan()
            for directory in changed:
                self._look_at(directory)
            if overflow or not self._beside.isdisjoint(changed):
                self.changed_beside.notify()
            self.changed.notify()

    def _look_at(self, directory: str) -> None:
        if directory in self._pods:
            self._look_at_pod(directory)
        elif directory in self._parents:
            self._look_at_parent(directory)

    def _look_at_parent(self, directory: str) -> None:
        self._parents.add(directory)
        self._watch(directory)
        found = {f"{directory}/{name}": name for name in _directories(directory)}
        for path, name in found.items():
            if cgroups.pod_uid(name):
                if path not in self._pods:
                    self._look_at_pod(path)
            elif cgroups.is_class(name) and path not in self._parents:
                self._look_at_parent(path)
        for pod in [pod for pod in self._pods if os.path.dirname(pod) == directory and pod not in found]:
            self._forget(pod)

    def _look_at_pod(self, directory: str) -> None:
        self._watch(directory)
        names = {name: cgroups.container_id(name) for name in _directories(directory)}
        containers = {container: f"{directory}/{name}" for name, container in names.items() if container}
        self._pods[directory] = PodCgroups(cgroups.pod_uid(os.path.basename(directory)), directory, containers)

    def _watch(self, directory: str) -> None:
        """Watch it from now on, before it is looked at, so that no change is missed."""
        if self._inotify is None or directory in self._watches:
            return
        try:
            watch = self._inotify.add_watch(directory, _CHANGES)
            self._watched[watch], self._watches[directory] = directory, watch
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # it is gone again
                self._limit.report(limit_reached(Path(self._root), error))

    def _forget(self, directory: str) -> None:
        """Forget a directory that is gone, with its watch, which the kernel keeps where it was a cgroup."""
        self._pods.pop(directory, None)
        self._parents.discard(directory)
        watch = self._watches.pop(directory, None)
        if self._inotify is not None and watch is not None:
            del self._watched[watch]
            with suppress(OSError):  # it went with the directory
                self._inotify.rm_watch(watch)


@contextmanager
def open_tree(root: Path) -> Iterator[CgroupTree]:
    """Open the tree of cgroups below `root`, to be scanned."""
    try:
        inotify = inotify_simple.INotify(nonblocking=True)
    except OSError as error:
        logger.warning("%s", limit_reached(root, error))
        yield CgroupTree(root, None)
        return
    with inotify:
        yield CgroupTree(root, inotify)


def _roots(directory: str, depth: int) -> Iterator[str]:
    for name in _directories(directory):
        path = f"{directory}/{name}"
        if cgroups.is_root(name):
            yield path
        elif depth:
            yield from _roots(path, depth - 1)


def _directories(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # it is gone again
        return []
