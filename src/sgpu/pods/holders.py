"""The containers that have shares, by the kubelet's PodResources API: nothing reports deallocations. Knows no GPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import trio
from purerpc import StatusCode

from sgpu import rpc
from sgpu.api import podresources_pb2
from sgpu.node.container import Container
from sgpu.node.shares import Share

#: Seconds. The kubelet answers from memory.
TIMEOUT: Final = 5.0
#: Bytes of the kubelet's answer, which has every device of every pod: 5 MB were seen, and the kubelet has no limit. It
#: takes three times as much memory while it is read.
MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024
#: What to do where the socket may be another's, or none.
_WHICH_SOCKET: Final = "; -pod-resources-socket has to be the kubelet's"


class PodResourcesError(Exception):
    """The kubelet does not list which container has which share. The message says why and, if known, what to do."""


async def list_holders(socket: Path, resources: Collection[str]) -> Mapping[str, Mapping[Share, Container]]:
    """Return, for each of these resources, the container that has each share. Ids that are no share's are left out.

    Raises PodResourcesError.
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
        hint = f"; it needs Kubernetes 1.20{_WHICH_SOCKET}" if error.code is StatusCode.UNIMPLEMENTED else ""
        raise PodResourcesError(f"the kubelet's List call on {socket} failed: {error}{hint}") from error
    except (OSError, trio.BrokenResourceError, rpc.BrokenPeerError) as error:
        raise PodResourcesError(f"the kubelet does not answer on {socket}: {error}{_WHICH_SOCKET}") from error
    except trio.TooSlowError as error:
        raise PodResourcesError(f"the kubelet did not answer on {socket} within {TIMEOUT:g} s") from error
    held: dict[str, dict[Share, Container]] = {resource: {} for resource in resources}
    for pod in answer.pod_resources:
        for container in pod.containers:
            holder = Container(pod.namespace, pod.name, container.name)  # one for all its shares
            for devices in container.devices:
                if devices.resource_name in held:
                    shares = filter(None, map(Share.parse, devices.device_ids))
                    held[devices.resource_name].update(dict.fromkeys(shares, holder))
    return held
