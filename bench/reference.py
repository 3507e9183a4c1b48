"""A device plugin that does nothing but answer, on grpcio, whose protocol is C: what others' figures are held against.

The same messages in the same sizes, from a table made beforehand. It registers again with a kubelet that has restarted,
and belongs to no project.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from itertools import count
from pathlib import Path
from typing import Any, Final

import grpc
import inotify_simple

from sgpu.api import v1beta1_pb2

#: A new one for each server: grpcio removes the name of one that stops.
ENDPOINT: Final = "reference{}.sock"
NODES: Final = ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
ENVIRONMENT: Final = {
    "SGPU_SHARES": "1",
    "SGPU_MEMORY_BYTES": "161061273",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class Plugin:
    """`v1beta1.DevicePlugin` of so many devices."""

    def __init__(self, gpus: int, shares: int) -> None:
        uuids = [f"GPU-00000000-0000-0000-0000-{gpu:012}" for gpu in range(gpus)]
        self._list = v1beta1_pb2.ListAndWatchResponse()
        for uuid in uuids:
            for share in range(shares):
                self._list.devices.add(ID=f"{uuid}::{share}", health="Healthy")

    def options(self, request: Any, context: grpc.ServicerContext) -> v1beta1_pb2.DevicePluginOptions:  # noqa: ANN401
        return v1beta1_pb2.DevicePluginOptions(get_preferred_allocation_available=True)

    def watch(
        self,
        request: Any,  # noqa: ANN401
        context: grpc.ServicerContext,
    ) -> Iterator[v1beta1_pb2.ListAndWatchResponse]:
        yield self._list
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait()

    def preferred(
        self, request: v1beta1_pb2.PreferredAllocationRequest, context: grpc.ServicerContext
    ) -> v1beta1_pb2.PreferredAllocationResponse:
        response = v1beta1_pb2.PreferredAllocationResponse()
        for container in request.container_requests:
            response.container_responses.add(deviceIDs=container.available_deviceIDs[: container.allocation_size])
        return response

    def allocate(
        self, request: v1beta1_pb2.AllocateRequest, context: grpc.ServicerContext
    ) -> v1beta1_pb2.AllocateResponse:
        response = v1beta1_pb2.AllocateResponse()
        for container in request.container_requests:
            answer = response.container_responses.add()
            answer.envs.update({**ENVIRONMENT, "SGPU_GPU_UUIDS": container.devices_ids[0].partition("::")[0]})
            answer.mounts.add(
                container_path="/usr/local/nvidia", host_path="/home/kubernetes/bin/nvidia", read_only=True
            )
            for node in NODES:
                answer.devices.add(container_path=f"/dev/{node}", host_path=f"/dev/{node}", permissions="mrw")
        return response


def serve(plugin: Plugin, path: Path) -> grpc.Server:
    unary: dict[str, tuple[Any, Any]] = {
        "GetDevicePluginOptions": (plugin.options, v1beta1_pb2.Empty),
        "GetPreferredAllocation": (plugin.preferred, v1beta1_pb2.PreferredAllocationRequest),
        "Allocate": (plugin.allocate, v1beta1_pb2.AllocateRequest),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(method, request.FromString, lambda answer: answer.SerializeToString())
        for name, (method, request) in unary.items()
    }
    handlers["ListAndWatch"] = grpc.unary_stream_rpc_method_handler(
        plugin.watch, v1beta1_pb2.Empty.FromString, v1beta1_pb2.ListAndWatchResponse.SerializeToString
    )
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", handlers),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    return server


def register(kubelet_socket: Path, endpoint: str, resource: str) -> None:
    # grpcio would go on with its connection to the kubelet of before, which has the same path.
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(f"unix:{kubelet_socket}", options) as kubelet:
        call = kubelet.unary_unary(
            "/v1beta1.Registration/Register",
            v1beta1_pb2.RegisterRequest.SerializeToString,
            v1beta1_pb2.Empty.FromString,
        )
        request = v1beta1_pb2.RegisterRequest(version="v1beta1", endpoint=endpoint, resource_name=resource)
        call(request, wait_for_ready=True)  # its socket is there a moment before it listens


def main() -> None:
    directory, resource, gpus, shares = sys.argv[1:]
    plugin, kubelet, numbers = Plugin(int(gpus), int(shares)), Path(directory) / "kubelet.sock", count()
    inotify = inotify_simple.INotify()
    inotify.add_watch(directory, inotify_simple.flags.CREATE | inotify_simple.flags.DELETE)
    path = Path(directory) / ENDPOINT.format(next(numbers))
    server = serve(plugin, path)
    register(kubelet, path.name, resource)
    while True:
        for event in inotify.read():
            if event.name == path.name and event.mask & inotify_simple.flags.DELETE:  # by a kubelet that starts
                path = Path(directory) / ENDPOINT.format(next(numbers))
                before, server = server, serve(plugin, path)
                before.stop(None)
            elif event.name == kubelet.name and event.mask & inotify_simple.flags.CREATE:
                register(kubelet, path.name, resource)


if __name__ == "__main__":
    main()
