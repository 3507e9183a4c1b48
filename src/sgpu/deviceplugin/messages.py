"""Offers → what `ListAndWatch` sends, edits → what `Allocate` answers. Pure: knows neither trio, nor NVML."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import attrs

from sgpu.api import v1alpha_pb2, v1beta1_pb2
from sgpu.node.edits import ContainerEdits
from sgpu.node.gpu import Health
from sgpu.node.offers import Offer
from sgpu.node.policy import OffersRefusedError
from sgpu.node.shares import Share, suffixes
from sgpu.rpc import MAX_MESSAGE_BYTES

#: What a container may do with a device node: read, write, make it.
_PERMISSIONS: Final = "mrw"


class TooManySharesError(OffersRefusedError):
    """The list of all shares would be larger than the message that the kubelet accepts."""


def v1beta1_list(offers: Sequence[Offer]) -> bytes:
    """Return the ListAndWatchResponse with every share of every unit, healthy or not.

    One that vanished would read as healthy in a pod's status.
    """
    return _list(v1beta1_pb2, offers, _topology)


def v1alpha_list(offers: Sequence[Offer]) -> bytes:
    """Return the same for the kubelets that know no topology."""
    return _list(v1alpha_pb2, offers, lambda _: {})


def _list(api: Any, offers: Sequence[Offer], more: Callable[[Offer], Mapping[str, Any]]) -> bytes:  # noqa: ANN401
    # Not a message for each of thousands of shares: a repeated field is the concatenation of its entries, and those of
    # a unit differ only in the number of the share, as long as it has as many digits.
    endings = [ending.encode() for ending in suffixes(max((offer.shares for offer in offers), default=0))]
    return b"".join(
        _entries(api, offer.unit.uuid, list(alike), health, more(offer))
        for offer in offers
        for health, some in _by_health(offer, endings).items()
        for _, alike in groupby(some, len)
    )


def _by_health(offer: Offer, endings: Sequence[bytes]) -> Mapping[Health, Sequence[bytes]]:
    """Return how the ids of an offer's shares end, in order."""
    own = [*endings[: offer.shares], *(_ending(offer, number) for number in offer.retained)]
    if not offer.withheld:
        return {offer.unit.health: own}
    found = defaultdict(list)
    for ending, health in zip(own, offer.share_health(), strict=True):
        found[health].append(ending)
    return found


def _ending(offer: Offer, number: int) -> bytes:
    return str(Share(offer.unit.uuid, number)).removeprefix(offer.unit.uuid).encode()


def _entries(api: Any, uuid: str, endings: Sequence[bytes], health: Health, more: Mapping[str, Any]) -> bytes:  # noqa: ANN401
    """Return the entries of the shares whose ids end so, all of them as long."""
    first = uuid.encode() + endings[0]
    device = api.Device(ID=first, health=health.value, **more)
    before, _, after = api.ListAndWatchResponse(devices=[device]).SerializeToString().partition(first)
    before += uuid.encode()
    return b"".join((before, (after + before).join(endings), after))


def content(offers: Sequence[Offer]) -> tuple[object, ...]:
    """Return what the lists above depend on, to compare: another list is only sent when it differs."""
    return tuple(
        (offer.unit.uuid, offer.shares, offer.retained, offer.unit.gpu.numa_node, offer.unit.health, offer.withheld)
        if offer.unit.health is Health.HEALTHY
        else (offer.unit.uuid, offer.shares, offer.retained, offer.unit.gpu.numa_node, offer.unit.health)
        for offer in offers
    )


def allocate_fields(api: Any, edits: ContainerEdits) -> dict[str, Any]:  # noqa: ANN401  # a module of messages
    """Return the fields that `Allocate`'s answer for one container has in both versions of the API."""
    return {
        "envs": edits.environment,
        "mounts": [
            api.Mount(host_path=mount.host_path, container_path=mount.container_path, read_only=True)
            for mount in edits.mounts
        ],
        "devices": [
            api.DeviceSpec(host_path=node.host_path, container_path=node.container_path, permissions=_PERMISSIONS)
            for node in edits.device_nodes
        ],
    }


def check_size(offers: Sequence[Offer]) -> None:
    """Raise TooManySharesError when the list, with every share unhealthy (the longer word), would not fit."""
    if list_bytes(offers) <= MAX_MESSAGE_BYTES:
        return
    shares = max(offer.shares for offer in offers)
    fits = bisect.bisect_right(range(shares), MAX_MESSAGE_BYTES, key=lambda factor: _bytes_at(offers, factor)) - 1
    total = sum(offer.shares for offer in offers)
    raise TooManySharesError(
        f"{total} shares on {len(offers)} GPU(s) do not fit the kubelet's message of {MAX_MESSAGE_BYTES} bytes: "
        f"at most {max(fits, 0)} shares of each GPU fit; lower -gpu-duplication-factor, or `shares` in the -config file"
    )


def list_bytes(offers: Sequence[Offer]) -> int:
    """Return the size of `v1beta1_list` in bytes with every share unhealthy, without building it."""
    return sum(_offer_bytes(offer) for offer in offers)


def _bytes_at(offers: Sequence[Offer], factor: int) -> int:
    return list_bytes([attrs.evolve(offer, shares=min(factor, offer.shares)) for offer in offers])


def _offer_bytes(offer: Offer) -> int:
    # Entries differ only in how many digits the share's number has.
    size, first, digits = 0, 0, 1
    while first < offer.shares:
        end = min(10**digits, offer.shares)
        size += (end - first) * _entry_bytes(offer, first)
        first, digits = end, digits + 1
    retained = Counter(len(str(number)) for number in offer.retained)
    return size + sum(count * _entry_bytes(offer, 10 ** (digits - 1)) for digits, count in retained.items())


def _entry_bytes(offer: Offer, number: int) -> int:
    unhealthy = Health.UNHEALTHY  # the longer word
    return len(_entries(v1beta1_pb2, offer.unit.uuid, [_ending(offer, number)], unhealthy, _topology(offer)))


def _topology(offer: Offer) -> Mapping[str, Any]:
    numa_node = offer.unit.gpu.numa_node
    if numa_node is None:
        return {}
    return {"topology": v1beta1_pb2.TopologyInfo(nodes=[v1beta1_pb2.NUMANode(ID=numa_node)])}
