"""The fake kubelet and the daemon's process wrapper do what the tests that use them rely on."""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from daemon_process import DaemonProcess, short_directory
from fake_kubelet import FakeKubelet, NotConnectedError
from google.protobuf.message import Message

from sgpu.api import v1beta1_pb2

RESOURCE = "example.com/gpu"


def serialized(message: Message) -> bytes:
    content: bytes = message.SerializeToString()
    return content


class Plugin:
    """A device plugin in a few lines: it lists what `show` was last given, and ends its streams on `end_streams`."""

    def __init__(self, directory: Path, endpoint: str = "plugin.sock") -> None:
        self.directory, self.endpoint = directory, endpoint
        self.streams: list[queue.SimpleQueue[dict[str, str] | None]] = []
        self.shown = {"a": "Healthy", "b": "Healthy"}

    def __enter__(self) -> Plugin:
        options = grpc.unary_unary_rpc_method_handler(self.options, v1beta1_pb2.Empty.FromString, serialized)
        watch = grpc.unary_stream_rpc_method_handler(self.list_and_watch, v1beta1_pb2.Empty.FromString, serialized)
        handlers = {"GetDevicePluginOptions": options, "ListAndWatch": watch}
        self.pool = futures.ThreadPoolExecutor(8)
        self.server = grpc.server(self.pool)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", handlers),))
        self.server.add_insecure_port(f"unix:{self.directory / self.endpoint}")
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end_streams()
        self.server.stop(None).wait()
        self.pool.shutdown()

    def register(self, version: str = "v1beta1", resource: str = RESOURCE) -> None:
        request = v1beta1_pb2.RegisterRequest(version=version, endpoint=self.endpoint, resource_name=resource)
        alone = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.insecure_channel(f"unix:{self.directory / 'kubelet.sock'}", alone) as channel:
            method = "/v1beta1.Registration/Register"
            channel.unary_unary(method, serialized, v1beta1_pb2.Empty.FromString)(request, timeout=10)

    def show(self, shown: dict[str, str]) -> None:
        self.shown = shown
        for stream in self.streams:
            stream.put(shown)

    def end_streams(self) -> None:
        for stream in self.streams:
            stream.put(None)

    def list_and_watch(self, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        stream: queue.SimpleQueue[dict[str, str] | None] = queue.SimpleQueue()
        stream.put(self.shown)
        self.streams.append(stream)
        context.add_callback(lambda: stream.put(None))
        for shown in iter(stream.get, None):
            yield v1beta1_pb2.ListAndWatchResponse(devices=[{"ID": i, "health": h} for i, h in shown.items()])

    def options(self, request: Message, context: grpc.ServicerContext) -> Message:
        return v1beta1_pb2.DevicePluginOptions(pre_start_required=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path / "plugins"


@pytest.fixture
def kubelet(directory: Path) -> Iterator[FakeKubelet]:
    with FakeKubelet(directory) as kubelet:
        yield kubelet


@pytest.fixture
def plugin(kubelet: FakeKubelet) -> Iterator[Plugin]:
    with Plugin(kubelet.directory) as plugin:
        yield plugin


def test_registering_asks_for_options_and_lists_the_devices(kubelet: FakeKubelet, plugin: Plugin) -> None:
    """Call back before the answer, then watch the list."""
    before = time.monotonic()
    plugin.register()
    registration = kubelet.wait_registrations(1)
    assert registration.request.endpoint == "plugin.sock"
    assert registration.options.pre_start_required
    assert kubelet.wait_devices(2) == {"a": "Healthy", "b": "Healthy"}
    plugin.show({"a": "Unhealthy"})
    assert kubelet.wait_devices(1) == {"a": "Unhealthy"}
    assert [len(listed.response.devices) for listed in kubelet.lists[RESOURCE]] == [2, 1]
    assert before < registration.time < kubelet.lists[RESOURCE][0].time < kubelet.lists[RESOURCE][1].time


def test_starting_removes_sockets_and_nothing_else(directory: Path) -> None:
    """Empty the directory as CleanupPluginDirectory does."""
    (directory / "folder").mkdir(parents=True)
    (directory / "file").touch()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(directory / "stale.sock"))
    with FakeKubelet(directory):
        assert sorted(path.name for path in directory.iterdir()) == ["file", "folder", "kubelet.sock"]


def test_stopping_leaves_a_socket_that_refuses(kubelet: FakeKubelet) -> None:
    """Leave kubelet.sock behind, as a kubelet that exits does."""
    kubelet.stop()
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(kubelet.socket))


def test_a_dropped_stream_disconnects_the_plugin(kubelet: FakeKubelet, plugin: Plugin) -> None:
    """Fail calls until it registers again."""
    plugin.register()
    kubelet.wait_devices(2)
    kubelet.drop_stream()
    assert kubelet.devices() == {}
    (connection,) = kubelet.connections
    assert not connection.streaming
    assert connection.code is grpc.StatusCode.CANCELLED
    with pytest.raises(NotConnectedError):
        kubelet.allocate(["a"])
    plugin.register()
    kubelet.wait_devices(2)


