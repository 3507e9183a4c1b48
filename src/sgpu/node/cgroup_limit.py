"""A memory limit of a cgroup on a GPU: what is wanted, and what the driver answers. Values only: the driver's process
imports this, too.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import attrs


class Target(NamedTuple):
    """A cgroup directory on one GPU."""

    uuid: str
    cgroup: str


class LimitState(enum.Enum):
    """What is known of a limit. Only ENFORCED, which the driver reads back, is a limit."""

    PENDING = "pending"
    ENFORCED = "enforced"
    REFUSED = "refused"
    FOREIGN = "set by somebody else"
    REMOVED = "removed"


class WantedLimit(NamedTuple):
    """Bytes that a cgroup may use of a GPU's memory; None: no limit. `ours`: whatever limit it has now, sgpu set it."""

    uuid: str
    cgroup: str
    hard: int | None
    ours: bool = False

    @property
    def target(self) -> Target:
        return Target(self.uuid, self.cgroup)


@attrs.frozen
class LimitAnswer:
    """What became of a wanted limit. `hard` and `used` are bytes that the driver reads back; None: unknown or none."""

    wanted: WantedLimit
    state: LimitState
    hard: int | None = None
    used: int | None = None
    reason: str = ""


@attrs.frozen
class ContainerLimit:
    """One container's limit on one GPU: bytes, what is known of it, and bytes used by the cgroup (None: unknown)."""

    hard: int
    state: LimitState
    used: int | None = None
    reason: str = ""
