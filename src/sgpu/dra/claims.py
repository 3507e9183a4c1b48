"""A ResourceClaim, as the API server has it, and the node's offers → what to prepare. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from sgpu.dra.sharing import SharingConfig, SharingConfigError, read_configs
from sgpu.dra.slices import DRIVER, MEMORY, SHARES, device_name, unit_uuid
from sgpu.lib.quantity import parse_quantity
from sgpu.node.claims import ClaimedUnit, Pod, PreparedClaim, free_shares
from sgpu.node.gpu import Health, label
from sgpu.node.offers import Offer, Offers


class ClaimError(Exception):
    """A claim can't be prepared. The message says why and, where somebody can do something, what."""


@attrs.frozen
class Result:
    """One device that the scheduler allocated to a request of a claim. `memory`: bytes; 0: none named.

    `admin`: for monitoring, beside all claims, so that it takes nothing.
    """

    request: str
    device: str
    share_id: str
    shares: int
    memory: int
    admin: bool
    config: SharingConfig


@attrs.frozen
class Claim:
    """What matters of a ResourceClaim: the devices of this driver, and the pods it is reserved for."""

    uid: str
    namespace: str
    name: str
    pods: tuple[Pod, ...]
    results: tuple[Result, ...]


@attrs.frozen
class Grant:
    """One allocated device and the unit behind it. `shares`: how many; with admin access none."""

    result: Result
    offer: Offer
    unit: ClaimedUnit


def read_claim(thing: Mapping[str, Any], uid: str, pool: str) -> Claim:
    """Return the claim with this uid, of which devices are in this node's pool. Raises ClaimError."""
    try:
        return _read(thing, uid, pool)
    except SharingConfigError as error:
        raise ClaimError(str(error)) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ClaimError(f"the claim is not what resource.k8s.io/v1 has: {type(error).__name__} {error}") from error


def grant(claim: Claim, offers: Offers, others: Iterable[PreparedClaim]) -> tuple[PreparedClaim, Sequence[Grant]]:
    """Return the claim as prepared, and a grant for each of its devices, in order. `others` are those prepared before.

    A claim that is among them keeps its shares. Raises ClaimError.
    """
    by_device = {device_name(offer.unit.uuid): (name, offer) for name, each in offers.items() for offer in each}
    kept = {unit.share_id: unit for other in others if other.uid == claim.uid for unit in other.units}
    prepared = PreparedClaim(claim.uid, claim.namespace, claim.name, claim.pods, ())
    rest = [other for other in others if other.uid != claim.uid]
    grants = []
    for result in claim.results:
        resource, offer = _offer(result, by_device)
        before = kept.get(result.share_id)
        if offer.unit.gpu.closed and not before:
            raise ClaimError(
                f"its {offer.unit} is {offer.unit.gpu.closed}; delete the pod and its claim, or wait until the GPU is "
                f"uncordoned"
            )
        shares = before.shares if before else free_shares(offer.unit.uuid, result.shares, [*rest, prepared])
        unit = ClaimedUnit(
            result.share_id, offer.unit.uuid, resource, shares, result.memory, limited=result.config.limited
        )
        grants.append(Grant(result, offer, unit))
        if not result.admin:
            prepared = attrs.evolve(prepared, units=(*prepared.units, unit))
    return prepared, grants


def _read(thing: Mapping[str, Any], uid: str, pool: str) -> Claim:
    metadata, status = thing["metadata"], thing.get("status") or {}
    if metadata["uid"] != uid:
        raise ClaimError(f"it was deleted, and another one (uid {metadata['uid']}) has its name")
    allocation = status.get("allocation")
    if allocation is None:
        raise ClaimError("it is not allocated any more")
    devices = allocation.get("devices") or {}
    results = tuple(_results(devices, pool))
    pods = (each for each in status.get("reservedFor") or () if each.get("resource") == "pods")
    reserved = tuple(Pod(str(each["uid"]), str(each["name"])) for each in pods)
    return Claim(uid, str(metadata["namespace"]), str(metadata["name"]), reserved, results)


def _results(devices: Mapping[str, Any], pool: str) -> Iterator[Result]:
    configs = devices.get("config") or ()
    for each in devices.get("results") or ():
        if each["driver"] != DRIVER:
            continue
        request, device, admin = str(each["request"]), str(each["device"]), bool(each.get("adminAccess"))
        if each["pool"] != pool:
            raise ClaimError(f"its device {device} is in the pool {each['pool']}, and this node's is {pool}")
        share_id, consumed = str(each.get("shareID") or ""), each.get("consumedCapacity") or {}
        if not admin and (not share_id or SHARES not in consumed):
            raise ClaimError(
                f"its device {device} was allocated as a whole and not as shares: the feature gate "
                f"DRAConsumableCapacity is off in the scheduler or the API server"
            )
        yield Result(
            request.partition("/")[0],
            device,
            share_id or device,
            0 if admin else parse_quantity(consumed[SHARES]),
            0 if admin else parse_quantity(consumed.get(MEMORY, "0")),
            admin,
            read_configs(configs, request),
        )


def _offer(result: Result, by_device: Mapping[str, tuple[str, Offer]]) -> tuple[str, Offer]:
    if result.device not in by_device:
        raise ClaimError(
            f"its {label(unit_uuid(result.device))} is gone from this node, or excluded by the -config file; delete "
            f"the pod and its claim where it does not come back"
        )
    resource, offer = by_device[result.device]
    if offer.unit.health is not Health.HEALTHY:
        raise ClaimError(f"its {offer.unit} is unhealthy ({offer.unit.reason})")
    return resource, offer
