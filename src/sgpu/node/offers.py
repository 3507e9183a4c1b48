"""GPUs, policy, holders and pressure → what is offered of each unit. Pure: knows neither trio, nor gRPC, nor NVML."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set

import attrs

from sgpu.node.gpu import Gpu, Health, Unit, units, without
from sgpu.node.policy import Policy, assign
from sgpu.node.shares import Share, ids

#: By resource; every resource of the policy is in it.
Offers = Mapping[str, tuple["Offer", ...]]


@attrs.frozen
class Offer:
    """The shares that are offered of one unit: `shares` of them, numbered from 0.

    `retained` are the numbers of further shares that containers still have from when there were more. `withheld` are
    the numbers of free shares that are listed as unhealthy, because the unit's memory is full or its GPU is cordoned.
    `limit_factor` is how many times its fair part of the memory a container may use, at most all; 0: there is no limit.
    """

    unit: Unit
    shares: int
    retained: tuple[int, ...] = ()
    withheld: frozenset[int] = frozenset()
    limit_factor: float = 0.0

    def share_ids(self) -> list[str]:
        """Return the ids of all shares, in order."""
        return [*ids(self.unit.uuid, self.shares), *(str(Share(self.unit.uuid, number)) for number in self.retained)]

    def share_health(self) -> list[Health]:
        """Return the health of all shares, in the same order."""
        health = self.unit.health  # once: there can be thousands of shares
        return [Health.UNHEALTHY if number in self.withheld else health for number in self._numbers()]

    def has(self, share: Share) -> bool:
        """Return whether the share, which is one of this unit, is offered."""
        return share.number < self.shares or share.number in self.retained

    def withhold(self, allocated: Collection[Share]) -> Offer:
        """Withhold all shares but those that are allocated."""
        taken = {share.number for share in allocated if share.uuid == self.unit.uuid}
        return attrs.evolve(self, withheld=frozenset(self._numbers()) - taken)

    def _numbers(self) -> Iterator[int]:
        yield from range(self.shares)
        yield from self.retained


def offers(
    policy: Policy,
    gpus: Iterable[Gpu],
    held: Mapping[str, Collection[Share]],
    pressed: Set[str] = frozenset(),
    allocated: Collection[Share] = (),
    left: Iterable[tuple[str, Offer]] = (),
) -> Offers:
    """Return what is offered, by resource.

    `held` has, by resource, the shares that containers have: they stay known where there are fewer shares now. By
    resource, because a share that is in use as one would be free as another. `pressed` has the UUIDs of the units whose
    free shares are withheld, unless `held` lacks their resource, and `allocated` all shares that are not free. Those of
    cordoned GPUs are withheld in any case: while nobody knows which are free, all are, as of a faulty GPU. `left` are
    offers of units that are no longer there, with their resources. Raises PolicyConflictError.
    """
    made: dict[str, list[Offer]] = {resource: [] for resource in policy.resources()}
    for resource, unit, terms in assign(policy, [unit for gpu in gpus for unit in units(gpu)]):
        made.setdefault(resource, []).append(Offer(unit, terms.shares, limit_factor=terms.limit_factor))
    for resource, offer in left:
        made.setdefault(resource, []).append(offer)
    return {
        resource: tuple(
            offer.withhold(allocated)
            if offer.unit.gpu.closed or (offer.unit.uuid in pressed and resource in held)
            else offer
            for offer in _with_retained(each, held.get(resource, ()))
        )
        for resource, each in made.items()
    }


def units_left(before: Offers, gpus: Iterable[Gpu]) -> tuple[tuple[str, Offer], ...]:
    """Return, with their resources, the offers of units that these GPUs no longer have."""
    known = {gpu.uuid: {unit.uuid for unit in units(gpu)} for gpu in gpus}
    return tuple(
        (resource, offer)
        for resource, each in before.items()
        for offer in each
        if offer.unit.uuid not in known.get(offer.unit.gpu.uuid, {offer.unit.uuid})
    )


def still_listed(
    left: Iterable[tuple[str, Offer]],
    held: Mapping[str, Collection[Share]],
    allocated: Collection[Share] | None,
    now: float,
) -> Iterator[tuple[str, Offer]]:
    """Yield those of the offers of which containers have shares, with these shares alone.

    A share that vanished would read as healthy in a pod's status. `held` and `allocated` are as for `offers`; None: it
    is unknown which shares are in use, so all may be. `now` is in seconds since the epoch.
    """
    for resource, offer in left:
        uuid, unit = offer.unit.uuid, without(offer.unit, now)
        used = {share.number for share in (*held.get(resource, ()), *(allocated or ())) if share.uuid == uuid}
        if allocated is None:
            yield resource, attrs.evolve(offer, unit=unit, limit_factor=0.0)
        elif used:
            yield resource, Offer(unit, 0, tuple(sorted(used)))


def _with_retained(made: Collection[Offer], held: Collection[Share]) -> Iterator[Offer]:
    shares = {offer.unit.uuid: offer.shares for offer in made}
    beyond: defaultdict[str, list[int]] = defaultdict(list)
    for share in held:
        if share.number >= shares.get(share.uuid, 0):
            beyond[share.uuid].append(share.number)
    for offer in made:
        numbers = beyond.get(offer.unit.uuid)
        yield attrs.evolve(offer, retained=tuple(sorted(numbers))) if numbers else offer
