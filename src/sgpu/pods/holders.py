"""The containers that have devices, by the kubelet's PodResources API: nothing reports deallocations. Knows no GPU."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Final

import attrs
import trio
from purerpc import StatusCode

from sgpu import rpc
from sgpu.api import podresources_pb2
from sgpu.lib.limits import explain
from sgpu.node.claims import PreparedClaim
from sgpu.node.container import Container
from sgpu.node.shares import Share
from sgpu.pods.held import Held, collect

#: Seconds. The kubelet answers from memory.
TIMEOUT: Final = 5.0
#: Bytes of the kubelet's answer, which has every device of every pod: 5 MB were seen, and the kubelet has no limit. It
#: takes three times as much memory while it is read.
MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024
#: What to do where the socket may be another's, or none.
_WHICH_SOCKET: Final = "-pod-resources-socket has to be the kubelet's"

#: A resource, ids of its devices, and the container that has them.
_Devices = tuple[str, Iterable[str], Container]


class PodResourcesError(Exception):
    """The kubelet does not list which container has which share. The message says why and, if known, what to do."""


@asynccontextmanager
async def open_lister(socket: Path) -> AsyncIterator[Lister]:
    """Open what lists holders again and again, over one connection that is made when it is first needed."""
    async with AsyncExitStack() as stack:
        yield Lister(socket, stack)


class Lister:
    """Lists what containers have, from one task. A new connection for each list took most of the daemon's time."""

    def __init__(self, socket: Path, connection: AsyncExitStack) -> None:
        self._socket = socket
        self._connection = connection
        self._channel: rpc.Channel | None = None

    async def list_holders(self, resources: Collection[str], claims: Collection[PreparedClaim] = ()) -> Held:
        """Return what containers have: shares of these resources, and other devices.

        `claims` are those that are prepared: the kubelet lists which containers have them. Raises PodResourcesError.
        """
        socket = self._socket
        try:
            with trio.fail_after(TIMEOUT):
                answer = await self._list()
        except rpc.RpcError as error:
            hint = f"; it needs Kubernetes 1.20; {_WHICH_SOCKET}" if error.code is StatusCode.UNIMPLEMENTED else ""
            raise PodResourcesError(f"the kubelet's List call on {socket} failed: {error}{hint}") from error
        except (OSError, trio.BrokenResourceError, rpc.BrokenPeerError) as error:
            message = f"the kubelet does not answer on {socket}: {explain(error, _WHICH_SOCKET)}"
            raise PodResourcesError(message) from error
        except trio.TooSlowError as error:
            raise PodResourcesError(f"the kubelet did not answer on {socket} within {TIMEOUT:g} s") from error
        resources = {*resources, *(unit.resource for claim in claims for unit in claim.units)}
        held = collect(chain(_claimed(claims), _devices(answer, claims)), resources)
        return attrs.evolve(held, claimants=_claimants(answer, claims))

    async def _list(self) -> podresources_pb2.ListPodResourcesResponse:
        if self._channel is not None:
            try:
                return await self._call(self._channel)
            except (OSError, trio.BrokenResourceError, rpc.BrokenPeerError):
                pass  # that kubelet has ended, and there may be another one
        return await self._call(
            await self._connection.enter_async_context(rpc.open_channel(self._socket, MAX_ANSWER_BYTES))
        )

    async def _call(self, channel: rpc.Channel) -> podresources_pb2.ListPodResourcesResponse:
        """Make the call, and keep the connection if that goes well."""
        self._channel = None
        method, request = "/v1.PodResourcesLister/List", podresources_pb2.ListPodResourcesRequest()
        try:
            answer = await channel.unary(method, request, podresources_pb2.ListPodResourcesResponse)
            self._channel = channel
        finally:
            if self._channel is None:
                await self._connection.aclose()
        return answer


def _claimed(claims: Iterable[PreparedClaim]) -> Iterator[_Devices]:
    """Yield what pods have by claims: containers that start only now are not listed yet, and init containers never."""
    for claim in claims:
        holder = Container(claim.namespace, claim.pods[0].name if claim.pods else f"claim {claim.name}", "")
        for unit in claim.units:
            yield unit.resource, map(str, unit.shares), holder


def _claimants(
    answer: podresources_pb2.ListPodResourcesResponse, claims: Iterable[PreparedClaim]
) -> Mapping[Share, tuple[Container, ...]]:
    """Return all containers that have a share by a claim: those of one pod, or of several that name the same claim."""
    units = {unit.share_id: unit for claim in claims for unit in claim.units}
    found: dict[Share, tuple[Container, ...]] = {}
    for pod in answer.pod_resources if units else ():
        for container in pod.containers:
            for device in (each for dynamic in container.dynamic_resources for each in dynamic.claim_resources):
                for share in units[device.share_id].shares if device.share_id in units else ():
                    found[share] = (*found.get(share, ()), Container(pod.namespace, pod.name, container.name))
    return found


def _devices(answer: podresources_pb2.ListPodResourcesResponse, claims: Iterable[PreparedClaim]) -> Iterator[_Devices]:
    """Yield the devices of each container. Of several that have a device by one claim, it counts for the last."""
    units = {unit.share_id: unit for claim in claims for unit in claim.units}
    for pod in answer.pod_resources:
        for container in pod.containers:
            holder = Container(pod.namespace, pod.name, container.name)  # one for all its devices
            for devices in container.devices:
                yield devices.resource_name, devices.device_ids, holder
            for dynamic in container.dynamic_resources if units else ():
                for device in dynamic.claim_resources:
                    if unit := units.get(device.share_id):
                        yield unit.resource, map(str, unit.shares), holder
