"""The containers that have devices, by the kubelet's PodResources API: nothing reports deallocations. Knows no GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

import trio
from purerpc import StatusCode

from sgpu import rpc
from sgpu.api import podresources_pb2
from sgpu.lib.limits import explain
from sgpu.node.container import Container
from sgpu.pods.held import Held, collect

#: Seconds. The kubelet answers from memory.
TIMEOUT: Final = 5.0
#: Bytes of the kubelet's answer, which has every device of every pod: 5 MB were seen, and the kubelet has no limit. It
#: takes three times as much memory while it is read.
MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024
#: What to do where the socket may be another's, or none.
_WHICH_SOCKET: Final = "-pod-resources-socket has to be the kubelet's"


class PodResourcesError(Exception):
    """The kubelet does not list which container has which share. The message says why and, if known, what to do."""


async def list_holders(socket: Path, resources: Collection[str]) -> Held:
    """Return what containers have: shares of these resources, and other devices. Raises PodResourcesError."""
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
    return collect(_devices(answer), resources)


def _devices(answer: podresources_pb2.ListPodResourcesResponse) -> Iterator[tuple[str, Iterable[str], Container]]:
    for pod in answer.pod_resources:
        for container in pod.containers:
            holder = Container(pod.namespace, pod.name, container.name)  # one for all its devices
            for devices in container.devices:
                yield devices.resource_name, devices.device_ids, holder
