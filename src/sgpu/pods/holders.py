"""The containers that have devices, by the kubelet's PodResources API: nothing reports deallocations. Knows no GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

import trio
from purerpc import StatusCode

from sgpu import rpc
from sgpu.api import podresources_pb2
from sgpu.lib.limits import explain
from sgpu.node.claims import PreparedClaim
from sgpu.node.container import Container
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


async def list_holders(socket: Path, resources: Collection[str], claims: Collection[PreparedClaim] = ()) -> Held:
    """Return what containers have: shares of these resources, and other devices.

    `claims` are those that are prepared: the kubelet lists which containers have them. Raises PodResourcesError.
    """
    try:
        with trio.fail_after(TIMEOUT):
            answer = await rpc.unary_call(
                socket,
                "/v1.PodResourcesLister/List",
                podresources_pb2.ListPodResourcesRequest(),
                podresources_pb2.ListPodResourcesResponse,
                MAX_ANSWER_BYTES,
            )
    except rpc.RpcError as error:
        hint = f"; it needs Kubernetes 1.20; {_WHICH_SOCKET}" if error.code is StatusCode.UNIMPLEMENTED else ""
        raise PodResourcesError(f"the kubelet's List call on {socket} failed: {error}{hint}") from error
    except (OSError, trio.BrokenResourceError, rpc.BrokenPeerError) as error:
        raise PodResourcesError(f"the kubelet does not answer on {socket}: {explain(error, _WHICH_SOCKET)}") from error
    except trio.TooSlowError as error:
        raise PodResourcesError(f"the kubelet did not answer on {socket} within {TIMEOUT:g} s") from error
    resources = {*resources, *(unit.resource for claim in claims for unit in claim.units)}
    return collect(chain(_claimed(claims), _devices(answer, claims)), resources)


def _claimed(claims: Iterable[PreparedClaim]) -> Iterator[_Devices]:
    """Yield what pods have by claims: containers that start only now are not listed yet, and init containers never."""
    for claim in claims:
        holder = Container(claim.namespace, claim.pods[0].name if claim.pods else f"claim {claim.name}", "")
        for unit in claim.units:
            yield unit.resource, map(str, unit.shares), holder


def _devices(answer: podresources_pb2.ListPodResourcesResponse, claims: Iterable[PreparedClaim]) -> Iterator[_Devices]:
    """Yield the devices of each container. Of several that have a device by one claim, it counts for the last."""
    units = {unit.share_id: unit for claim in claims for unit in claim.units}
    for pod in answer.pod_resources:
        for container in pod.containers:
            holder = Container(pod.namespace, pod.name, container.name)  # one for all its devices
            for devices in container.devices:
                yield devices.resource_name, devices.device_ids, holder
            for device in (each for dynamic in container.dynamic_resources for each in dynamic.claim_resources):
                if unit := units.get(device.share_id):
                    yield unit.resource, map(str, unit.shares), holder
