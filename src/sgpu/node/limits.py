"""The memory that a container may use of a unit, and the cgroups that are limited to it. Pure.

Knows neither NVML, nor file systems, nor trio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

import attrs

from sgpu.lib.sizes import MIB
from sgpu.node.cgroup_limit import Target
from sgpu.node.container import Container
from sgpu.node.offers import Offer
from sgpu.node.shares import Share

#: Limits are multiples of it, so that the driver has nothing to round.
STEP: Final = MIB


@attrs.frozen
class PodCgroups:
    """A pod's cgroup directory, and those of its containers by container id. The pause container's is among them."""

    uid: str
    directory: str
    containers: Mapping[str, str] = attrs.Factory(dict)


@attrs.frozen
class WantedLimits:
    """Bytes by cgroup and GPU; the container that each cgroup is of, where that is known; and by share the directory of
    the pod that has it.
    """

    hard: Mapping[Target, int] = attrs.Factory(dict)
    containers: Mapping[Target, Container] = attrs.Factory(dict)
    pods: Mapping[Share, str] = attrs.Factory(dict)


def allowed_memory(offer: Offer, shares: int) -> int | None:
    """Return the bytes that a container with that many shares of a unit may use, at most all; None where unknown.

    Without limits it is the fair part, which nobody enforces. It is unknown of a unit that is no longer there.
    """
    usable = offer.unit.memory_bytes
    if usable is None or offer.unit.gone:
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


def wanted_limits(
    offers: Iterable[Offer],
    pods: Iterable[PodCgroups],
    shares: Mapping[str, Mapping[str, Collection[Share]]],
    names: Mapping[str, Container],
) -> WantedLimits:
    """Return the limits of all cgroups of pods that have shares of units with limits.

    `shares` has what each container has, by the pod's uid and the container's name; `names` the containers by id. A pod
    may use what its containers may use together: that holds before a container exists. A container whose name is not
    known yet may use as much as any of the pod's.
    """
    limited = {offer.unit.uuid: offer for offer in offers if offer.limit_factor}
    hard: dict[Target, int] = {}
    containers: dict[Target, Container] = {}
    pod_of: dict[Share, str] = {}
    for pod in pods:
        shares_of = shares.get(pod.uid, {})
        of_pod = {share for each in shares_of.values() for share in each}
        pod_of.update(dict.fromkeys(of_pod, pod.directory))
        for uuid, count in _counts(of_pod).items():
            hard.update(_limit(limited, uuid, count, pod.directory))
        for container_id, directory in pod.containers.items():
            container = names.get(container_id)
            known = container is not None and container.container in shares_of
            possible = [shares_of[container.container]] if container and known else list(shares_of.values())
            for uuid, count in _most(possible).items():
                made = _limit(limited, uuid, count, directory)
                hard.update(made)
                if container and known:
                    containers.update(dict.fromkeys(made, container))
    return WantedLimits(hard, containers, pod_of)


def _limit(limited: Mapping[str, Offer], uuid: str, count: int, directory: str) -> Mapping[Target, int]:
    allowed = allowed_memory(limited[uuid], count) if uuid in limited else None
    return {} if allowed is None else {Target(uuid, directory): max(allowed // STEP, 1) * STEP}


def _counts(shares: Iterable[Share]) -> Counter[str]:
    return Counter(share.uuid for share in set(shares))


def _most(possible: Iterable[Collection[Share]]) -> Mapping[str, int]:
    """Return the most shares that one of these containers has of each unit, by UUID."""
    most: dict[str, int] = {}
    for uuid, count in _each_count(possible):
        most[uuid] = max(most.get(uuid, 0), count)
    return most


def _each_count(possible: Iterable[Collection[Share]]) -> Iterator[tuple[str, int]]:
    for shares in possible:
        yield from _counts(shares).items()
