"""The DevicePlugin RPCs. They answer from memory: the kubelet calls them inside pod admission, with no deadline.

Knows nothing of NVML.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import attrs
import trio
from purerpc import StatusCode

from sgpu import allocation, listing, placement
from sgpu.allocation import Allocation, HostPaths, Rules
from sgpu.api import v1alpha_grpc, v1alpha_pb2, v1beta1_grpc, v1beta1_pb2
from sgpu.device import Device
from sgpu.inventory import Inventory
from sgpu.nurseries import race
from sgpu.placement import MultiShare, Placement
from sgpu.record import Registration
from sgpu.rpc import Route, RpcError, routes
from sgpu.usage import Usage

logger = logging.getLogger(__name__)


class Streams:
    """The ListAndWatch streams of one session: how many are open, and the word that they should end.

    They are counted in `registration`, of which one session at a time has any.
    """

    def __init__(self, registration: Registration | None = None) -> None:
        self.ending = trio.Event()
        self._registration = registration or Registration()
        self._changed = trio.Event()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Counts one stream for as long as it is open."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    async def wait_lost(self, grace: float) -> None:
        """Until no stream has been open for `grace` seconds on end."""
        while True:
            changed = self._changed
            if self._registration.streams:
                await changed.wait()
                continue
            with trio.move_on_after(grace) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                return

    def _count(self, difference: int) -> None:
        self._registration.streams += difference
        self._changed.set()
        self._changed = trio.Event()


@attrs.frozen
class Offer:
    """One resource, and what decides who gets which part of it."""

    inventory: Inventory
    usage: Usage
    paths: HostPaths
    placement: Placement
    multi_share: MultiShare
    rules: Rules


class DevicePlugin(v1beta1_grpc.DevicePluginServicer):
    """`v1beta1.DevicePlugin`, Kubernetes 1.10 and later."""

    def __init__(self, offer: Offer, streams: Streams) -> None:
        self._offer = offer
        self._streams = streams

    def GetDevicePluginOptions(  # type: ignore[override]  # purerpc's base waits
        self, _: v1beta1_pb2.Empty
    ) -> v1beta1_pb2.DevicePluginOptions:
        return options()

    async def ListAndWatch(  # type: ignore[override]  # purerpc's base declares no generator
        self, _: v1beta1_pb2.Empty
    ) -> AsyncGenerator[v1beta1_pb2.ListAndWatchResponse, None]:
        async with aclosing(_watch(self._offer.inventory, self._streams)) as changes:
            async for devices in changes:
                yield listing.v1beta1_list(devices)

    def GetPreferredAllocation(  # type: ignore[override]  # purerpc's base waits
        self, request: v1beta1_pb2.PreferredAllocationRequest
    ) -> v1beta1_pb2.PreferredAllocationResponse:
        offer = self._offer
        loads = offer.usage.loads(offer.inventory.devices, trio.current_time())
        response = v1beta1_pb2.PreferredAllocationResponse()
        for container in request.container_requests:
            chosen = placement.preferred(
                container.available_deviceIDs,
                container.must_include_deviceIDs,
                container.allocation_size,
                loads,
                offer.placement,
                offer.multi_share,
            )
            response.container_responses.add(deviceIDs=chosen)
        return response

    def Allocate(  # type: ignore[override]  # purerpc's base waits
        self, request: v1beta1_pb2.AllocateRequest
    ) -> v1beta1_pb2.AllocateResponse:
        response = v1beta1_pb2.AllocateResponse()
        for container in request.container_requests:
            allocated = _allocate(self._offer, container.devices_ids)
            response.container_responses.append(
                v1beta1_pb2.ContainerAllocateResponse(**_fields(v1beta1_pb2, allocated, self._offer.paths))
            )
        return response

    def PreStartContainer(  # type: ignore[override]  # purerpc's base waits
        self, _: v1beta1_pb2.PreStartContainerRequest
    ) -> v1beta1_pb2.PreStartContainerResponse:
        return v1beta1_pb2.PreStartContainerResponse()


class AlphaDevicePlugin(v1alpha_grpc.DevicePluginServicer):
    """`deviceplugin.DevicePlugin`, Kubernetes 1.8 and 1.9: no options, one container a request."""

    def __init__(self, offer: Offer, streams: Streams) -> None:
        self._offer = offer
        self._streams = streams

    async def ListAndWatch(  # type: ignore[override]  # purerpc's base declares no generator
        self, _: v1alpha_pb2.Empty
    ) -> AsyncGenerator[v1alpha_pb2.ListAndWatchResponse, None]:
        async with aclosing(_watch(self._offer.inventory, self._streams)) as changes:
            async for devices in changes:
                yield listing.v1alpha_list(devices)

    def Allocate(  # type: ignore[override]  # purerpc's base waits
        self, request: v1alpha_pb2.AllocateRequest
    ) -> v1alpha_pb2.AllocateResponse:
        allocated = _allocate(self._offer, request.devicesIDs)
        return v1alpha_pb2.AllocateResponse(**_fields(v1alpha_pb2, allocated, self._offer.paths))


def options() -> v1beta1_pb2.DevicePluginOptions:
    """What the kubelet should know: said at registration for old kubelets, and when asked for new ones."""
    return v1beta1_pb2.DevicePluginOptions(get_preferred_allocation_available=True)


def plugin_routes(offer: Offer, streams: Streams) -> Mapping[str, Route]:
    """Both versions of the API, to be served on one socket."""
    servicers = (DevicePlugin(offer, streams), AlphaDevicePlugin(offer, streams))
    return routes(servicer.service for servicer in servicers)


async def _watch(inventory: Inventory, streams: Streams) -> AsyncGenerator[Sequence[Device], None]:
    """The devices, now and after each change that the kubelet can see, until the session ends.

    A slow reader gets the latest, not each.
    """
    with streams.opened():
        sent: tuple[object, ...] | None = None
        while not streams.ending.is_set():
            changed = inventory.changed
            if sent != (sent := listing.content(inventory.devices)):
                yield inventory.devices
            await race(changed.wait, streams.ending.wait)


def _allocate(offer: Offer, share_ids: Sequence[str]) -> Allocation:
    try:
        allocated = allocation.allocate(offer.inventory, share_ids, offer.rules)
    except allocation.UnknownShareError as error:
        raise _refusal(StatusCode.NOT_FOUND, error) from error
    except (allocation.UnhealthyShareError, allocation.NotDistinctError) as error:
        raise _refusal(StatusCode.FAILED_PRECONDITION, error) from error
    for share_id in share_ids:
        if device := offer.inventory.find(share_id):
            offer.usage.recent.give(device, share_id, trio.current_time())
    offer.inventory.give(share_ids)
    logger.debug("allocated %s", ", ".join(share_ids))
    return allocated


def _refusal(code: StatusCode, error: Exception) -> RpcError:
    logger.warning("refused an allocation: %s", error)
    return RpcError(code, str(error))


def _fields(api: Any, allocated: Allocation, paths: HostPaths) -> dict[str, Any]:  # noqa: ANN401  # a module of messages
    """The fields that an allocation's answer has in both versions of the API."""
    mount = api.Mount(host_path=str(paths.libraries), container_path=str(paths.libraries_in_container), read_only=True)
    return {
        "envs": allocated.environment,
        "mounts": [mount] if allocated.libraries else [],
        "devices": [
            api.DeviceSpec(
                host_path=os.path.join(paths.devices, node), container_path=f"/dev/{node}", permissions="mrw"
            )
            for node in allocated.device_nodes
        ],
    }
