"""The kubelet's side of the device plugin protocol, on grpcio: a second implementation of gRPC to test against.

Follows pkg/kubelet/cm/devicemanager of Kubernetes 1.36 step by step, its races included. `answers_first` gives the
device manager of 1.24 and older, `api="v1alpha"` that of 1.8 and 1.9. Knows nothing of sgpu but its messages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

# grpcio would log each connection that a test cuts; it reads this when it is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
from google.protobuf.message import Message

from sgpu.api import v1alpha_pb2, v1beta1_pb2

T = TypeVar("T")
R = TypeVar("R", bound=Message)

#: Seconds the kubelet tries to connect to a plugin (plugin/v1beta1/client.go, dial).
DIAL_TIMEOUT: Final = 10.0
#: Bytes a message from a plugin may have: the default of grpc-go, which the kubelet leaves alone.
RECEIVE_LIMIT: Final = 4 * 1024 * 1024
#: Seconds after which a test's own wait or call is taken to hang; the kubelet's Allocate has no deadline.
TIMEOUT: Final = 30.0
#: Concurrent calls of plugins that are served; grpc-go has no limit.
SERVER_THREADS: Final = 8

CHECKPOINT: Final = "kubelet_internal_checkpoint"
CHANNEL_OPTIONS: Final = (
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", RECEIVE_LIMIT),
    # grpcio would share one connection between channels to the same path; the kubelet opens one per registration.
    ("grpc.use_local_subchannel_pool", 1),
)
#: IsExtendedResourceName (pkg/apis/core/v1/helper), less the lengths and the native names.
RESOURCE_NAME: Final = re.compile(
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
)


class NotConnectedError(Exception):
    """The resource has no connected plugin: the kubelet would fail the pod without calling any."""


class _DialError(Exception):
    """A plugin could not be connected to within DIAL_TIMEOUT."""


class Attempt(NamedTuple):
    """One Register call, whatever came of it."""

    time: float
    request: v1beta1_pb2.RegisterRequest  # with v1alpha, in all of these: that package's message of the same name


class Listed(NamedTuple):
    """One message of a ListAndWatch stream."""

    time: float
    response: v1beta1_pb2.ListAndWatchResponse


class Registration(NamedTuple):
    """One Register call after which the kubelet was connected to the plugin."""

    time: float
    request: v1beta1_pb2.RegisterRequest
    #: What GetDevicePluginOptions said; with `answers_first`, what the request said.
    options: v1beta1_pb2.DevicePluginOptions
    connection: Connection


@dataclass(eq=False)
class Connection:
    """The kubelet's connection to a plugin and its ListAndWatch stream. Times are monotonic, 0 for not yet."""

    resource: str
    channel: grpc.Channel
    state: grpc.ChannelConnectivity = grpc.ChannelConnectivity.IDLE
    stream: Any = None
    opened: float = 0.0
    #: Set together with what it does to the devices.
    ended: float = 0.0
    #: How the stream ended.
    code: grpc.StatusCode | None = None
    details: str = ""

    @property
    def streaming(self) -> bool:
        return bool(self.opened and not self.ended)


@dataclass(eq=False)
class _Endpoint:
    connection: Connection
    stopped: bool = False
    devices: dict[str, str] = field(default_factory=dict)


