"""What claims of dynamic resource allocation have of the node's units, and what their shares may use. Pure.

A claim's shares get numbers as the kubelet's shares have them, so that one count of shares serves both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, filterfalse, islice
from typing import Final, NamedTuple

import attrs

from sgpu.node.offers import Offer
from sgpu.node.shares import Share

#: More than any GPU has: what a claim without a limit may use is cut to what there is.
UNLIMITED: Final = 1 << 62


class Pod(NamedTuple):
    """A pod that a claim is reserved for."""

    uid: str
    name: str


@attrs.frozen
class ClaimedUnit:
    """What a claim has of one unit. `share_id` is the scheduler's name for it.

    `memory` is what the claim takes of the unit's memory, in bytes; 0: it names none. `limited`: the claim is held to
    it where the unit has memory limits.
    """

    share_id: str
    uuid: str
    resource: str
    shares: tuple[Share, ...]
    memory: int = 0
    limited: bool = True


@attrs.frozen
class PreparedClaim:
    """A claim that is prepared for these pods."""

    uid: str
    namespace: str
    name: str
    pods: tuple[Pod, ...]
    units: tuple[ClaimedUnit, ...]

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def free_shares(uuid: str, number: int, claims: Iterable[PreparedClaim]) -> tuple[Share, ...]:
    """Return the first shares of a unit that no claim has."""
    taken = {share for claim in claims for unit in claim.units for share in unit.shares}
    return tuple(islice(filterfalse(taken.__contains__, (Share(uuid, each) for each in count())), number))


def promised(claims: Iterable[PreparedClaim]) -> Mapping[Share, int]:
    """Return the bytes that shares of claims may use; without those that may use their fair part."""
    return dict(pair for claim in claims for unit in claim.units for pair in _promised(unit))


def used_parts(claims: Iterable[PreparedClaim], offers: Iterable[Offer]) -> Mapping[str, float]:
    """Return the part of each unit that claims have, of its shares or of its memory, whichever is more; by UUID."""
    memory, shares = Counter[str](), Counter[str]()
    for claim in claims:
        for unit in claim.units:
            memory[unit.uuid] += unit.memory
            shares[unit.uuid] += len(unit.shares)
    return {
        offer.unit.uuid: max(
            shares[offer.unit.uuid] / offer.shares, memory[offer.unit.uuid] / (offer.unit.memory_bytes or UNLIMITED)
        )
        for offer in offers
    }


def claimed_memory(claims: Iterable[PreparedClaim], uuid: str) -> int:
    """Return the bytes of a unit's memory that claims name."""
    return sum(unit.memory for claim in claims for unit in claim.units if unit.uuid == uuid)


def _promised(unit: ClaimedUnit) -> Iterator[tuple[Share, int]]:
    """Yield all of it for the first share and nothing for the others: that adds up without rounding."""
    amount = unit.memory if unit.limited else UNLIMITED
    if amount:
        for index, share in enumerate(unit.shares):
            yield share, 0 if index else amount
