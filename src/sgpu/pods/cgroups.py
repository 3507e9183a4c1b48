"""The containers that a process is in, by the names that runtimes give cgroups. Pure: text in, ids out."""

from __future__ import annotations

import re
from typing import Final

#: A part of a cgroup's path that is a container: before its id may stand the runtime (`cri-containerd-`), or a slice
#: and the runtime where their drivers differ (`kubepods-….slice:cri-containerd:`); after it the kind of unit.
_CONTAINER: Final = re.compile(r"(?:.*:)?(?:[a-z-]+-)?([0-9a-f]{64})(?:\.scope)?(?: \(deleted\))?")
#: Directories that the kubelet makes: all pods are below the first kind, those of two classes in one of the second, and
#: each pod has one of the third. A nested node's have a prefix of their own.
_ROOT: Final = re.compile(r"kubepods|(?:.*-)?kubepods\.slice")
_CLASS: Final = re.compile(r"(?:.*-kubepods-|kubepods-)?(?:burstable|besteffort)(?:\.slice)?")
_POD_NAME: Final = re.compile(r"(?:.*-)?pod([0-9a-f]{8}[-_0-9a-f]{24,28})(?:\.slice)?")
#: The cgroup of a pod, by its uid, as the kubelet names it: with cgroupfs `pod<uid>`, with systemd a slice.
_POD: Final = re.compile(r"kubepods.*[/-]pod[0-9a-f]{8}[-_0-9a-f]{24,28}(\.slice)?(/|$)")
#: Who watches over a container, outside of it.
_MONITORS: Final = ("crio-conmon-", "libpod-conmon-")


def is_in_pod(cgroup: str) -> bool:
    """Return whether a process is in some pod's cgroup, by its /proc/<pid>/cgroup, whichever container it is in."""
    return any(_POD.search(line) for line in cgroup.splitlines())


def container_ids(cgroup: str) -> tuple[str, ...]:
    """Return the ids of the containers that a process is in, outermost first, by its /proc/<pid>/cgroup.

    One line for each hierarchy of cgroup v1, one of v2; relative to our own cgroup where that is a namespace.
    """
    # Mostly the same path in all hierarchies.
    paths = dict.fromkeys(line.split(":", 2)[2] for line in cgroup.splitlines() if line.count(":") > 1)
    parts = (part for path in paths for part in path.split("/") if not part.startswith(_MONITORS))
    return tuple(dict.fromkeys(found for part in parts if (found := container_id(part))))


def container_id(name: str) -> str:
    """Return the id of the container that has a cgroup of this name; empty where none has."""
    found = _CONTAINER.fullmatch(name)
    return found[1] if found else ""


def is_root(name: str) -> bool:
    """Return whether the cgroups of all pods are below one of this name."""
    return _ROOT.fullmatch(name) is not None


def is_class(name: str) -> bool:
    """Return whether a cgroup of this name has the pods of one class (burstable, besteffort)."""
    return _CLASS.fullmatch(name) is not None


def pod_uid(name: str) -> str:
    """Return the uid of the pod that has a cgroup of this name, as `plain_uid` does; empty where none has."""
    found = _POD_NAME.fullmatch(name)
    return plain_uid(found[1]) if found else ""


def plain_uid(uid: str) -> str:
    """Return a pod's uid without the characters that differ: cgroups of systemd have no dashes."""
    return uid.replace("-", "").replace("_", "")
