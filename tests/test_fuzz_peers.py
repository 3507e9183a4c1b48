"""Peers that send any bytes: the connection ends or answers, and whoever serves it, or asked, lives on."""

from __future__ import annotations

import json
import logging
import typing
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import test_observe_http as http
import trio
import trio.testing
from fuzzing import TEXTS, check_message, limited, mutated, near
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import example, given
from hypothesis import strategies as st
from rpc_peer import (
    BIG,
    ECHO,
    FLOOD,
    HELLO,
    REFUSE,
    WAIT,
    WATCH,
    Methods,
    data,
    goaway,
    header_block,
    http2_frame,
    message,
    ping,
    request,
    reset,
    settings,
    text,
    window_update,
)
from rpc_peer import headers as request_headers
from virtual_clock import beside, virtual

from sgpu import rpc
from sgpu.api import podresources_pb2
from sgpu.deviceplugin.messages import check_size
from sgpu.driver.health import FaultRecord
from sgpu.driver.messages import (
    DriverEvent,
    EventKind,
    Failure,
    GpuReport,
    InstanceReport,
    LimitReport,
    Message,
    NotReady,
    ReleasedGpu,
    Report,
    WorkerConfig,
    decode,
    decode_config,
    encode,
    encode_config,
)
from sgpu.driver.monitor import Monitor
from sgpu.driver.simulated import simulated_gpus
from sgpu.driver.xids import XidPolicy
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, WantedLimit
from sgpu.node.cordon import NoSuchGpuError, find_gpu
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters
from sgpu.observe.http import Server
from sgpu.observe.metrics import Pages
from sgpu.observe.observer import Observer
from sgpu.observe.orders import BadOrderError, decode_order
from sgpu.observe.registrations import Registrations
from sgpu.observe.watchdog import Watchdog
from sgpu.pods.holders import PodResourcesError, open_lister

# The driver's process

MESSAGES: Final = (Report, NotReady, DriverEvent, Failure, LimitReport)


def built(kind: type) -> st.SearchStrategy[Any]:
    """Any value of that class: of each of its fields, by the field's type."""
    return st.deferred(
        lambda: st.builds(kind, **{name: OF[hint] for name, hint in typing.get_type_hints(kind).items()})
    )


def some(element: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(element, max_size=3).map(tuple)


SIZES: Final = st.integers(0, 2**64 - 1)
OF: Final[dict[Any, st.SearchStrategy[Any]]] = {
    str: TEXTS,
    int: SIZES,
    bool: st.booleans(),
    float: st.floats(0.1, 3600),
    EventKind: st.sampled_from(EventKind),
    LimitState: st.sampled_from(LimitState),
    WantedLimit: built(WantedLimit),
    tuple[LimitAnswer, ...]: some(built(LimitAnswer)),
    Figures: built(Figures),
    int | None: st.none() | SIZES,
    bool | None: st.none() | st.booleans(),
    tuple[str, ...]: some(TEXTS),
    tuple[ReleasedGpu, ...]: some(built(ReleasedGpu)),
    tuple[GpuReport, ...]: some(built(GpuReport)),
    tuple[InstanceReport, ...]: some(built(InstanceReport)),
    tuple[ProcessUse, ...] | None: st.none() | some(built(ProcessUse)),
}


@pytest.mark.parametrize("kind", MESSAGES)
@given(st.data())
def test_message_round_trip(kind: type, data: st.DataObject) -> None:
    """Encode a message as one line of JSON that names its kind, and decode it, with or without the line's end."""
    message: Message = data.draw(built(kind))
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line)["message"] == kind.__name__
    assert decode(line) == decode(line[:-1]) == message


@given(built(WorkerConfig))
def test_worker_config(config: WorkerConfig) -> None:
    """Encode a configuration as one argument, without a character that a command line can't take."""
    encoded = encode_config(config)
    assert encoded.isascii()
    assert encoded.isprintable()
    assert decode_config(encoded) == config


GPU: Final = GpuReport("GPU-a", "Tesla T4", "0000:3B:00.0", ("nvidia0",), 1, Figures(9, 5, 40, (ProcessUse(7, 3, 40),)))
INSTANCE: Final = InstanceReport("MIG-a", "A100 MIG 1g.5gb", "1g.5gb", 1, 0, 5, ("nvidia-caps/nvidia-cap12",))
CARD: Final = GpuReport("GPU-b", "A100", "0000:5E:00.0", ("nvidia1",), mig_mode=True, instances=(INSTANCE,))
LINES: Final = [
    encode(each)
    for each in (
        Report((GPU, CARD), ("no",), (), "550", "/lib"),
        NotReady("not yet"),
        DriverEvent("GPU-a", EventKind.XID, 79),
        DriverEvent("GPU-b", EventKind.XID, 79, 1, 0),
        Failure("nvmlInit_v2", 9),
    )
]


