"""What a GPU is, and what a share of it is. Values only: imports nothing of sgpu."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Final

import attrs

#: Between a GPU's UUID and the number of a share. Ids are kept by the kubelet across upgrades: never change it.
SEPARATOR: Final = "::"
#: As printed, not as parsed: no sign, no leading zero, so that a share has exactly one id; and no longer than needed.
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}")


class Health(enum.Enum):
    """The kubelet's two words for it, in its spelling."""

    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"


@attrs.frozen
class Device:
    """One GPU as the node offers it. `shares` of it can be allocated, numbered from 0.

    `memory_bytes` and `numa_node` are None where the driver or the machine does not tell. `device_nodes` are
    what a container needs of /dev in order to use this GPU, relative to it. `reason` says why it is unhealthy;
    `since` is when its health was last another, in seconds since the epoch.
    """

    uuid: str
    name: str
    pci_bus_id: str
    shares: int
    device_nodes: tuple[str, ...]
    memory_bytes: int | None = None
    numa_node: int | None = None
    health: Health = Health.HEALTHY
    reason: str = ""
    since: float = attrs.field(default=0.0, eq=False)  # it never changes alone
    simulated: bool = False
    #: The numbers of shares that are free and should not be given away now: to be listed as unhealthy.
    withheld: frozenset[int] = frozenset()
    #: The numbers of shares beyond `shares` that containers still have from when there were more of them.
    kept: tuple[int, ...] = ()

    def share_ids(self) -> list[str]:
        """The ids of all shares, in order."""
        prefix = self.uuid + SEPARATOR
        return [f"{prefix}{number}" for number in self.numbers()]

    def share_health(self) -> list[Health]:
        """The health of all shares, in the same order."""
        return [Health.UNHEALTHY if number in self.withheld else self.health for number in self.numbers()]

    def numbers(self) -> Iterator[int]:
        """The numbers of all shares, in order."""
        yield from range(self.shares)
        yield from self.kept


@attrs.frozen
class Share:
    """One share of one GPU: what its id says, whether or not such a GPU exists."""

    uuid: str
    number: int

    @classmethod
    def parse(cls, share_id: str) -> Share | None:
        """The share that an id names, or None when it is not the id of a share."""
        uuid, separator, number = share_id.rpartition(SEPARATOR)
        if not (uuid and separator and _NUMBER.fullmatch(number)):
            return None
        return cls(uuid, int(number))
