"""The state of the node: what the driver, the kubelet and the operator say, and what is offered because of it.

The sources set the inputs. The front-ends read what is offered, wait for `changed`, and allocate. Everything is decided
at once; nothing here waits. Knows neither NVML nor gRPC.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import attrs
import trio

from sgpu.lib.concurrency import Broadcast
from sgpu.lib.logs import OnChange
from sgpu.node import pressure
from sgpu.node.cgroup_limit import LimitAnswer
from sgpu.node.claims import PreparedClaim
from sgpu.node.container import NO_POD, Container
from sgpu.node.cordon import is_free
from sgpu.node.edits import (
    AllocationOptions,
    ContainerEdits,
    CordonedShareError,
    UnhealthyShareError,
    UnknownShareError,
    container_edits,
)
from sgpu.node.enforcement import Enforcement
from sgpu.node.gpu import Gpu, Health, Unit, label, units, units_or_whole, without
from sgpu.node.notices import Notices
from sgpu.node.offers import Offer, Offers, offers, still_listed, units_left
from sgpu.node.policy import OffersRefusedError, Policy, mig_notes
from sgpu.node.rank import UnitLoad
from sgpu.node.shares import Share
from sgpu.node.usage import Usage

logger = logging.getLogger(__name__)


def _accept(_: Sequence[Offer]) -> None:
    """Any number of shares can be offered."""


class NodeState:
    """The inputs, and the offers made of them. `changed` notifies of new GPUs, offers and policies.

    `interval`: seconds between two samples of the driver. `check` is given the offers of one resource, and raises
    OffersRefusedError where a front-end can't offer them.
    """

    def __init__(
        self,
        policy: Policy,
        interval: float,
        check: Callable[[Sequence[Offer]], None] = _accept,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.changed = Broadcast()
        #: Notifies of pods that may have claims: the kubelet lists them.
        self.pods_appeared = Broadcast()
        self.policy = policy
        self.gpus: tuple[Gpu, ...] = ()
        self.offers: Offers = {}
        self.usage = Usage(interval)
        self.enforcement = Enforcement()
        self.notices = Notices()
        #: The claims that are prepared, by uid.
        self.claims: Mapping[str, PreparedClaim] = {}
        #: The cordoned GPUs, by UUID, as they were last seen; some may not be in this node now.
        self.cordoned: Mapping[str, Gpu] = {}
        self._reported: tuple[Gpu, ...] = ()  # the GPUs as they were set, without cordons
        self._check = check
        self._clock = clock
        self._held: Mapping[str, Set[Share]] = {}
        self._pressed: frozenset[str] = frozenset()  # the UUIDs of the units whose memory is full
        self._accepted: frozenset[str] = frozenset()  # the UUIDs of the GPUs that the offers were last made of
        self._by_unit: Mapping[str, Mapping[str, Offer]] = {}  # the offers, by resource and UUID
        self._refused = OnChange(logger, logging.ERROR)
        self._unmatched = OnChange(logger, logging.WARNING)
        self._mig = OnChange(logger, logging.WARNING)
        self._unenforced = OnChange(logger, logging.WARNING)

    # Inputs

    def set_gpus(self, gpus: tuple[Gpu, ...]) -> None:
        """Take the node's GPUs.

        Raises OffersRefusedError for the first ones. Later it is logged, and only the GPUs of before stay offered: one
        that was added must not end the daemon.
        """
        before = {unit.uuid: unit.health for unit in _units(self.gpus)}
        self._reported, gpus = gpus, self._with_cordons(gpus)
        differ, self.gpus = gpus != self.gpus, gpus
        if not differ:
            return
        self._refresh()
        health = {unit.uuid: unit.health for unit in _units(gpus)}
        for uuid in health:
            if health[uuid] is Health.UNHEALTHY and before.get(uuid) is not Health.UNHEALTHY:
                self._log_users(uuid, "is unhealthy")
        for uuid in before:
            if uuid not in health:
                self._log_users(uuid, "is gone")
        self.changed.notify()

    def set_policy(self, policy: Policy) -> None:
        """Take the operator's new policy. Raises OffersRefusedError, and then keeps the old one."""
        self._offer(policy, self.gpus)
        self.policy = policy
        self._refused.clear()
        self.changed.notify()

    def set_cordoned(self, cordoned: Mapping[str, Gpu]) -> None:
        """Take the cordoned GPUs, by UUID: their free shares are withheld, and no more are handed out."""
        self.cordoned = cordoned
        self.set_gpus(self._reported)
        self.changed.notify()  # also where such a GPU has not been seen yet

    def release_free(self) -> None:
        """Have the cordoned GPUs released of which no container has a share any more, as far as that is known.

        They stay so until they are uncordoned: nobody gets a share of them meanwhile.
        """
        waiting = [gpu for gpu in self.gpus if gpu.cordon and not gpu.cordon.released]
        allocated = self.usage.allocated(self._clock()) if waiting else None
        if allocated is None:
            return
        offered = [offer.unit for each in self.offers.values() for offer in each]
        free = {
            gpu.uuid: attrs.evolve(gpu, cordon=attrs.evolve(gpu.cordon, released=True))
            for gpu in waiting
            if gpu.cordon and is_free(gpu, offered, allocated, self.claims.values())
        }
        if free:
            logger.info("no container has a share of cordoned GPU %s any more: releasing it", ", ".join(free))
            self.set_cordoned({**self.cordoned, **free})

    def set_holders(self, holders: Mapping[str, Mapping[Share, Container]] | None) -> None:
        """Take the kubelet's list of containers, by resource and share; None: it no longer gives one."""
        self.usage.set_holders(
            None if holders is None else {share: held for each in holders.values() for share, held in each.items()}
        )
        if holders is not None:
            self._held = {resource: each.keys() for resource, each in holders.items()}
        self._refresh_offers()
        self.release_free()

    def set_claimants(self, claimants: Mapping[Share, tuple[Container, ...]]) -> None:
        """Take the kubelet's list of all containers that have shares by claims."""
        if self.usage.set_claimants(claimants):
            self.changed.notify()

    def set_claims(self, claims: Mapping[str, PreparedClaim]) -> None:
        """Take the claims that are prepared, by uid. The memory of new ones is expected to be used soon."""
        now, offered = self._clock(), {offer.unit.uuid: offer for each in self.offers.values() for offer in each}
        gone = (unit for uid in self.claims.keys() - claims.keys() for unit in self.claims[uid].units)
        self.usage.grants.forget(share for unit in gone for share in unit.shares)  # first: a new claim may get them
        new = (unit for uid in claims.keys() - self.claims.keys() for unit in claims[uid].units)
        for unit in new:
            offer = offered.get(unit.uuid)
            fair = (offer.unit.memory_bytes or 0) // offer.shares if offer else 0
            for share in unit.shares:
                self.usage.grants.add(share, unit.memory // len(unit.shares) or fair, now)
        self.claims = claims
        self.changed.notify()

    def set_limits(self, answers: Iterable[LimitAnswer]) -> None:
        """Take what the driver says of memory limits, and log why some are not enforced."""
        self.enforcement.answer(answers)
        self.usage.set_limits(self.enforcement.by_container())
        reasons = "; ".join(f"{reason} ({count})" for reason, count in self.enforcement.problems().items())
        self._unenforced.update(reasons and f"memory limits are not enforced: {reasons}")

    def update_pressure(self, watermark: float) -> tuple[Set[str], Set[str]]:
        """Withhold the free shares of units whose memory is above the watermark, and no others.

        Returns the UUIDs of those units before and now. A share in use must never be withheld: as long as it is unknown
        which are, none is.
        """
        before = self._pressed
        known = self.usage.holders is not None
        self._pressed = pressure.under_pressure(self.usage.figures, before, watermark) if known else frozenset()
        if before or self._pressed:
            self._refresh_offers()
        return before, self._pressed

    # For the front-ends

    def resources(self) -> tuple[str, ...]:
        """Return the names of all resources: those of the policy, and of the MIG profiles that are offered."""
        return tuple(dict.fromkeys((*self.policy.resources(), *self.offers)))

    def shown(self) -> Iterator[Unit]:
        """Yield what an observer shows: all units, also those that are gone and in use, and GPUs that have none."""
        gone = {offer.unit.uuid: offer.unit for each in self.offers.values() for offer in each if offer.unit.gone}
        for gpu in self.gpus:
            left = [unit for unit in gone.values() if unit.gpu.uuid == gpu.uuid]
            yield from (*units(gpu), *left) or units_or_whole(gpu)

    def offered(self, resource: str) -> tuple[Offer, ...]:
        """Return what is offered under this name; nothing under one that the policy does not have."""
        return self.offers.get(resource, ())

    def loads(self, resource: str) -> Mapping[str, UnitLoad]:
        """Return how each unit of a resource is used, by UUID."""
        return self.usage.loads(self.offered(resource), self._clock())

    def allocate(
        self, resource: str, containers: Sequence[Sequence[str]], options: AllocationOptions
    ) -> list[ContainerEdits]:
        """Hand each of these containers its shares, and return what each needs.

        Raises AllocationError, and then hands out none.
        """
        now = self._clock()
        wanted = [[self._find(resource, share_id) for share_id in share_ids] for share_ids in containers]
        edits = [container_edits([offer for _, offer in each], options) for each in wanted]
        for each in edits:
            if each.warning:
                logger.warning("%s", each.warning)
        granted = [pair for each in wanted for pair in each]
        for share, offer in granted:
            self.usage.grants.add(share, (offer.unit.memory_bytes or 0) // offer.shares, now)
        if any(share.number in offer.withheld for share, offer in granted):
            self._refresh_offers()  # in use from now on
        return edits

    def _find(self, resource: str, share_id: str) -> tuple[Share, Offer]:
        """Return the share of this id that can be handed out, with its offer. Raises AllocationError."""
        share = Share.parse(share_id)
        offer = self._by_unit.get(resource, {}).get(share.uuid) if share else None
        if share is None or offer is None or not offer.has(share):
            raise UnknownShareError(f"share {share_id} is not one of this node's")
        if offer.unit.health is not Health.HEALTHY:
            raise UnhealthyShareError(f"share {share_id}: {offer.unit} is unhealthy ({offer.unit.reason})")
        if offer.unit.gpu.closed:
            raise CordonedShareError(f"share {share_id}: {offer.unit} is {offer.unit.gpu.closed}")
        return share, offer

    def _log_users(self, uuid: str, what: str) -> None:
        if pods := self.usage.pods(uuid):
            logger.warning("%s %s and is used by %s", label(uuid), what, ", ".join(pod or NO_POD for pod in pods))

    # How offers are made

    def _with_cordons(self, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
        cordons = {uuid: gpu.cordon for uuid, gpu in self.cordoned.items()}
        return tuple(
            # No process has a simulated one open.
            attrs.evolve(gpu, cordon=cordon, left_alone=gpu.left_alone or (gpu.simulated and cordon.released))
            if (cordon := cordons.get(gpu.uuid))
            else gpu
            for gpu in gpus
        )

    def _refresh_offers(self) -> None:
        before = self.offers
        self._refresh()
        if self.offers != before:
            self.changed.notify()

    def _refresh(self) -> None:
        try:
            self._offer(self.policy, self.gpus)
        except OffersRefusedError as error:
            if not self._accepted:
                raise
            self._refused.report(f"cannot offer all GPUs, those that were offered before stay: {error}")
            try:
                self._offer(self.policy, tuple(gpu for gpu in self.gpus if gpu.uuid in self._accepted))
            except OffersRefusedError:
                self._set_offers(_with_current_units(self.offers, self.gpus))
        else:
            self._refused.clear()

    def _offer(self, policy: Policy, gpus: tuple[Gpu, ...]) -> None:
        left = units_left(self.offers, gpus)
        closed = any(gpu.closed for gpu in gpus)
        allocated = self.usage.allocated(self._clock()) if self._pressed or left or closed else None
        pressed = frozenset() if allocated is None else self._pressed
        listed = still_listed(left, self._held, allocated, time.time())
        made = offers(policy, gpus, self._held, pressed, allocated or (), listed)
        for resource, each in made.items():
            if each != self.offers.get(resource):  # with each list of holders, which mostly changes nothing
                self._check(each)
        if gpus:
            unmatched = policy.unmatched([unit for gpu in gpus for unit in units_or_whole(gpu)])
            self._unmatched.update("; ".join(f"rule {rule} matches no GPU of this node" for rule in unmatched))
            self._mig.update("; ".join(mig_notes(policy, gpus)))
        self._accepted = frozenset(gpu.uuid for gpu in gpus)
        self._set_offers(made)

    def _set_offers(self, made: Offers) -> None:
        self.offers = made
        self._by_unit = {resource: {offer.unit.uuid: offer for offer in each} for resource, each in made.items()}


def _units(gpus: Iterable[Gpu]) -> Iterator[Unit]:
    return (unit for gpu in gpus for unit in units(gpu))


def _with_current_units(made: Offers, gpus: tuple[Gpu, ...]) -> Offers:
    """Return the same offers, of the units as they are now: their health must not be an old one."""
    current = {unit.uuid: unit for unit in _units(gpus)}
    return {
        resource: tuple(
            attrs.evolve(offer, unit=current.get(offer.unit.uuid) or without(offer.unit, time.time())) for offer in each
        )
        for resource, each in made.items()
    }