@given(
    mutated(*LINES)
    | near(*map(json.loads, LINES)).map(lambda fields: json.dumps(fields).encode())
    | st.binary(max_size=40)
)
@example(json.dumps({**json.loads(LINES[0]), "driver_version": [], "order": [[]]}).encode())
def test_message(line: bytes) -> None:
    """Decode what the monitor and all behind it can handle, or raise ValueError with a short message."""
    with limited():
        try:
            message = decode(line)
        except ValueError as error:
            check_message(error)
            return
        handle(message)


def handle(message: Message) -> None:
    """As the daemon does."""

    async def run() -> None:
        node = NodeState(Policy("example.com/gpu", 10), 5, check_size)
        counters = Counters()
        monitor = Monitor(node, XidPolicy(), FaultRecord(), counters.nvml_errors)
        monitor.report(Report((GPU, CARD), (), (), "550", "/lib"))
        handlers: dict[type, Callable[[Any], None]] = {
            Report: monitor.report,
            NotReady: monitor.not_ready,
            DriverEvent: monitor.event,
            Failure: monitor.call_failed,
        }
        handlers[type(message)](message)
        observer = Observer(node, Registrations(counters), counters, Watchdog(), monitor)
        Pages().page(observer.snapshot(), counters, "", "")

    trio.run(run)


# HTTP

PIECES: Final = [
    *(
        b"GET ",
        b"HEAD ",
        b"POST ",
        b"CONNECT ",
        b"/hello",
        b"/bug",
        b"/tell",
        b"*",
        b"http://x/hello",
        b" HTTP/1.1",
        b" HTTP/1",
    ),
    *(b"\r\n", b"\n", b"\r\n\r\n", b": ", b"\0", b"\xff", b"0\r\n\r\n", http.HOST, http.HELLO, http.HELLO[:-2]),
    *(b"Connection: close\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n"),
    *(b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n", HELLO, b"x" * 5000),
]


ASKED: Final = st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join)
TOLD: Final = http.posting(b"/tell", b"{}")


@given(st.lists(ASKED | mutated(http.HELLO) | mutated(TOLD), max_size=4))
@virtual
async def test_http(sent: list[bytes]) -> None:
    """Answer in HTTP or hang up, raise nothing, and end when the peer hangs up."""
    with limited():
        received = await talk(Server(http.ROUTES, http.POSTS).serve_connection, *sent)
    assert received == b"" or received.startswith(b"HTTP/1.1 ")


@given(near({"gpu": "0", "reason": "bad row"}).map(lambda order: json.dumps(order).encode()) | st.binary(max_size=40))
def test_order(body: bytes) -> None:
    """Take an order to cordon a GPU, or refuse it."""
    with suppress(BadOrderError):
        order = decode_order(body)
        with suppress(NoSuchGpuError):
            assert find_gpu(order.gpu, simulated_gpus(2)) in simulated_gpus(2)


async def talk(serve: Callable[[trio.abc.Stream], Awaitable[None]], *sent: bytes) -> bytes:
    """Send these to a server, one by one, and hang up. Returns what it answered: of each answer the begin at least."""
    ours, theirs = trio.testing.memory_stream_pair()
    received = b""
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, ours)
            with suppress(trio.BrokenResourceError):
                for each in sent:
                    await theirs.send_all(each)
                    with trio.move_on_after(1):
                        for _ in range(20):
                            received += await theirs.receive_some()
            await theirs.aclose()
    return received


# gRPC: who serves

