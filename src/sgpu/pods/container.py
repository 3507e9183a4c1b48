"""Container ids → which container of which pod, by the kubelet's links to logs. Pure: names in, values out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from sgpu.node.container import Container
from sgpu.pods.cgroups import container_ids

_ID_LENGTH: Final = 64
#: Digits of an id that was cut off by which it is still recognized.
_FEWEST_DIGITS: Final = 12
#: `<pod>_<namespace>_<container>-<id>.log`, as the kubelet composes it. None of the first three has an underscore.
_LINK: Final = re.compile(rf"([^_]+)_([^_]+)_([^_]+)-([0-9a-f]{{{_FEWEST_DIGITS},{_ID_LENGTH}}})\.log")
#: Characters of a link's name, to which the kubelet cuts it in front of the suffix.
_LINK_LENGTH: Final = 255


@attrs.frozen
class Containers:
    """The containers of this node's kubelet, by id; `cut` are those of which only the begin of the id is known."""

    whole: Mapping[str, Container]
    cut: Mapping[str, Container]

    def has_any(self) -> bool:
        """Return whether any container is known."""
        return bool(self.whole or self.cut)

    def find(self, cgroup: str) -> Container | None:
        """Return the container of a process, by its /proc/<pid>/cgroup; None if it is in none of them.

        Of several, one in the other, the outermost: whoever may make cgroups in a container can give them any name.
        Nodes that are containers themselves (kind) are none of their kubelet's.
        """
        return next(iter(self.named(container_ids(cgroup)).values()), None)

    def named(self, container_ids: Iterable[str]) -> Mapping[str, Container]:
        """Return those of these containers that are known, by id."""
        found = {container_id: self._get(container_id) for container_id in container_ids}
        return {container_id: container for container_id, container in found.items() if container}

    def _get(self, container_id: str) -> Container | None:
        if container_id in self.whole:
            return self.whole[container_id]
        return next((container for digits, container in self.cut.items() if container_id.startswith(digits)), None)


def read_links(names: Iterable[str]) -> Containers:
    """Return the containers, by the names of the kubelet's links to their logs (in /var/log/containers).

    The kubelet cuts the end of an id off where the names of pod, namespace and container come to more than 184
    characters. Where fewer than 12 digits of it are left (236 characters), the container is left out.
    """
    whole, cut = {}, {}
    for name in names:
        if match := _LINK.fullmatch(name):
            pod, namespace, container, container_id = match.groups()
            if len(container_id) == _ID_LENGTH:
                whole[container_id] = Container(namespace, pod, container)
            elif len(name) == _LINK_LENGTH:
                cut[container_id] = Container(namespace, pod, container)
    return Containers(whole, cut)
