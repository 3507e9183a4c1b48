"""The kubelet's side of DRA plugins, on grpcio: a second implementation of gRPC to test against.

Follows pkg/kubelet/pluginmanager and pkg/kubelet/cm/dra of Kubernetes 1.36: it looks for sockets in the directory of
registrations, asks each what it is, dials its endpoint, and says what came of it. Knows nothing of sgpu but its
messages.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

# grpcio would log each connection that a test cuts; it reads this when it is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
from google.protobuf.message import Message

from sgpu.api import dra_health_pb2, dra_v1_pb2, pluginregistration_pb2

R = TypeVar("R", bound=Message)

#: Seconds that GetInfo may take (operationexecutor), and after which a test's own wait is taken to hang.
INFO_TIMEOUT: Final = 1.0
TIMEOUT: Final = 30.0
#: The services that this kubelet knows, as validateSupportedServices has them.
KNOWN: Final = ("v1.DRAPlugin", "v1beta1.DRAPlugin")
DRA: Final = "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin"


class FakePluginManager:
    """A kubelet that finds the plugins in `registry`, as long as it is entered. `found` counts their sockets."""

    def __init__(self, registry: Path, known: tuple[str, ...] = KNOWN) -> None:
        self.registry = registry
        self.known = known
        self.refused: list[str] = []
        self.found = 0
        self._seen: dict[Path, tuple[int, int]] = {}
        self._plugins: dict[Path, tuple[str, str, grpc.Channel]] = {}  # name and endpoint, the newest last
        self._stop = threading.Event()
        self._changed = threading.Condition()

    def __enter__(self) -> FakePluginManager:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for path in list(self._plugins):
            self._forget(path)

    @property
    def plugins(self) -> dict[str, str]:
        """Endpoint by name; of several, the one that was connected to last."""
        return {name: endpoint for name, endpoint, _ in list(self._plugins.values())}

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until it is so, as far as plugins go."""
        with self._changed:
            if not self._changed.wait_for(condition, TIMEOUT):
                raise AssertionError(f"not within {TIMEOUT} s; plugins: {self.plugins}, refused: {self.refused}")

    def prepare(self, *claims: tuple[str, str, str]) -> dra_v1_pb2.NodePrepareResourcesResponse:
        """Prepare claims, each by namespace, name and uid."""
        request = dra_v1_pb2.NodePrepareResourcesRequest(claims=_claims(claims))
        return self._call(f"{DRA}/NodePrepareResources", request, dra_v1_pb2.NodePrepareResourcesResponse)

    def unprepare(self, *claims: tuple[str, str, str]) -> dra_v1_pb2.NodeUnprepareResourcesResponse:
        """Unprepare claims, each by namespace, name and uid."""
        request = dra_v1_pb2.NodeUnprepareResourcesRequest(claims=_claims(claims))
        return self._call(f"{DRA}/NodeUnprepareResources", request, dra_v1_pb2.NodeUnprepareResourcesResponse)

    def health(self) -> Iterator[dra_health_pb2.NodeWatchResourcesResponse]:
        """Return the stream of all devices' health."""
        *_, (_, _, channel) = self._plugins.values()
        call = channel.unary_stream(
            "/v1alpha1.DRAResourceHealth/NodeWatchResources",
            dra_health_pb2.NodeWatchResourcesRequest.SerializeToString,
            dra_health_pb2.NodeWatchResourcesResponse.FromString,
        )
        stream: Iterator[dra_health_pb2.NodeWatchResourcesResponse] = call(
            dra_health_pb2.NodeWatchResourcesRequest(), timeout=TIMEOUT
        )
        return stream

    def _call(self, method: str, request: Message, response: type[R]) -> R:
        *_, (_, _, channel) = self._plugins.values()
        return _unary(channel, method, request, response, TIMEOUT)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            found = {path: _identity(path) for path in self.registry.iterdir() if _is_plugin(path)}
            for path in self._seen.keys() - found.keys():
                del self._seen[path]
                self._forget(path)
            for path, identity in found.items():
                if self._seen.get(path) != identity:
                    self._seen[path] = identity
                    self._register(path)
                    self.found += 1
            with self._changed:
                self._changed.notify_all()

    def _register(self, path: Path) -> None:
        with _dial(path) as channel:
            info = _unary(
                channel,
                "/pluginregistration.Registration/GetInfo",
                pluginregistration_pb2.InfoRequest(),
                pluginregistration_pb2.PluginInfo,
                INFO_TIMEOUT,
            )
            status = pluginregistration_pb2.RegistrationStatus(plugin_registered=True)
            if info.type != "DRAPlugin" or not set(self.known) & set(info.supported_versions):
                status = pluginregistration_pb2.RegistrationStatus(error="no supported service")
                self.refused.append(info.name)
            else:
                self._forget(path)
                self._plugins[path] = info.name, info.endpoint, _dial(Path(info.endpoint))
            _unary(
                channel,
                "/pluginregistration.Registration/NotifyRegistrationStatus",
                status,
                pluginregistration_pb2.RegistrationStatusResponse,
                TIMEOUT,
            )

    def _forget(self, path: Path) -> None:
        if path in self._plugins:
            *_, channel = self._plugins.pop(path)
            channel.close()


def _dial(path: Path) -> grpc.Channel:
    channel = grpc.insecure_channel(
        f"unix:{path}",
        options=(("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)),
    )
    grpc.channel_ready_future(channel).result(TIMEOUT)
    return channel


def _unary(channel: grpc.Channel, method: str, request: Message, response: type[R], timeout: float) -> R:
    call = channel.unary_unary(method, type(request).SerializeToString, response.FromString)
    answer: R = call(request, timeout=timeout)
    return answer


def _identity(path: Path) -> tuple[int, int]:
    """Return what tells a socket from the one before, whose inode it may have."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns  # links change its ctime


def _is_plugin(path: Path) -> bool:
    return not path.name.startswith(".") and path.is_socket()


def _claims(claims: tuple[tuple[str, str, str], ...]) -> list[dra_v1_pb2.Claim]:
    return [dra_v1_pb2.Claim(namespace=namespace, name=name, uid=uid) for namespace, name, uid in claims]
