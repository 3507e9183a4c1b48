"""Ranks units for a container that asks for a share: by placement, live memory and utilization.

Pure: knows neither trio, nor purerpc, nor NVML.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import attrs


class Placement(enum.Enum):
    """Prefer the unit with most room, or the fullest one."""

    SPREAD = "spread"
    PACK = "pack"


class MultiShare(enum.Enum):
    """The units that several shares of one container should come from. STRICT_DISTINCT differs only in Allocate."""

    DISTINCT = "distinct"
    SAME = "same"
    STRICT_DISTINCT = "strict-distinct"


@attrs.frozen
class UnitLoad:
    """The use of one unit when a container asks for shares.

    `allocated`: how many of its `shares` containers have; None: unknown, then those that are not free count.
    `free_memory`: bytes, as last sampled, less what the shares handed out moments ago will still take.
    `utilization`: percent. Both are None where the driver does not say or the figures are old. `others`: how many of
    its shares stand for what other device plugins gave out of it; all of them for a whole unit. `alone`: a container
    that has a share of it can use no other unit.
    """

    allocated: int | None
    shares: int
    free_memory: int | None = None
    utilization: int | None = None
    others: int = 0
    alone: bool = False

    @property
    def is_given_away(self) -> bool:
        """Return whether others have all of it."""
        return self.others >= self.shares


def rank(candidates: Mapping[str, UnitLoad], allocated: Mapping[str, int], placement: Placement) -> list[str]:
    """Return the UUIDs, the best unit first, ties in the order given. `allocated` has the count for each candidate.

    A figure that is unknown for one is compared for none: else the order would depend on which two are compared first.
    """
    if placement is Placement.PACK:
        loads = candidates  # one that is full of others' containers is not to be filled up
        return sorted(loads, key=lambda uuid: (loads[uuid].is_given_away, -allocated[uuid] / loads[uuid].shares))
    memory = _if_known({uuid: load.free_memory for uuid, load in candidates.items()})
    utilization = _if_known({uuid: load.utilization for uuid, load in candidates.items()})
    return sorted(candidates, key=lambda uuid: (allocated[uuid], -memory[uuid], utilization[uuid]))


def _if_known(figures: Mapping[str, int | None]) -> Mapping[str, int]:
    """Return the figures, or the same for all where one is missing."""
    known = {uuid: figure for uuid, figure in figures.items() if figure is not None}
    return known if len(known) == len(figures) else dict.fromkeys(figures, 0)
