"""The syntax of a share's id: `<UUID of the unit>::<number>`. It is written and read here alone.

The kubelet keeps ids across upgrades and reboots: never change it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

_SEPARATOR: Final = "::"
#: As printed, not as parsed: no sign and no leading zero, so that a share has exactly one id; at most nine digits.
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}")


class Share(NamedTuple):
    """One share of one unit: what its id says, whether or not there is such a unit. Numbers count from 0."""

    uuid: str
    number: int

    def __str__(self) -> str:
        return f"{self.uuid}{_SEPARATOR}{self.number}"

    @classmethod
    def parse(cls, share_id: str) -> Share | None:
        """Return the share that an id names, or None when it is not the id of a share."""
        uuid, _, number = share_id.rpartition(_SEPARATOR)
        if not (uuid and _NUMBER.fullmatch(number)):
            return None
        return cls(uuid, int(number))


def ids(uuid: str, count: int) -> Iterator[str]:
    """Return the ids of a unit's first `count` shares, in order."""
    return map(uuid.__add__, suffixes(count))


def suffixes(count: int) -> list[str]:
    """Return what follows the UUID in the ids of the first `count` shares: the same for all units."""
    return [f"{_SEPARATOR}{number}" for number in range(count)]


def unit_of(share_id: str) -> str:
    """Return the UUID in an id; empty when there is none."""
    return share_id.rpartition(_SEPARATOR)[0]
