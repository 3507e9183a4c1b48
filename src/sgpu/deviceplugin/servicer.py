"""The DevicePlugin RPCs. They answer from memory: the kubelet calls them inside pod admission, with no deadline.

Knows nothing of NVML.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager

import attrs
import trio
from purerpc import StatusCode

from sgpu.api import v1alpha_grpc, v1alpha_pb2, v1beta1_grpc, v1beta1_pb2
from sgpu.deviceplugin import messages
from sgpu.deviceplugin.preferred import preferred
from sgpu.deviceplugin.prestart import wait_limited
from sgpu.lib.concurrency import Broadcast, race, wait_until
from sgpu.node.edits import AllocationError, AllocationOptions, ContainerEdits, UnknownShareError
from sgpu.node.offers import Offer
from sgpu.node.state import NodeState
from sgpu.observe.registrations import Registration
from sgpu.rpc import Route, RpcError, routes

logger = logging.getLogger(__name__)


class Streams:
    """The ListAndWatch streams of one session after the other: how many are open, and when they should end.

    They are counted in `registration`. One session at a time has any. `asked`: the kubelet asked for our options, as
    from 1.25 on; `refusing`: it gets none any more, so that a registration fails.
    """

    def __init__(self, registration: Registration | None = None) -> None:
        self._changed = Broadcast()
        self.begin(registration or Registration())

    def begin(self, registration: Registration) -> None:
        """Begin a session. Those of the one before are closed by now."""
        self.ending = trio.Event()
        self.asked = False
        self.refusing = False
        self._registration = registration

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Count one stream for as long as it is open."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    async def wait_dropped(self) -> None:
        """Wait until a stream was open, and none is any more."""
        await wait_until(lambda: self._registration.streams > 0, self._changed)
        await wait_until(lambda: self._registration.streams == 0, self._changed)

    async def wait_lost(self, grace: float) -> None:
        """Wait until no stream has been open for `grace` seconds on end."""
        while True:
            changed = self._changed.next
            if self._registration.streams:
                await changed.wait()
                continue
            with trio.move_on_after(grace) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                return

    def _count(self, difference: int) -> None:
        self._registration.streams += difference
        self._changed.notify()
        self._registration.changed.notify()


@attrs.frozen
class PluginContext:
    """One resource of the node, and what its containers get."""

    node: NodeState
    resource: str
    options: AllocationOptions


class DevicePlugin(v1beta1_grpc.DevicePluginServicer):
    """`v1beta1.DevicePlugin`, Kubernetes 1.10 and later."""

    def __init__(self, context: PluginContext, streams: Streams) -> None:
        self._context = context
        self._streams = streams

    def GetDevicePluginOptions(  # type: ignore[override]  # purerpc's base waits
        self, _: v1beta1_pb2.Empty
    ) -> v1beta1_pb2.DevicePluginOptions:
        self._streams.asked = True
        if self._streams.refusing:
            raise RpcError(StatusCode.UNAVAILABLE, "this plugin hands over to another one")
        return options(self._context)

    async def ListAndWatch(  # type: ignore[override]  # purerpc's base declares no generator
        self, _: v1beta1_pb2.Empty
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(_watch(self._context, self._streams)) as changes:
            async for offers in changes:
                yield messages.v1beta1_list(offers)

    def GetPreferredAllocation(  # type: ignore[override]  # purerpc's base waits
        self, request: v1beta1_pb2.PreferredAllocationRequest
    ) -> v1beta1_pb2.PreferredAllocationResponse:
        context = self._context
        loads = context.node.loads(context.resource)
        response = v1beta1_pb2.PreferredAllocationResponse()
        for container in request.container_requests:
            chosen = preferred(
                container.available_deviceIDs,
                container.must_include_deviceIDs,
                container.allocation_size,
                loads,
                context.options.placement,
                context.options.multi_share,
            )
            response.container_responses.add(deviceIDs=chosen)
        return response

    def Allocate(  # type: ignore[override]  # purerpc's base waits
        self, request: v1beta1_pb2.AllocateRequest
    ) -> v1beta1_pb2.AllocateResponse:
        response = v1beta1_pb2.AllocateResponse()
        for edits in _allocate(self._context, [container.devices_ids for container in request.container_requests]):
            fields = messages.allocate_fields(v1beta1_pb2, edits)
            response.container_responses.append(v1beta1_pb2.ContainerAllocateResponse(**fields))
        return response

    async def PreStartContainer(
        self, request: v1beta1_pb2.PreStartContainerRequest
    ) -> v1beta1_pb2.PreStartContainerResponse:
        context = self._context
        ids, fail_open = request.devices_ids, context.options.limits_fail_open
        await wait_limited(context.node, context.resource, ids, fail_open=fail_open)
        return v1beta1_pb2.PreStartContainerResponse()


class AlphaDevicePlugin(v1alpha_grpc.DevicePluginServicer):
    """`deviceplugin.DevicePlugin`, Kubernetes 1.8 and 1.9: no options, one container a request."""

    def __init__(self, context: PluginContext, streams: Streams) -> None:
        self._context = context
        self._streams = streams

    async def ListAndWatch(  # type: ignore[override]  # purerpc's base declares no generator
        self, _: v1alpha_pb2.Empty
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(_watch(self._context, self._streams)) as changes:
            async for offers in changes:
                yield messages.v1alpha_list(offers)

    def Allocate(  # type: ignore[override]  # purerpc's base waits
        self, request: v1alpha_pb2.AllocateRequest
    ) -> v1alpha_pb2.AllocateResponse:
        (edits,) = _allocate(self._context, [request.devicesIDs])
        return v1alpha_pb2.AllocateResponse(**messages.allocate_fields(v1alpha_pb2, edits))


def has_limits(context: PluginContext) -> bool:
    """Return whether some share of the resource has a memory limit."""
    return any(offer.limit_factor for offer in context.node.offered(context.resource))


def options(context: PluginContext) -> v1beta1_pb2.DevicePluginOptions:
    """Return what the kubelet should call. Old kubelets read it in the registration, new ones ask for it.

    PreStartContainer has a price: while sgpu is away, containers with shares wait for it to start.
    """
    return v1beta1_pb2.DevicePluginOptions(
        get_preferred_allocation_available=True, pre_start_required=has_limits(context)
    )


def plugin_routes(context: PluginContext, streams: Streams) -> Mapping[str, Route]:
    """Return the methods of both versions of the API, to be served on one socket."""
    servicers = (DevicePlugin(context, streams), AlphaDevicePlugin(context, streams))
    return routes(servicer.service for servicer in servicers)


async def _watch(context: PluginContext, streams: Streams) -> AsyncGenerator[Sequence[Offer], None]:
    """Yield the offers, now and after each change that the kubelet can see, until the session ends.

    A slow reader gets the latest, not each.
    """
    with streams.opened():
        sent: tuple[object, ...] | None = None
        while not streams.ending.is_set():
            changed = context.node.changed.next
            offers = context.node.offered(context.resource)
            if sent != (sent := messages.content(offers)):
                yield offers
            await race(changed.wait, streams.ending.wait)


def _allocate(context: PluginContext, containers: Sequence[Sequence[str]]) -> list[ContainerEdits]:
    try:
        edits = context.node.allocate(context.resource, containers, context.options)
    except AllocationError as error:
        logger.warning("refused an allocation: %s", error)
        unknown = isinstance(error, UnknownShareError)
        raise RpcError(StatusCode.NOT_FOUND if unknown else StatusCode.FAILED_PRECONDITION, str(error)) from error
    logger.debug("allocated %s", ", ".join(share_id for share_ids in containers for share_id in share_ids))
    return edits
