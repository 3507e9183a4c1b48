"""The cgroup directories of pods and of their containers, as they come and go.

inotify reports a new one within microseconds. All that is read here is the kernel's memory. Knows neither NVML nor
shares.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """The pods of this node. `changed` notifies of new ones, and of changes in directories beside (`watch_beside`)."""

    def __init__(self, root: Path, inotify: inotify_simple.INotify | None) -> None:
        self.changed = Broadcast()
        self._root = str(root)
        self._inotify = inotify
        self._limit = OnChange(logger, logging.WARNING)
        self._watched: dict[int, str] = {}
        self._parents: set[str] = set()  # directories that have pods
        self._pods: dict[str, dict[str, str]] = {}  # containers by id, by the pod's directory

    def pods(self) -> tuple[PodCgroups, ...]:
        """Return the pods that are there now."""
        return tuple(
            PodCgroups(cgroups.pod_uid(os.path.basename(directory)), directory, dict(containers))
            for directory, containers in self._pods.items()
        )

    def scan(self) -> None:
        """Look at everything anew. It walks the top of the tree: call it seldom."""
        self._parents.clear()
        self._pods.clear()
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
        for directory in directories:
            self._watch(str(directory))

    async def watch(self) -> None:
        """Follow changes until cancelled. Without inotify there are none: call `scan` each time."""
        if self._inotify is None:
            await trio.sleep_forever()
        while True:
            await trio.lowlevel.wait_readable(self._inotify.fileno())
            for event in self._inotify.read(timeout=0):
                if event.mask & inotify_simple.flags.Q_OVERFLOW:
                    self.scan()
                elif event.mask & inotify_simple.flags.IGNORED:
                    self._watched.pop(event.wd, None)
                else:
                    self._look_at(self._watched.get(event.wd, ""))
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
            del self._pods[pod]

    def _look_at_pod(self, directory: str) -> None:
        self._watch(directory)
        names = {name: cgroups.container_id(name) for name in _directories(directory)}
        self._pods[directory] = {container: f"{directory}/{name}" for name, container in names.items() if container}

    def _watch(self, directory: str) -> None:
        """Watch it from now on, before it is looked at, so that no change is missed."""
        if self._inotify is None:
            return
        try:
            self._watched[self._inotify.add_watch(directory, _CHANGES)] = directory
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # it is gone again
                self._limit.report(limit_reached(Path(self._root), error))


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