class FakeKubelet:
    """A kubelet whose plugin directory is `directory`. As a context manager it is started, and closed at the end.

    What it saw is in `attempts`, `registrations`, `lists`, `connections` and `gaps`, across restarts; `wait_for` waits
    for any of them to change. The knobs below the constructor's can be set while it runs.
    """

    def __init__(
        self,
        directory: Path,
        *,
        api: Literal["v1beta1", "v1alpha"] = "v1beta1",
        versions: Sequence[str] = (),
        answers_first: bool = False,
    ) -> None:
        self.directory = directory
        self.api = api
        #: 1.8 has "v1alpha1", 1.9 "v1alpha2".
        self.versions = tuple(versions) or (("v1beta1",) if api == "v1beta1" else ("v1alpha2",))
        #: Up to 1.24, Register is answered before the plugin is dialled, and a stream's end stops only its own.
        self.answers_first = answers_first or api == "v1alpha"
        #: Seconds from a Register call to anything else.
        self.register_delay = 0.0

        self.attempts: list[Attempt] = []
        self.registrations: list[Registration] = []
        self.lists: defaultdict[str, list[Listed]] = defaultdict(list)
        self.connections: list[Connection] = []

        #: The checkpoint's entries: what containers have.
        self.entries: list[dict[str, object]] = []
        #: Seconds for which a resource that had devices had none, each time that was over.
        self.gaps: list[float] = []

        #: When kubelet.sock was last made, on the monotonic clock.
        self.bound = 0.0

        self._package = "v1beta1" if api == "v1beta1" else "deviceplugin"
        self._messages: Any = v1beta1_pb2 if api == "v1beta1" else v1alpha_pb2
        self._changed = threading.Condition()
        self._refusal: tuple[grpc.StatusCode, str] | None = None
        self._running = False
        self._clients: dict[str, Connection] = {}
        self._endpoints: dict[str, _Endpoint] = {}
        self._emptied: dict[str, float] = {}  # when a resource lost its devices
        self._threads: list[threading.Thread] = []
        # gRPC binds in here, and kubelet.sock is a hard link to it: grpcio unlinks what it bound when it stops, but a
        # kubelet that exits leaves its socket behind. Beside the plugin directory, for the same file system.
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._private = Path(tempfile.mkdtemp(prefix="k", dir=directory.parent))

    # Life

    @property
    def socket(self) -> Path:
        """The path of kubelet.sock."""
        return self.directory / "kubelet.sock"

    def start(self) -> float:
        """Empty the directory as a starting kubelet does and serve; returns the seconds without a kubelet.sock."""
        pool = futures.ThreadPoolExecutor(SERVER_THREADS, thread_name_prefix="kubelet")
        server = grpc.server(pool)
        register = grpc.unary_unary_rpc_method_handler(
            self._register, self._messages.RegisterRequest.FromString, self._messages.Empty.SerializeToString
        )
        service = f"{self._package}.Registration"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Register": register}),))
        self._server, self._pool = server, pool
        self._running = True

        emptied = time.monotonic()
        self._clean_directory()
        server.add_insecure_port(f"unix:{self._private / 's'}")
        os.link(self._private / "s", self.socket)
        self.bound = time.monotonic()
        server.start()
        return self.bound - emptied

    def stop(self, *, unlink: bool = False) -> None:
        """Exit as a kubelet does: every connection closes, kubelet.sock stays (unless `unlink`) and refuses."""
        with self._changed:
            if not self._running:
                return
            self._running = False
            self._changed.notify_all()
        self._server.stop(None).wait()
        self._pool.shutdown()
        for connection in self.connections:
            connection.channel.close()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._clients.clear()
        self._endpoints.clear()
        self._emptied.clear()
        if unlink:
            self.socket.unlink(missing_ok=True)

    def restart(self, gap: float = 0.0, *, unlink: bool = False) -> float:
        """Stop, and start `gap` seconds later. Returns what `start` does: well under a millisecond.

        As on a node, the file system may give the new socket the old one's inode number; ext4 usually does.
        """
        self.stop(unlink=unlink)
        time.sleep(gap)
        return self.start()

    def close(self) -> None:
        """Stop and leave nothing behind but what plugins left in the directory."""
        self.stop(unlink=True)
        shutil.rmtree(self._private, ignore_errors=True)

    def __enter__(self) -> FakeKubelet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Knobs

    def refuse(self, code: grpc.StatusCode, message: str) -> None:
        """Answer each Register with this status from now on, until `accept`."""
        self._refusal = (code, message)

    def accept(self) -> None:
        """Refuse no more."""
        self._refusal = None

    def drop_stream(self, connection: Connection | None = None) -> None:
        """Cancel ListAndWatch, by default that of the newest registration, and wait until that had its consequences."""
        connection = connection or self.registrations[-1].connection
        self.wait_for(lambda: connection.opened, message="no ListAndWatch to cancel")
        connection.stream.cancel()
        self.wait_for(lambda: connection.ended, message="ListAndWatch still open")

    def write_checkpoint(self) -> None:
        """Write the checkpoint, with `entries`, as the kubelet does after an allocation and at every list."""
        written = self.directory / f".{CHECKPOINT}{threading.get_ident()}"
        written.write_text(json.dumps({"Data": {"PodDeviceEntries": self.entries, "RegisteredDevices": {}}}))
        written.rename(self.directory / CHECKPOINT)

    # Observing

    def devices(self, resource: str | None = None) -> dict[str, str]:
        """Health by id as last listed to the connected endpoint; empty where there is none, or no list yet."""
        with self._changed:
            endpoint = self._endpoints.get(resource or self._newest())
            return {} if endpoint is None or endpoint.stopped else dict(endpoint.devices)

    def wait_for(self, predicate: Callable[[], T], timeout: float = TIMEOUT, message: str = "") -> T:
        """Wait until the predicate is true of this object and return what it returned; AssertionError after `timeout`.

        It is asked once now and at each change of this object, with the lock held: no calls to plugins in it.
        """
        with self._changed:
            found = self._changed.wait_for(predicate, timeout)
            if not found:
                raise AssertionError(f"not within {timeout} s: {message or 'what was waited for'}; {self._summary()}")
            return found

    def wait_devices(self, count: int, timeout: float = TIMEOUT, *, resource: str | None = None) -> dict[str, str]:
        """Wait until `count` devices are listed, healthy or not; 0 waits for the plugin's disconnection."""
        self.wait_for(lambda: len(self.devices(resource)) == count, timeout, f"{count} devices")
        return self.devices(resource)

    def wait_registrations(self, count: int, timeout: float = TIMEOUT) -> Registration:
        """Wait for the `count`th successful registration since the beginning, and return it."""
        self.wait_for(lambda: len(self.registrations) >= count, timeout, f"{count} registrations")
        return self.registrations[count - 1]

    def wait_attempts(self, count: int, timeout: float = TIMEOUT) -> Attempt:
        """Wait for the `count`th Register call since the beginning, refused or not, and return it."""
        self.wait_for(lambda: len(self.attempts) >= count, timeout, f"{count} Register calls")
        return self.attempts[count - 1]

    # Calling

    def call(
        self,
        service: str,
        method: str,
        request: Message,
        response_type: type[R],
        timeout: float = TIMEOUT,
        *,
        resource: str | None = None,
    ) -> R:
        """Call a unary method of the connected plugin; `service` has its package.

        Raises grpc.RpcError, or NotConnectedError where the kubelet would fail the pod by itself.
        """
        name = resource or self._newest()
        with self._changed:
            endpoint = self._endpoints.get(name)
            if endpoint is None or endpoint.stopped:
                raise NotConnectedError(name)
        stub = endpoint.connection.channel.unary_unary(
            f"/{service}/{method}", type(request).SerializeToString, response_type.FromString
        )
        try:
            response: R = stub(request, timeout=timeout)
        except ValueError as error:  # the channel was closed just now
            raise NotConnectedError(name) from error
        return response

    def allocate(
        self, *containers: Sequence[str], resource: str | None = None, timeout: float = TIMEOUT
    ) -> v1beta1_pb2.AllocateResponse:
        """Allocate, one list of ids per container; the real kubelet only ever asks for one container."""
        each = [v1beta1_pb2.ContainerAllocateRequest(devices_ids=ids) for ids in containers]
        request = v1beta1_pb2.AllocateRequest(container_requests=each)
        return self._ask("Allocate", request, v1beta1_pb2.AllocateResponse, resource, timeout)

    def allocate_v1alpha(
        self, ids: Sequence[str], *, resource: str | None = None, timeout: float = TIMEOUT
    ) -> v1alpha_pb2.AllocateResponse:
        """Allocate as 1.8 and 1.9 do it."""
        request = v1alpha_pb2.AllocateRequest(devicesIDs=ids)
        return self._ask("Allocate", request, v1alpha_pb2.AllocateResponse, resource, timeout)

    def preferred(
        self,
        available: Sequence[str],
        must_include: Sequence[str] = (),
        size: int = 1,
        *,
        resource: str | None = None,
        timeout: float = TIMEOUT,
    ) -> list[str]:
        """GetPreferredAllocation for one container: the ids the plugin prefers."""
        container = v1beta1_pb2.ContainerPreferredAllocationRequest(
            available_deviceIDs=available, must_include_deviceIDs=must_include, allocation_size=size
        )
        request = v1beta1_pb2.PreferredAllocationRequest(container_requests=[container])
        answer = self._ask(
            "GetPreferredAllocation", request, v1beta1_pb2.PreferredAllocationResponse, resource, timeout
        )
        (preferred,) = answer.container_responses
        return list(preferred.deviceIDs)

    def pre_start(self, ids: Sequence[str], *, resource: str | None = None, timeout: float = TIMEOUT) -> None:
        """PreStartContainer; the real kubelet calls it only where the options ask for it, and waits 30 s."""
        request = v1beta1_pb2.PreStartContainerRequest(devices_ids=ids)
        self._ask("PreStartContainer", request, v1beta1_pb2.PreStartContainerResponse, resource, timeout)

    def _ask(self, method: str, request: Message, response_type: type[R], resource: str | None, timeout: float) -> R:
        return self.call(f"{self._package}.DevicePlugin", method, request, response_type, timeout, resource=resource)

    def _newest(self) -> str:
        return self.registrations[-1].request.resource_name if self.registrations else ""

    def _summary(self) -> str:
        streams = ", ".join(
            f"{connection.resource} {'open' if connection.streaming else connection.code}"
            for connection in self.connections
        )
        return (
            f"{len(self.attempts)} Register calls, {len(self.registrations)} registrations, "
            f"{len(self.devices())} devices, streams: {streams or 'none'}"
        )

    # The device manager

    def _clean_directory(self) -> None:
        # CleanupPluginDirectory: sockets only. 1.9 removed regular files too.
        for path in self.directory.iterdir():
            if path.is_socket() or (self.api == "v1alpha" and path.is_file() and path.name != CHECKPOINT):
                path.unlink()

    def _register(self, request: v1beta1_pb2.RegisterRequest, context: grpc.ServicerContext) -> Message:
        with self._changed:
            self.attempts.append(Attempt(time.monotonic(), request))
            self._changed.notify_all()
        context.add_callback(self._notify)
        if not self._sleep(self.register_delay, context):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the kubelet stops")
        if self._refusal is not None:
            context.abort(*self._refusal)
        if request.version not in self.versions:
            supported = " ".join(f'"{version}"' for version in self.versions)
            context.abort(
                grpc.StatusCode.UNKNOWN,
                f'requested API version "{request.version}" is not supported by kubelet. '
                f"Supported version is [{supported}]",
            )
        name = request.resource_name
        if not RESOURCE_NAME.fullmatch(name) or "kubernetes.io/" in name or name.startswith("requests."):
            context.abort(grpc.StatusCode.UNKNOWN, f'the ResourceName "{name}" is invalid')

        if not context.is_active():  # the plugin hung up while we took our time
            context.abort(grpc.StatusCode.CANCELLED, "context canceled")
        channel = grpc.insecure_channel(f"unix:{self.directory / request.endpoint}", CHANNEL_OPTIONS)
        connection = Connection(name, channel)
        with self._changed:
            self.connections.append(connection)
        if self.answers_first:
            self._spawn(lambda: self._add_endpoint(connection, request))
        else:
            try:
                self._connect_client(connection, request, context)
            except _DialError as error:
                context.abort(grpc.StatusCode.UNKNOWN, f"failed to dial device plugin: {error}")
            except grpc.RpcError as error:
                words = f"rpc error: code = {error.code().name} desc = {error.details()}"
                context.abort(grpc.StatusCode.UNKNOWN, f"failed to get device plugin options: {words}")
            except (grpc.FutureCancelledError, ValueError):  # disconnected meanwhile, by the end of an old stream
                words = "rpc error: code = Canceled desc = grpc: the client connection is closing"
                context.abort(grpc.StatusCode.UNKNOWN, f"failed to get device plugin options: {words}")
            self._spawn(lambda: self._run_client(connection))
        empty: Message = self._messages.Empty()
        return empty

    def _connect_client(
        self, connection: Connection, request: v1beta1_pb2.RegisterRequest, context: grpc.ServicerContext
    ) -> None:
        # server.connectClient: known under the resource name before it is connected, and whatever is known
        # under that name is forgotten when connecting fails.
        name = connection.resource
        with self._changed:
            self._clients[name] = connection
        try:
            self._dial(connection, context.is_active)
            ask = connection.channel.unary_unary(
                f"/{self._package}.DevicePlugin/GetDevicePluginOptions",
                self._messages.Empty.SerializeToString,
                self._messages.DevicePluginOptions.FromString,
            )
            # No deadline of its own: it ends with the plugin's Register call.
            asked = ask.future(self._messages.Empty())
            if not context.add_callback(asked.cancel):
                asked.cancel()
            options = asked.result()
        except (_DialError, grpc.RpcError, grpc.FutureCancelledError, ValueError):
            with self._changed:
                self._clients.pop(name, None)
            raise
        self._connected(connection, request, options)

    def _run_client(self, connection: Connection) -> None:
        # server.runClient: at the end of *this* client's stream, disconnect the one known under its resource name,
        # even if that is a later one.
        self._list_and_watch(connection)
        with self._changed:
            known = self._clients.pop(connection.resource, None)
            self._ended(connection, stop=known is not None)
        if known is not None and known.state is grpc.ChannelConnectivity.READY:
            known.channel.close()

    def _add_endpoint(self, connection: Connection, request: v1beta1_pb2.RegisterRequest) -> None:
        # manager.addEndpoint and runEndpoint, up to 1.24. 1.9 does not wait for a connection.
        if self.api == "v1beta1":
            try:
                self._dial(connection, lambda: True)
            except _DialError:
                return
        options = request.options if self.api == "v1beta1" else v1beta1_pb2.DevicePluginOptions()
        replaced = self._connected(connection, request, options)
        if self.api == "v1alpha" and replaced is not None:
            replaced.connection.channel.close()
        self._list_and_watch(connection)
        connection.channel.close()
        with self._changed:
            endpoint = self._endpoints[connection.resource]
            self._ended(connection, stop=endpoint.connection is connection)

    def _dial(self, connection: Connection, wanted: Callable[[], bool]) -> None:
        def moved(state: grpc.ChannelConnectivity) -> None:
            with self._changed:
                connection.state = state
                self._changed.notify_all()

        ready = grpc.ChannelConnectivity.READY
        connection.channel.subscribe(moved, try_to_connect=True)
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: connection.state is ready or not self._running or not wanted(), DIAL_TIMEOUT
                )
        finally:
            connection.channel.unsubscribe(moved)
        if connection.state is not ready:
            connection.channel.close()
            raise _DialError("context deadline exceeded")

    def _connected(
        self, connection: Connection, request: v1beta1_pb2.RegisterRequest, options: v1beta1_pb2.DevicePluginOptions
    ) -> _Endpoint | None:
        with self._changed:
            replaced = self._endpoints.get(connection.resource)
            # The devices are known by resource: those of the plugin before stay until the next list.
            devices = replaced.devices if replaced else {}
            self._endpoints[connection.resource] = _Endpoint(connection, devices=devices)
            self.registrations.append(Registration(time.monotonic(), request, options, connection))
            self._changed.notify_all()
            return replaced

    def _list_and_watch(self, connection: Connection) -> None:
        watch = connection.channel.unary_stream(
            f"/{self._package}.DevicePlugin/ListAndWatch",
            self._messages.Empty.SerializeToString,
            self._messages.ListAndWatchResponse.FromString,
        )
        try:
            stream = watch(self._messages.Empty())
        except ValueError:  # the channel was closed
            return
        with self._changed:
            connection.stream, connection.opened = stream, time.monotonic()
            self._changed.notify_all()
        with suppress(grpc.RpcError):
            for response in stream:
                self._received(connection.resource, response)
        connection.code, connection.details = stream.code(), stream.details()

    def _ended(self, connection: Connection, *, stop: bool) -> None:
        with self._changed:
            connection.ended = time.monotonic()
            if stop and connection.resource in self._endpoints:
                self._endpoints[connection.resource].stopped = True
                self._endpoints[connection.resource].devices = {}
                self._emptied.setdefault(connection.resource, connection.ended)
            self._changed.notify_all()

    def _received(self, resource: str, response: v1beta1_pb2.ListAndWatchResponse) -> None:
        with self._changed:
            self.lists[resource].append(Listed(time.monotonic(), response))
            # By resource name, not by connection: an old stream still speaks for a new registration.
            if resource in self._endpoints:
                if resource in self._emptied:
                    self.gaps.append(time.monotonic() - self._emptied.pop(resource))
                self._endpoints[resource].devices = {device.ID: device.health for device in response.devices}
            # The kubelet writes its checkpoint at every list: plugins that watch the directory see it.
            with suppress(OSError):  # a test may have removed the directory
                self.write_checkpoint()
            self._changed.notify_all()

    def _sleep(self, seconds: float, context: grpc.ServicerContext) -> bool:
        # Whether the kubelet still runs after it; cut short when it stops or the caller gives up.
        with self._changed:
            self._changed.wait_for(lambda: not self._running or not context.is_active(), seconds)
            return self._running

    def _spawn(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="kubelet's client")
        with self._changed:
            self._threads.append(thread)
        thread.start()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
