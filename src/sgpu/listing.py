"""Devices → what `ListAndWatch` sends. Pure: knows neither trio, nor purerpc, nor NVML."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence

import attrs

from sgpu.api import v1alpha_pb2, v1beta1_pb2
from sgpu.device import SEPARATOR, Device, Health
from sgpu.rpc import MAX_MESSAGE_BYTES


class TooManySharesError(Exception):
    """The list of all shares would be larger than the message that the kubelet accepts."""


def v1beta1_list(devices: Sequence[Device]) -> v1beta1_pb2.ListAndWatchResponse:
    """Every share of every GPU, healthy or not: one that vanished would read as healthy in a pod's status."""
    response = v1beta1_pb2.ListAndWatchResponse()
    for device in devices:
        topology = _topology(device)
        for share_id, health in zip(device.share_ids(), device.share_health(), strict=True):
            response.devices.add(ID=share_id, health=health.value, topology=topology)
    return response


def v1alpha_list(devices: Sequence[Device]) -> v1alpha_pb2.ListAndWatchResponse:
    """The same for the kubelets that know no topology."""
    response = v1alpha_pb2.ListAndWatchResponse()
    for device in devices:
        for share_id, health in zip(device.share_ids(), device.share_health(), strict=True):
            response.devices.add(ID=share_id, health=health.value)
    return response


def content(devices: Sequence[Device]) -> tuple[object, ...]:
    """What the lists above say, to tell whether another one would be news to the kubelet."""
    return tuple(
        (device.uuid, device.shares, device.kept, device.numa_node, device.health, device.withheld)
        if device.health is Health.HEALTHY
        else (device.uuid, device.shares, device.kept, device.numa_node, device.health)
        for device in devices
    )


def check_size(devices: Sequence[Device]) -> None:
    """Raise TooManySharesError when the list, with every share unhealthy (the longer word), would not fit."""
    if list_bytes(devices) <= MAX_MESSAGE_BYTES:
        return
    shares = max(device.shares for device in devices)
    fits = bisect.bisect_right(range(shares), MAX_MESSAGE_BYTES, key=lambda factor: _bytes_at(devices, factor)) - 1
    total = sum(device.shares for device in devices)
    raise TooManySharesError(
        f"{total} shares on {len(devices)} GPU(s) do not fit the kubelet's message of {MAX_MESSAGE_BYTES} bytes: "
        f"-gpu-duplication-factor can be at most {fits} here"
    )


def list_bytes(devices: Sequence[Device]) -> int:
    """Size of `v1beta1_list` in bytes with every share unhealthy, without building it."""
    return sum(_device_bytes(device) for device in devices)


def _bytes_at(devices: Sequence[Device], factor: int) -> int:
    return list_bytes([attrs.evolve(device, shares=min(factor, device.shares)) for device in devices])


def _device_bytes(device: Device) -> int:
    # Entries differ only in how many digits the share's number has.
    size, first, digits = 0, 0, 1
    while first < device.shares:
        end = min(10**digits, device.shares)
        size += (end - first) * _entry_bytes(device, first)
        first, digits = end, digits + 1
    kept = Counter(len(str(number)) for number in device.kept)
    return size + sum(count * _entry_bytes(device, 10 ** (digits - 1)) for digits, count in kept.items())


def _entry_bytes(device: Device, number: int) -> int:
    health = Health.UNHEALTHY.value  # the longer word
    entry = v1beta1_pb2.Device(ID=f"{device.uuid}{SEPARATOR}{number}", health=health, topology=_topology(device))
    return v1beta1_pb2.ListAndWatchResponse(devices=[entry]).ByteSize()


def _topology(device: Device) -> v1beta1_pb2.TopologyInfo | None:
    if device.numa_node is None:
        return None
    return v1beta1_pb2.TopologyInfo(nodes=[v1beta1_pb2.NUMANode(ID=device.numa_node)])
