"""The memory that a container may use of a unit, by its shares. Pure: knows neither NVML, nor cgroups, nor trio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sgpu.node.container import Container
from sgpu.node.offers import Offer
from sgpu.node.shares import Share


def allowed_memory(offer: Offer, shares: int) -> int | None:
    """Return the bytes that a container with that many shares of a unit may use, at most all; None where unknown.

    Without limits it is the fair part, which nobody enforces.
    """
    usable = offer.unit.memory_bytes
    if usable is None:
        return None
    return min(int(usable * shares * (offer.limit_factor or 1)) // offer.shares, usable)


def allowed_by_container(
    offers: Iterable[Offer], holders: Mapping[Share, Container]
) -> Mapping[str, Mapping[Container, int]]:
    """Return what each container that has shares may use, in bytes, by the unit's UUID. Left out where unknown."""
    counts = Counter((share.uuid, container) for share, container in holders.items())
    offer_of = {offer.unit.uuid: offer for offer in offers}
    allowed: dict[str, dict[Container, int]] = {}
    for (uuid, container), count in counts.items():
        known = allowed_memory(offer_of[uuid], count) if uuid in offer_of else None
        if known is not None:
            allowed.setdefault(uuid, {})[container] = known
    return allowed