def test_an_old_stream_that_ends_kills_a_new_registration(kubelet: FakeKubelet, plugin: Plugin) -> None:
    """Disconnect whatever has the resource's name."""
    plugin.register()
    kubelet.wait_devices(2)
    with Plugin(kubelet.directory, "new.sock") as new:
        new.register()
        kubelet.wait_for(lambda: len(kubelet.lists[RESOURCE]) == 2)
        assert len(kubelet.devices()) == 2
        plugin.end_streams()
        kubelet.wait_devices(0)
        kubelet.wait_for(lambda: [each.streaming for each in kubelet.connections] == [False, False])
        assert [each.code for each in kubelet.connections] == [grpc.StatusCode.OK, grpc.StatusCode.CANCELLED]


def test_an_old_stream_that_ends_while_a_plugin_is_dialled_leaves_it_undead(
    kubelet: FakeKubelet, plugin: Plugin
) -> None:
    """The kubelet forgets the client that it is about to connect, so the end of its stream goes unnoticed."""
    plugin.register()
    kubelet.wait_devices(2)
    new = Plugin(kubelet.directory, "new.sock")
    with futures.ThreadPoolExecutor(1) as pool:
        registered = pool.submit(new.register)
        kubelet.wait_for(lambda: len(kubelet.connections) == 2)
        plugin.end_streams()
        kubelet.wait_devices(0)
        with new:
            registered.result()
            kubelet.wait_devices(2)
    kubelet.wait_for(lambda: kubelet.connections[1].ended)
    assert len(kubelet.devices()) == 2


def test_up_to_1_24_an_old_stream_that_ends_does_no_harm(directory: Path) -> None:
    """Stop only the endpoint that the stream belongs to."""
    with (
        FakeKubelet(directory, answers_first=True) as kubelet,
        Plugin(directory) as plugin,
        Plugin(directory, "new.sock") as new,
    ):
        plugin.register()
        kubelet.wait_devices(2)
        new.show({"c": "Healthy"})
        new.register()
        kubelet.wait_devices(1)
        plugin.end_streams()
        kubelet.wait_for(lambda: kubelet.connections[0].ended)
        assert kubelet.devices() == {"c": "Healthy"}


@pytest.mark.parametrize(
    ("version", "resource", "details"),
    [
        ("v1", RESOURCE, 'requested API version "v1" is not supported by kubelet. Supported version is ["v1beta1"]'),
        ("v1beta1", "gpu", 'the ResourceName "gpu" is invalid'),
    ],
)
def test_a_bad_request_is_refused(
    kubelet: FakeKubelet, plugin: Plugin, version: str, resource: str, details: str
) -> None:
    """Refuse it in the kubelet's own words."""
    with pytest.raises(grpc.RpcError) as caught:
        plugin.register(version, resource)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNKNOWN, details)
    assert not kubelet.registrations


def test_a_list_over_4_mib_ends_the_stream(kubelet: FakeKubelet, plugin: Plugin) -> None:
    """Refuse it with grpc-go's default limit."""
    plugin.show({"x" * 5_000_000: "Healthy"})
    plugin.register()
    kubelet.wait_for(lambda: kubelet.connections[0].ended)
    assert kubelet.connections[0].code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_nothing_is_left_behind(directory: Path) -> None:
    """Leave no thread, and no file but the checkpoint."""
    before = set(threading.enumerate())
    with FakeKubelet(directory) as kubelet, Plugin(directory) as plugin:
        plugin.register()
        kubelet.wait_devices(2)
        kubelet.restart()
    assert [path.name for path in directory.iterdir()] == ["kubelet_internal_checkpoint"]
    assert list(directory.parent.iterdir()) == [directory]
    # grpcio's own threads end by themselves soon after what they served.
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before


SCRIPT = """
import signal, sys, time
from sgpu.parent import run_in_child
def daemon(_):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    print("ready", file=sys.stderr)
    while True:
        time.sleep(60)
sys.exit(run_in_child(daemon))
"""


def test_a_daemon_process_that_misbehaves_is_shown_with_its_log(directory: Path) -> None:
    """Put the log into each AssertionError."""
    with DaemonProcess(directory, directory, [], command=(sys.executable, "-c", SCRIPT)) as process:
        process.wait_log("ready")
        with pytest.raises(AssertionError, match=r"no line with 'nonsense' within 0.01 s(?s:.*)ready"):
            process.wait_log("nonsense", timeout=0.01)
        with pytest.raises(AssertionError, match=r"still running after 0.01 s(?s:.*)ready"):
            process.wait_exit(timeout=0.01)
        with pytest.raises(AssertionError, match=r"exit status 3 after SIGTERM(?s:.*)ready"):
            process.terminate()
