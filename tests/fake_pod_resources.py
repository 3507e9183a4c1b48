"""The kubelet's side of the PodResources API, on grpcio: which container has which shares.

Follows pkg/kubelet/apis/podresources/server_v1.go of Kubernetes 1.36 as far as devices go: every pod is listed with
all of its containers, and what a container has comes by resource name. Knows nothing of sgpu but its messages.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent import futures
from pathlib import Path
from typing import Any, Final

# grpcio would log each connection that a test cuts; it reads this when it is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc

from sgpu.api import podresources_pb2

RESOURCE: Final = "deepomatic.com/shared-gpu"
#: Seconds after which a test's own wait is taken to hang.
TIMEOUT: Final = 30.0


class FakePodResources:
    """A kubelet's PodResources server on the socket at `path`: it serves while it is entered, and can be again.

    Pods can be assigned shares, and the knobs set, at any time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: When each List call came, on the monotonic clock.
        self.calls: list[float] = []
        #: Seconds from a List call to its answer.
        self.delay = 0.0

        self._pods: defaultdict[tuple[str, str], list[tuple[str, str, tuple[str, ...]]]] = defaultdict(list)
        self._claims: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
        self._refusal: tuple[grpc.StatusCode, str] | None = None
        self._changed = threading.Condition()
        self._running = False

    # Life

    def __enter__(self) -> FakePodResources:
        self._pool = futures.ThreadPoolExecutor(2, thread_name_prefix="pod resources")
        self._server = grpc.server(self._pool)
        handler = grpc.unary_unary_rpc_method_handler(
            self._list,
            podresources_pb2.ListPodResourcesRequest.FromString,
            podresources_pb2.ListPodResourcesResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("v1.PodResourcesLister", {"List": handler})
        self._server.add_generic_rpc_handlers((service,))
        self._running = True
        self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running = False
            self._changed.notify_all()
        self._server.stop(None).wait()
        self._pool.shutdown()
        self.path.unlink(missing_ok=True)

    # Pods

    def assign(
        self, namespace: str, pod: str, container: str, share_ids: Iterable[str], resource: str = RESOURCE
    ) -> None:
        """A container has these from now on, beside what it has already."""
        with self._changed:
            self._pods[namespace, pod].append((container, resource, tuple(share_ids)))

    def claim(self, namespace: str, pod: str, container: str, share_id: str) -> None:
        """A container has a device of a claim from now on."""
        with self._changed:
            self._claims[namespace, pod, container].append(share_id)
            self._pods[namespace, pod].append((container, "", ()))

    def release(self, pod: str, namespace: str = "default") -> None:
        """A pod is gone, and what its containers had is free."""
        with self._changed:
            del self._pods[namespace, pod]

    # Knobs

    def refuse(self, code: grpc.StatusCode, message: str = "") -> None:
        """Answer each List with this status from now on, until `accept`. UNIMPLEMENTED is what an old kubelet says."""
        self._refusal = (code, message)

    def accept(self) -> None:
        """Refuse no more."""
        self._refusal = None

    # Observing

    def wait_calls(self, count: int, timeout: float = TIMEOUT) -> None:
        """Wait for the `count`th List call since the beginning, whatever becomes of it."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.calls) >= count, timeout):
                raise AssertionError(f"{len(self.calls)} List calls, not {count}, within {timeout} s")

    def wait_heeded(self, timeout: float = TIMEOUT) -> None:
        """Wait until a client that calls in a loop has acted upon how things are now.

        The next call may have begun before; the one after is answered as things are now, and the one after that is
        made by a client that has that answer behind it.
        """
        self.wait_calls(len(self.calls) + 3, timeout)

    def _list(self, _: podresources_pb2.ListPodResourcesRequest, context: Any) -> Any:  # noqa: ANN401
        with self._changed:
            self.calls.append(time.monotonic())
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running, self.delay)
            pods = {pod: list(containers) for pod, containers in self._pods.items()}
            refusal = self._refusal
        if refusal is not None:
            context.abort(*refusal)
        response = _answer(pods)
        for pod in response.pod_resources:
            for entry in pod.containers:
                for share_id in self._claims.get((pod.namespace, pod.name, entry.name), ()):
                    entry.dynamic_resources.add().claim_resources.add(driver_name="d", share_id=share_id)
        return response


def _answer(pods: dict[tuple[str, str], list[tuple[str, str, tuple[str, ...]]]]) -> Any:  # noqa: ANN401
    response = podresources_pb2.ListPodResourcesResponse()
    for (namespace, name), assigned in pods.items():
        pod = response.pod_resources.add(name=name, namespace=namespace)
        for container in dict.fromkeys(container for container, _, _ in assigned):
            entry = pod.containers.add(name=container)
            for owner, resource, share_ids in assigned:
                if owner == container:
                    entry.devices.add(resource_name=resource, device_ids=share_ids)
    return response