CALLED: Final = (ECHO, BIG, FLOOD, WAIT, WATCH, REFUSE, "/test.Service/Nope")
STREAMS: Final = st.sampled_from((0, 1, 2, 3, 5, 2**31 - 1))
COUNTS: Final = st.sampled_from((0, 1, 2, 100, 16384, 65535, 2**31 - 1, 2**31))
PAYLOADS: Final = st.builds(
    message,
    st.binary(max_size=8),
    compressed=st.booleans(),
    length=st.none() | st.sampled_from((0, 2, 5 << 20, 2**32 - 1)),
)
VALUES: Final = st.sampled_from((None, "", "x", "GET", "application/grpc", "application/grpc+json", "1S", b"\xff"))
FRAMES: Final = (
    st.builds(request, STREAMS, st.sampled_from(CALLED), st.sampled_from([text("3").SerializeToString(), b"\xff"]))
    | st.builds(
        lambda stream, end, fields: request_headers(stream, end=end, **fields),
        STREAMS,
        st.booleans(),
        st.dictionaries(st.sampled_from(("method", "path", "te", "content_type", "grpc_timeout", "x_bin")), VALUES),
    )
    | st.builds(lambda stream, payload, end: data(stream, payload, end=end), STREAMS, PAYLOADS, st.booleans())
    | st.builds(reset, STREAMS)
    | st.builds(window_update, STREAMS, COUNTS)
    | st.builds(lambda value: settings(initial_window_size=value), COUNTS)
    | st.builds(lambda value: settings(max_frame_size=value), COUNTS)
    | st.sampled_from([ping(), goaway(), settings(), http2_frame(0x4, 0x1, 0)])
    | st.builds(http2_frame, st.integers(0, 11), st.integers(0, 255), STREAMS, st.binary(max_size=40))
)
SENT: Final = st.lists(
    st.lists(FRAMES, max_size=6).map(b"".join) | mutated(HELLO + request(1, ECHO) + request(3, WATCH)), max_size=4
)


class Answers(Methods):
    """Methods that take any message."""

    def big(self, _: BytesValue) -> BytesValue:
        return BytesValue(value=bytes(99_999))


@contextmanager
def no_errors() -> Iterator[None]:
    """Fail for a line of the log that is an error."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(f"{record.getMessage()} {record.exc_info}")  # type: ignore[method-assign]
    logging.getLogger("sgpu").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("sgpu").removeHandler(handler)
    assert errors == []


@given(SENT)
@virtual
async def test_grpc_server(sent: list[bytes]) -> None:
    """Raise nothing and log no error, leave no call, and end when the peer hangs up, be it in the middle."""
    methods = Answers()
    with limited(), no_errors():
        await talk(partial(rpc.serve_connection, methods.routes()), HELLO, *sent)
    assert methods.waiting == 0


# gRPC: who asks

PODS: Final = podresources_pb2.ListPodResourcesResponse(
    pod_resources=[
        podresources_pb2.PodResources(
            name="web",
            namespace="team",
            containers=[
                podresources_pb2.ContainerResources(
                    name="main",
                    devices=[podresources_pb2.ContainerDevices(resource_name="r", device_ids=["GPU-a::0", "x"])],
                )
            ],
        )
    ]
).SerializeToString()
STATUSES: Final = st.sampled_from(("0", "5", "12", "99", "-1", "x", b"\xff"))


def answer(pods: bytes, status: str | bytes = "0", said: str | bytes = "%C3%A4") -> bytes:
    """What a kubelet sends."""
    begin = header_block(1, {":status": "200", "content-type": "application/grpc+proto"})
    end = header_block(1, {"grpc-status": status, "grpc-message": said}, end=True)
    return settings() + begin + data(1, message(pods), end=False) + end


ANSWERS: Final = (
    st.builds(answer, mutated(PODS), STATUSES, st.sampled_from(("", "%", "%ff", "x" * 5000, b"\xff")))
    | mutated(answer(PODS))
    | st.lists(FRAMES, max_size=6).map(b"".join)
)


@given(st.lists(ANSWERS, max_size=3))
@example([answer(PODS, "5", "x" * 5000)])  # all of it was quoted
@virtual
async def test_pod_resources(sent: list[bytes]) -> None:
    """Return the shares that containers have, or raise PodResourcesError, in time, whatever the socket's owner says."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def connect(_: str) -> trio.abc.Stream:
        return ours

    async def send() -> None:
        with suppress(trio.BrokenResourceError):
            for each in sent:
                await theirs.send_all(each)
                await trio.testing.wait_all_tasks_blocked()

    with limited(), pytest.MonkeyPatch.context() as patch, trio.fail_after(60):
        patch.setattr(trio, "open_unix_socket", connect)
        async with beside(send):
            try:
                async with open_lister(Path("socket")) as lister:
                    held = await lister.list_holders(["r"])
            except PodResourcesError as error:
                check_message(error)
            else:
                assert all(isinstance(share, Share) for share in held.shares["r"])
