"""Which container a process belongs to, by what the kernel and the kubelet call it.

Pure: texts in, names out; who reads them is `processes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from sgpu.usage import Holder

#: A part of a cgroup's path that is a container: before its id may stand the runtime (`cri-containerd-`), or a slice
#: and the runtime where their drivers differ (`kubepods-….slice:cri-containerd:`); after it the kind of unit.
_CONTAINER: Final = re.compile(r"(?:.*:)?(?:[a-z-]+-)?([0-9a-f]{64})(?:\.scope)?(?: \(deleted\))?")
#: Who watches over a container, outside of it.
_MONITORS: Final = ("crio-conmon-", "libpod-conmon-")
_ID_LENGTH: Final = 64
#: Digits of an id that was cut off by which it is still recognised.
_FEWEST_DIGITS: Final = 12
#: `<pod>_<namespace>_<container>-<id>.log`, as the kubelet composes it. None of the first three has an underscore.
_LINK: Final = re.compile(rf"([^_]+)_([^_]+)_([^_]+)-([0-9a-f]{{{_FEWEST_DIGITS},{_ID_LENGTH}}})\.log")
#: Characters of a link's name, to which the kubelet cuts it in front of the suffix.
_LINK_LENGTH: Final = 255
#: What the kernel calls the server of NVIDIA's MPS: it keeps 15 characters.
_MPS_SERVER: Final = "nvidia-cuda-mps"
#: Where a process' start is in /proc/<pid>/stat, counted from behind its name: field 22 of all.
_START_FIELD: Final = 19


@attrs.frozen
class Stat:
    """What /proc/<pid>/stat tells: the name, cut to 15 characters, and clock ticks from the boot to the start."""

    name: str
    start: int

    @property
    def is_mps_server(self) -> bool:
        """Whether it uses GPUs on behalf of other processes."""
        return self.name == _MPS_SERVER


@attrs.frozen
class Containers:
    """The containers of this node's kubelet, by id; `cut` are those of which only the begin of the id is known."""

    whole: Mapping[str, Holder]
    cut: Mapping[str, Holder]

    def find(self, cgroup: str) -> Holder | None:
        """The container of a process, by its /proc/<pid>/cgroup; None if it is in none of them.

        Of several, one in the other, the outermost: whoever may make cgroups in a container can give them any name.
        Nodes that are containers themselves (kind) are none of their kubelet's.
        """
        for container_id in container_ids(cgroup):
            if container_id in self.whole:
                return self.whole[container_id]
            for digits, container in self.cut.items():
                if container_id.startswith(digits):
                    return container
        return None


def container_ids(cgroup: str) -> tuple[str, ...]:
    """The ids of the containers that a process is in, outermost first, by its /proc/<pid>/cgroup.

    One line for each hierarchy of cgroup v1, one of v2; relative to our own cgroup where that is a namespace.
    """
    # Mostly the same path in all hierarchies.
    paths = dict.fromkeys(line.split(":", 2)[2] for line in cgroup.splitlines() if line.count(":") > 1)
    parts = (part for path in paths for part in path.split("/") if not part.startswith(_MONITORS))
    return tuple(dict.fromkeys(found[1] for part in parts if (found := _CONTAINER.fullmatch(part))))


def read_links(names: Iterable[str]) -> Containers:
    """The containers by the names of the kubelet's links to their logs (in /var/log/containers).

    The kubelet cuts the end of an id off where the names of pod, namespace and container come to more than 184
    characters. Where fewer than 12 digits of it are left (236 characters), the container is left out.
    """
    whole, cut = {}, {}
    for name in names:
        if match := _LINK.fullmatch(name):
            pod, namespace, container, container_id = match.groups()
            if len(container_id) == _ID_LENGTH:
                whole[container_id] = Holder(namespace, pod, container)
            elif len(name) == _LINK_LENGTH:
                cut[container_id] = Holder(namespace, pod, container)
    return Containers(whole, cut)


def read_stat(stat: str) -> Stat:
    """Of /proc/<pid>/stat. Raises ValueError for anything else."""
    name, bracket, rest = stat.partition("(")[2].rpartition(")")  # the name can have brackets of its own
    fields = rest.split()
    if not bracket or len(fields) <= _START_FIELD:
        raise ValueError(f"not what /proc/<pid>/stat has: {stat[:100]!r}")
    return Stat(name, int(fields[_START_FIELD]))
