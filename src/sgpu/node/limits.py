"""The memory that a container may use of a unit, and the cgroups that are limited to it. Pure.

Knows neither NVML, nor file systems, nor trio.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import attrs

from sgpu.lib.sizes import MIB
from sgpu.node.cgroup_limit import Target
from sgpu.node.container import Container
from sgpu.node.offers import Offer
from sgpu.node.shares import Share

#: Limits are multiples of it, so that the driver has nothing to round.
STEP: Final = MIB
#: No claim names an amount.
NOTHING: Final[Mapping[Share, int]] = {}


@attrs.frozen
class PodCgroups:
    """A pod's cgroup directory, and those of its containers by container id. The pause container's is among them."""

    uid: str
    directory: str
    containers: Mapping[str, str] = attrs.Factory(dict)


@attrs.frozen
class WantedLimits:
    """Bytes by cgroup and GPU; the container that each cgroup is of, where that is known; and by share the directories
    of the pods that have it: several, where they name one claim.
    """

    hard: Mapping[Target, int] = attrs.Factory(dict)
    containers: Mapping[Target, Container] = attrs.Factory(dict)
    pods: Mapping[Share, tuple[str, ...]] = attrs.Factory(dict)


def allowed_memory(offer: Offer, shares: int, promised: int = 0) -> int | None:
    """Return the bytes that a container with that many shares of a unit may use, at most all; None where unknown.

    `promised` are bytes that it has in addition, of claims that name an amount. Without limits it is the fair part,
    which nobody enforces. It is unknown of a unit that is no longer there.
    """
    usable = offer.unit.memory_bytes
    if usable is None or offer.unit.gone:
        return None
    return min(int(usable * shares * (offer.limit_factor or 1)) // offer.shares + promised, usable)


def allowed_by_container(
    offers: Iterable[Offer], holders: Mapping[Share, Container], promised: Mapping[Share, int] = NOTHING
) -> Mapping[str, Mapping[Container, int]]:
    """Return what each container that has shares may use, in bytes, by the unit's UUID. Left out where unknown.

    `promised`: bytes by share, of claims that name an amount.
    """
    shares: defaultdict[Container, list[Share]] = defaultdict(list)
    for share, container in holders.items():
        shares[container].append(share)
    offer_of = {offer.unit.uuid: offer for offer in offers}
    allowed: dict[str, dict[Container, int]] = {}
    for container, each in shares.items():
        for uuid, known in _allowed(offer_of, promised, each).items():
            allowed.setdefault(uuid, {})[container] = known
    return allowed


def pod_limits(
    offers: Iterable[Offer],
    pod: PodCgroups,
    shares: Mapping[str, Collection[Share]],
    names: Mapping[str, Container],
    promised: Mapping[Share, int] = NOTHING,
) -> WantedLimits:
    """Return the limits of the cgroups of a pod that has shares of units with limits.

    `shares` has what each container has, by the container's name; `names` the containers by id; `promised` bytes by
    share, of claims that name an amount. A pod may use what its containers may use together: that holds before a
    container exists. A container whose name is not known yet may use as much as any of the pod's.
    """
    limited = {offer.unit.uuid: offer for offer in offers if offer.limit_factor}
    of_pod = {share for each in shares.values() for share in each}
    hard = dict(_limits(pod.directory, [_allowed(limited, promised, of_pod)]))
    containers: dict[Target, Container] = {}
    for container_id, directory in pod.containers.items():
        container = names.get(container_id)
        known = container is not None and container.container in shares
        possible = [shares[container.container]] if container and known else list(shares.values())
        made = _limits(directory, [_allowed(limited, promised, each) for each in possible])
        hard.update(made)
        if container and known:
            containers.update(dict.fromkeys(made, container))
    return WantedLimits(hard, containers, dict.fromkeys(of_pod, (pod.directory,)))


def merged(limits: Iterable[WantedLimits]) -> WantedLimits:
    """Return the limits of several pods together."""
    hard: dict[Target, int] = {}
    containers: dict[Target, Container] = {}
    pods: dict[Share, tuple[str, ...]] = {}
    for each in limits:
        hard.update(each.hard)
        containers.update(each.containers)
        for share, directories in each.pods.items():
            pods[share] = (*pods.get(share, ()), *directories)
    return WantedLimits(hard, containers, pods)


def _allowed(offers: Mapping[str, Offer], promised: Mapping[Share, int], shares: Iterable[Share]) -> Mapping[str, int]:
    """Return the bytes that whoever has these shares may use, by UUID of the units that are known."""
    by_unit: defaultdict[str, set[Share]] = defaultdict(set)
    for share in shares:
        by_unit[share.uuid].add(share)
    allowed = {}
    for uuid, each in by_unit.items():
        fair = sum(share not in promised for share in each)
        part = sum(promised.get(share, 0) for share in each)
        known = allowed_memory(offers[uuid], fair, part) if uuid in offers else None
        if known is not None:
            allowed[uuid] = known
    return allowed


def _limits(directory: str, possible: Iterable[Mapping[str, int]]) -> Mapping[Target, int]:
    """Return the limits of a cgroup, each the most that one of these containers may use."""
    most: dict[str, int] = {}
    for each in possible:
        for uuid, allowed in each.items():
            most[uuid] = max(most.get(uuid, 0), allowed)
    return {Target(uuid, directory): max(allowed // STEP, 1) * STEP for uuid, allowed in most.items()}
