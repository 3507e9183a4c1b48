"""Devices that the kubelet has handed out and does not list: those of ordinary init containers, by its checkpoint.

The kubelet frees what finished pods had in memory without writing the file: an entry counts while a process runs in its
pod's cgroup. Blocks as files do. Knows neither trio nor GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from sgpu.node.container import Container
from sgpu.pods.cgroups import plain_uid
from sgpu.pods.checkpoint import Checkpoint, Entry, read_checkpoint
from sgpu.pods.held import Held, collect, gpus_in
from sgpu.pods.log_links import pods_by_uid
from sgpu.pods.processes import Places

#: A pod's uid in the name of its cgroup: systemd has no dashes, static pods' uids neither.
_POD_UID: Final = re.compile(r"[/-]pod([0-9a-f]{8}[-_0-9a-f]{24,28})(?:\.slice)?(?:/|$)", re.MULTILINE)


class Unlisted:
    """Reads the checkpoint if it is `outdated`, which whoever watches the file sets."""

    def __init__(self, plugin_directory: Path, places: Places) -> None:
        self._directory = plugin_directory
        self._places = places
        self.outdated = True
        self.checkpoint = Checkpoint({}, ())  # as last read
        self._devices: tuple[tuple[Entry, str], ...] = ()  # those of it that may be GPUs

    def may_find(self, listed: Held) -> bool:
        """Return whether `find` is worth a thread: mostly the file is the same, and everything in it is listed."""
        return self.outdated or any(True for _ in self._missing(listed))

    def find(self, listed: Held) -> Held:
        """Return the devices that living pods have and that are not listed.

        Raises OSError or ValueError where the checkpoint can't be read.
        """
        if self.outdated:
            self.outdated = False  # before it is read: what changes from now on is read the next time
            try:
                self._read()
            except (OSError, ValueError):
                self.outdated = True
                raise
        missing = list(self._missing(listed))
        living = _living(self._places.proc, {plain_uid(entry.pod_uid) for entry, _ in missing}) if missing else set()
        links = pods_by_uid(self._places.container_logs) if living else ()
        names = {plain_uid(uid): (namespace, pod) for uid, namespace, pod in links}
        found = (
            (entry.resource, [device_id], _container(entry, names))
            for entry, device_id in missing
            if plain_uid(entry.pod_uid) in living
        )
        return collect(found, listed.shares)

    def _read(self) -> None:
        try:
            self.checkpoint = read_checkpoint(self._directory)
        except FileNotFoundError:  # as on a new node
            self.checkpoint = Checkpoint({}, ())
        entries = self.checkpoint.entries
        self._devices = tuple((entry, device_id) for entry in entries for device_id in gpus_in(entry.ids))

    def _missing(self, listed: Held) -> Iterator[tuple[Entry, str]]:
        for entry, device_id in self._devices:
            if not listed.has(entry.resource, device_id):
                yield entry, device_id


def _container(entry: Entry, names: Mapping[str, tuple[str, str]]) -> Container:
    namespace, pod = names.get(plain_uid(entry.pod_uid), ("", f"uid {entry.pod_uid}"))
    return Container(namespace, pod, entry.container)


def _living(proc: Path, uids: Collection[str]) -> set[str]:
    """Return those of these pods in whose cgroups a process runs."""
    living: set[str] = set()
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            with open(f"{proc}/{name}/cgroup", errors="replace") as file:
                living.update(map(plain_uid, _POD_UID.findall(file.read())))
        except OSError:  # it has ended
            continue
        if living >= set(uids):
            break
    return living & set(uids)
