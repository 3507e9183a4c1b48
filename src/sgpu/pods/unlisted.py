"""Shares that the kubelet has handed out and does not list: those of ordinary init containers, by its checkpoint.

The kubelet frees what finished pods had in memory without writing the file: an entry counts while a process runs in its
pod's cgroup. Blocks as files do. Knows neither trio nor GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from sgpu.lib.files import content_identity
from sgpu.node.container import Container
from sgpu.node.shares import Share
from sgpu.pods.checkpoint import FILE, Checkpoint, Entry, read_checkpoint
from sgpu.pods.processes import Places

Holders = Mapping[str, Mapping[Share, Container]]

#: A pod's uid in the name of its cgroup: systemd has no dashes, static pods' uids neither.
_POD_UID: Final = re.compile(r"[/-]pod([0-9a-f]{8}[-_0-9a-f]{24,28})(?:\.slice)?(?:/|$)", re.MULTILINE)


class Unlisted:
    """Reads the checkpoint when it changes."""

    def __init__(self, plugin_directory: Path, places: Places) -> None:
        self._directory = plugin_directory
        self._places = places
        self._seen: tuple[int, ...] | None = None
        self.checkpoint = Checkpoint({}, ())  # as last read

    def may_find(self, listed: Holders) -> bool:
        """Return whether `find` is worth a thread: mostly the file is the same, and everything in it is listed."""
        return content_identity(self._directory / FILE) != self._seen or bool(self._missing(listed))

    def find(self, listed: Holders) -> Holders:
        """Return the shares of these resources that living pods have and that are not listed.

        Raises OSError or ValueError where the checkpoint can't be read.
        """
        seen = content_identity(self._directory / FILE)
        if seen != self._seen:
            self.checkpoint = read_checkpoint(self._directory) if seen else Checkpoint({}, ())
            self._seen = seen
        missing = self._missing(listed)
        if not missing:
            return {}
        living = _living(self._places.proc, {_plain(entry.pod_uid) for entry, _ in missing})
        names = _names(self._places.container_logs) if living else {}
        found: dict[str, dict[Share, Container]] = {}
        for entry, share in missing:
            if _plain(entry.pod_uid) in living:
                found.setdefault(entry.resource, {})[share] = _container(entry, names)
        return found

    def _missing(self, listed: Holders) -> list[tuple[Entry, Share]]:
        return [
            (entry, share)
            for entry in self.checkpoint.entries
            if entry.resource in listed
            for share in filter(None, map(Share.parse, entry.ids))
            if share not in listed[entry.resource]
        ]


def merge(listed: Holders, found: Holders) -> Holders:
    """Return the holders that are listed and those that `find` found."""
    return {resource: {**each, **found.get(resource, {})} for resource, each in listed.items()} if found else listed


def _container(entry: Entry, names: Mapping[str, tuple[str, str]]) -> Container:
    namespace, pod = names.get(_plain(entry.pod_uid), ("", f"uid {entry.pod_uid}"))
    return Container(namespace, pod, entry.container)


def _plain(uid: str) -> str:
    return uid.replace("-", "").replace("_", "")


def _living(proc: Path, uids: Collection[str]) -> set[str]:
    """Return those of these pods in whose cgroups a process runs."""
    living: set[str] = set()
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            with open(f"{proc}/{name}/cgroup", errors="replace") as file:
                living.update(map(_plain, _POD_UID.findall(file.read())))
        except OSError:  # it has ended
            continue
        if living >= set(uids):
            break
    return living & set(uids)


def _names(container_logs: Path) -> dict[str, tuple[str, str]]:
    """Return namespace and name by pod uid, from the links' targets: `…/<namespace>_<pod>_<uid>/<container>/0.log`."""
    names: dict[str, tuple[str, str]] = {}
    try:
        links = os.listdir(container_logs)
    except OSError:  # not mounted: the pods are known by their uids
        return names
    for link in links:
        try:
            namespace, pod, uid = PurePosixPath(os.readlink(container_logs / link)).parts[-3].split("_")
        except (OSError, IndexError, ValueError):  # no link, or none of the kubelet's
            continue
        names[_plain(uid)] = namespace, pod
    return names
