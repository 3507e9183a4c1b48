"""Server and client against each other, against grpcio, and against peers that do what those two don't."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent import futures
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import pytest
import trio
import trio.testing
import virtual_clock
from google.protobuf.wrappers_pb2 import BytesValue
from purerpc import Cardinality, RPCSignature, Service, StatusCode
from purerpc.grpclib import events
from rpc_peer import (
    BIG,
    BUG,
    COUNT,
    ECHO,
    FLOOD,
    HELLO,
    LATE_BUG,
    PREFACE,
    REFUSAL,
    REFUSE,
    SERVICE,
    TIMEOUT,
    WAIT,
    WATCH,
    Methods,
    Reader,
    data,
    goaway,
    header_block,
    headers,
    message,
    request,
    reset,
    serving,
    settings,
    text,
    window_update,
)

from sgpu.rpc import (
    MAX_MESSAGE_BYTES,
    BrokenPeerError,
    Channel,
    Route,
    RpcError,
    open_channel,
    routes,
    serve_connection,
    unary_call,
)
from sgpu.rpc.protocol import Protocol, StreamReset

T = TypeVar("T")

#: Bytes in a message that just fits: gRPC counts the message, in which BytesValue takes 5 bytes for itself.
FITTING: Final = MAX_MESSAGE_BYTES - 5
PATTERN: Final = bytes(range(256)) * (MAX_MESSAGE_BYTES // 256)
WIDE: Final = 2**31 - 1
UNKNOWN: Final = "/test.Service/Nope"
#: What would hang fails at once.
virtual = partial(virtual_clock.virtual, seconds=TIMEOUT)


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return the log, all of it at that level."""
    assert {record.levelno for record in caplog.records} <= {level}
    return [record.getMessage() for record in caplog.records]


#: Calls of no method, whose answers are more than is kept for a peer that does not read them.
MANY: Final = 3000
UNREAD: Final = [
    b"".join(request(2 * number + 1, f"/test.Service/{1200 * 'x'}") for number in range(first, first + 25))
    for first in range(0, MANY, 25)
]


class Garbage:
    """Stands for a message, and is none."""

    def SerializeToString(self) -> bytes:
        return b"\xff"


class Peer:
    """The other end of a connection, by hand: sends what the test says, and understands what it gets."""

    #: Calls that may be made, on HTTP/2 streams 1, 3, 5 and so on.
    CALLS: Final = 10

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.messages: dict[int, list[bytes]] = {}
        self.statuses: dict[int, StatusCode] = {}
        self.resets: dict[int, str] = {}
        self._protocol = Protocol(client_side=True)
        for _ in range(self.CALLS):  # answers are taken only to what was asked
            self._protocol.start_request(ECHO)

    async def send(self, raw: bytes) -> None:
        await self.stream.send_all(raw)

    async def receive(self) -> bool:
        """Take in the next bytes. Returns whether there were any."""
        received = await self.stream.receive_some()
        for event in self._protocol.receive(bytes(received)):
            if isinstance(event, events.MessageReceived):
                self.messages.setdefault(event.stream_id, []).append(event.data)
            elif isinstance(event, events.ResponseEnded):
                self.statuses[event.stream_id] = event.status.status_code
            elif isinstance(event, StreamReset):
                self.resets[event.stream_id] = event.reason
        return bool(received)

    async def status(self, stream_id: int) -> StatusCode:
        """How the call ended, once it has."""
        while stream_id not in self.statuses:
            assert await self.receive(), "the server hung up"
        return self.statuses[stream_id]

    async def wait_hung_up(self) -> None:
        while await self.receive():
            pass


@asynccontextmanager
async def served(
    table: Mapping[str, Route],
    pair: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]] = trio.testing.memory_stream_pair,
    ended: Callable[[str, str, float], None] = lambda *_: None,
) -> AsyncIterator[Peer]:
    """The peer of a connection that is served, and whose serving must end when the peer goes."""
    ours, theirs = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, table, ours, ended)
        yield Peer(theirs)
        await theirs.aclose()


@asynccontextmanager
async def channel_to(
    table: Mapping[str, Route], ended: Callable[[str, str, float], None] = lambda *_: None
) -> AsyncIterator[Channel]:
    """Our client, connected to our server."""
    async with served(table, ended=ended) as peer:
        yield Channel(peer.stream, Protocol(client_side=True))


class TestTogether:
    """Our client with our server."""

    @pytest.mark.parametrize("count", [0, 1, 1000])
    @virtual
    async def test_a_stream_is_answered(self, count: int) -> None:
        """Deliver all messages, in order."""
        async with (
            channel_to(Methods().routes()) as channel,
            aclosing(channel.streaming(COUNT, text(str(count)), BytesValue)) as responses,
        ):
            assert [response async for response in responses] == [text(str(number)) for number in range(count)]

    @pytest.mark.parametrize("size", [3, 200_000], ids=["short", "longer than the window"])
    @virtual
    async def test_a_handler_that_does_not_wait(self, size: int) -> None:
        """Answer what is no coroutine, in one piece or as the window opens."""
        async with channel_to(Methods().routes()) as channel:
            assert await channel.unary(BIG, text(str(size)), BytesValue) == BytesValue(value=bytes(size))

    @virtual
    async def test_a_channel_takes_one_call_after_the_other(self) -> None:
        """Go on after calls that failed and streams that were left early, which then end at the server."""
        methods = Methods()
        async with channel_to(methods.routes()) as channel:
            for number in range(10):
                with pytest.raises(RpcError, match="NOT_FOUND"):
                    await channel.unary(REFUSE, text(""), BytesValue)
                for method in (COUNT, WATCH):
                    async with aclosing(channel.streaming(method, text("100"), BytesValue)) as responses:
                        async for _ in responses:
                            break
                assert methods.waiting == 1
                assert await channel.unary(ECHO, text(str(number)), BytesValue) == text(str(number))
                await methods.wait_waiting(0)

    @pytest.mark.parametrize(
        ("method", "argument", "code", "said"),
        [
            pytest.param(REFUSE, "", StatusCode.NOT_FOUND, REFUSAL, id="refused"),
            pytest.param(UNKNOWN, "", StatusCode.UNIMPLEMENTED, UNKNOWN, id="no such method"),
            pytest.param(BUG, "", StatusCode.UNKNOWN, BUG, id="bug"),
            pytest.param(LATE_BUG, "", StatusCode.UNKNOWN, LATE_BUG, id="bug after an answer"),
            pytest.param(COUNT, "0", StatusCode.INTERNAL, COUNT, id="no answer"),
            pytest.param(COUNT, "2", StatusCode.INTERNAL, COUNT, id="two answers"),
            pytest.param(BIG, str(FITTING + 1), StatusCode.RESOURCE_EXHAUSTED, "4194305", id="too long"),
        ],
    )
    @virtual
    async def test_a_failed_call_says_why(self, method: str, argument: str, code: StatusCode, said: str) -> None:
        """Raise RpcError with the whole message, whatever is in it, and go on with the connection."""
        async with channel_to(Methods().routes()) as channel:
            with pytest.raises(RpcError) as caught:
                await channel.unary(method, text(argument), BytesValue)
            assert caught.value.code is code
            assert said in caught.value.message
            assert await channel.unary(ECHO, text("next"), BytesValue) == text("next")

    @virtual
    async def test_a_message_of_another_type_is_refused(self) -> None:
        """Answer INVALID_ARGUMENT as the server, raise INTERNAL as the client."""
        table = {**Methods().routes(), BIG: Route(lambda _: Garbage(), BytesValue, streams=False)}
        async with channel_to(table) as channel:
            with pytest.raises(RpcError, match=r"INVALID_ARGUMENT.*BytesValue"):
                await channel.unary(ECHO, Garbage(), BytesValue)
            with pytest.raises(RpcError, match=r"INTERNAL.*/test\.Service/Big.*BytesValue"):
                await channel.unary(BIG, text(""), BytesValue)

    @pytest.mark.parametrize(
        ("said", "heard"),
        [
            pytest.param("stray byte \udcff", "stray byte ?", id="surrogate"),
            pytest.param("x" * 100_000, "x" * 1000, id="long"),
        ],
    )
    @virtual
    async def test_any_error_message_arrives(self, said: str, heard: str) -> None:
        """Leave out what a header can't carry; deliver the code in any case."""

        async def fail(_: BytesValue) -> BytesValue:
            raise RpcError(StatusCode.ABORTED, said)

        async with channel_to({ECHO: Route(fail, BytesValue, streams=False)}) as channel:
            with pytest.raises(RpcError) as caught:
                await channel.unary(ECHO, text(""), BytesValue)
        assert (caught.value.code, caught.value.message) == (StatusCode.ABORTED, heard)

    @pytest.mark.parametrize("method", [BUG, LATE_BUG])
    @virtual
    async def test_a_bug_is_logged_with_its_traceback(self, method: str, caplog: pytest.LogCaptureFixture) -> None:
        """Log one error that names the method."""
        async with channel_to(Methods().routes()) as channel:
            with pytest.raises(RpcError):
                await channel.unary(method, text(""), BytesValue)
        (line,) = logged(caplog, logging.ERROR)
        assert method in line
        assert "ZeroDivisionError: a bug in the handler" in caplog.text

    @virtual
    async def test_a_bug_in_a_clean_up_ends_no_more_than_its_call(self, caplog: pytest.LogCaptureFixture) -> None:
        """Log an error of a call that is being cancelled, in a group with Cancelled, after a reset or at the end."""

        async def broken_clean_up() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError("a bug in the clean-up")

        async def handler(message: BytesValue) -> BytesValue:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(broken_clean_up)
                nursery.start_soon(trio.sleep_forever)
            return message

        async with served({**Methods().routes(), WAIT: Route(handler, BytesValue, streams=False)}) as peer:
            await peer.send(HELLO + request(1, WAIT) + request(3, WAIT))
            await trio.testing.wait_all_tasks_blocked()
            await peer.send(reset(1) + request(5, ECHO))
            assert await peer.status(5) is StatusCode.OK
        first, second = logged(caplog, logging.ERROR)
        assert WAIT in first
        assert WAIT in second

    @pytest.mark.parametrize("cardinality", [Cardinality.STREAM_UNARY, Cardinality.STREAM_STREAM])
    def test_methods_that_stream_requests_are_not_served(self, cardinality: Cardinality) -> None:
        """Raise NotImplementedError when the table is made, not when somebody calls."""
        service = Service(SERVICE)
        service.add_method("Echo", Methods().echo, RPCSignature(cardinality, BytesValue, BytesValue))
        with pytest.raises(NotImplementedError, match=r"test\.Service/Echo"):
            routes([service])


#: By the status that answers them.
BAD_CALLS: Final = {
    StatusCode.INVALID_ARGUMENT: {
        "no body": headers(1, end=True),
        "empty body": headers(1) + data(1, b""),
        "half a message header": headers(1) + data(1, b"\0\0\0"),
        "half a message": headers(1) + data(1, message(length=7)),
        "two messages": headers(1) + data(1, 2 * message()),
        "a second message and no end": headers(1) + 2 * data(1, message(), end=False),
    },
    StatusCode.UNIMPLEMENTED: {
        "compressed": headers(1, grpc_encoding="deflate") + data(1, message(b"x", compressed=True)),
        "no method": headers(1, path="//") + data(1, message()),
        "no path of gRPC": headers(1, path="/a/b/c") + data(1, message()),
        "long method": headers(1, path="/a/" + 3000 * "%F0") + data(1, message()),
    },
    StatusCode.RESOURCE_EXHAUSTED: {
        "too long, from its header alone": headers(1) + data(1, message(length=MAX_MESSAGE_BYTES + 1), end=False)
    },
}


class TestPeers:
    """Our server with peers whose every byte is chosen. That it survives them by the thousand is in test_rpc_abuse."""

    @pytest.mark.parametrize(
        ("sent", "code"),
        [pytest.param(sent, code, id=name) for code in BAD_CALLS for name, sent in BAD_CALLS[code].items()],
    )
    @virtual
    async def test_a_bad_call_gets_a_status_and_the_connection_goes_on(self, sent: bytes, code: StatusCode) -> None:
        """Answer it, and the calls after it."""
        async with served(Methods().routes()) as peer:
            await peer.send(HELLO + sent)
            assert await peer.status(1) is code
            await peer.send(request(3, ECHO))
            assert await peer.status(3) is StatusCode.OK

    @pytest.mark.parametrize(
        "rest",
        [
            pytest.param(data(1, bytes(100), end=False), id="goes on"),
            pytest.param(data(1, bytes(100)), id="ends"),
            pytest.param(reset(1), id="is reset"),
        ],
    )
    @pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
    @virtual
    async def test_the_rest_of_a_refused_request_is_ignored(self, rest: bytes, *, at_once: bool) -> None:
        """Ask for no more of it, and accept what was under way."""
        async with served(Methods().routes()) as peer:
            refused = headers(1) + data(1, 3 * message(), end=False)
            await peer.send(HELLO + refused + (rest if at_once else b""))
            if not at_once:
                assert await peer.status(1) is StatusCode.INVALID_ARGUMENT
                assert peer.resets == {1: "NO_ERROR"}
                await peer.send(rest)
            await peer.send(request(3, ECHO))
            assert await peer.status(3) is StatusCode.OK

    @virtual
    async def test_goodbye_ends_no_call(self) -> None:
        """Answer the calls that a peer made before it said GOAWAY."""
        async with served(Methods().routes()) as peer:
            await peer.send(HELLO + headers(1, path=ECHO) + goaway() + data(1, message()))
            assert await peer.status(1) is StatusCode.OK

    @virtual
    async def test_a_late_window_update_is_ignored(self) -> None:
        """Accept one for a call that has ended when the next has begun: who reads a long answer slowly sends it."""
        methods = Methods()
        async with served(methods.routes()) as peer:
            await peer.send(HELLO + request(1, ECHO) + request(3, WATCH))
            await peer.status(1)
            await peer.send(request(5, ECHO) + window_update(1, 1000))
            assert await peer.status(5) is StatusCode.OK
            assert methods.waiting == 1

    @pytest.mark.parametrize("method", [WAIT, WATCH])
    @virtual
    async def test_a_reset_ends_its_call_and_no_other(self, method: str) -> None:
        """Cancel the handler on RST_STREAM."""
        methods = Methods()
        async with served(methods.routes()) as peer:
            await peer.send(HELLO + request(1, method) + request(3, method))
            await methods.wait_waiting(2)
            await peer.send(reset(1))
            await methods.wait_waiting(1)

    @pytest.mark.parametrize("method", [ECHO, BIG, COUNT, BUG, UNKNOWN])
    @virtual
    async def test_a_call_that_is_reset_before_it_began_is_not_answered(self, method: str) -> None:
        """Ignore a request with RST_STREAM in one piece."""
        async with served(Methods().routes()) as peer:
            await peer.send(HELLO + request(1, method, text("3").SerializeToString()) + reset(1) + request(3, ECHO))
            assert await peer.status(3) is StatusCode.OK
            assert peer.statuses == {3: StatusCode.OK}

    @pytest.mark.parametrize("method", [WAIT, WATCH, FLOOD])
    def test_the_end_of_the_connection_ends_its_calls(self, method: str) -> None:
        """Cancel handlers, whether they wait for something of their own or for the peer to read."""
        methods = Methods()

        @virtual
        async def connect_and_go() -> None:
            async with served(methods.routes()) as peer:
                await peer.send(HELLO + request(1, method))
                await methods.wait_waiting(1)

        connect_and_go()
        assert methods.waiting == 0

    @virtual
    async def test_an_answer_waits_for_the_window(self) -> None:
        """Send what the peer admits, the rest as soon as it admits more, and other calls' answers meanwhile."""
        async with served(Methods().routes()) as peer:
            await peer.send(PREFACE + settings(initial_window_size=10))
            await peer.send(request(1, BIG, text("20").SerializeToString()) + request(3, ECHO))
            assert await peer.status(3) is StatusCode.OK
            await trio.testing.wait_all_tasks_blocked()
            assert peer.statuses.keys() == {3}
            await peer.send(settings(initial_window_size=5))  # less than is in use
            await peer.send(window_update(1, 21) + settings(initial_window_size=100))
            assert await peer.status(1) is StatusCode.OK
            assert peer.messages[1] == [BytesValue(value=bytes(20)).SerializeToString()]

    @virtual
    async def test_a_peer_that_does_not_read_is_not_written_for(self) -> None:
        """Make no more than a few messages until the peer reads, however wide its window; obey RST_STREAM."""
        methods = Methods()
        async with served(methods.routes(), trio.testing.lockstep_stream_pair) as peer:
            wide = settings(initial_window_size=WIDE, max_frame_size=2**24 - 1) + window_update(0, WIDE - 65535)
            await peer.send(HELLO + wide + request(1, FLOOD))
            await trio.testing.wait_all_tasks_blocked()
            assert methods.taken < 10
            await peer.send(reset(1))
            await methods.wait_waiting(0)

    @pytest.mark.parametrize("request_", [headers(1, method="GET"), headers(1, content_type="text/html")])
    @virtual
    async def test_what_is_no_grpc_gets_an_http_status(self, request_: bytes) -> None:
        """Answer 415, ignore the rest of it, and go on with the connection."""
        async with served(Methods().routes()) as peer:
            await peer.send(HELLO + request_ + data(1, b"x", end=False))
            with pytest.raises(BrokenPeerError, match="415"):
                await peer.wait_hung_up()
            await peer.send(data(1, b"x") + request(3, ECHO))
            assert await peer.status(3) is StatusCode.OK

    @virtual
    async def test_a_peer_that_does_not_hear_is_not_read_from(self) -> None:
        """Bound the answers to calls that are refused, and read on when the peer does."""
        sent = 0

        async def ask(peer: Peer) -> None:
            nonlocal sent
            await peer.send(HELLO)
            for refused in UNREAD:
                await peer.send(refused)
                sent += 1

        async with (
            served(Methods().routes(), trio.testing.lockstep_stream_pair) as peer,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(ask, peer)
            await trio.testing.wait_all_tasks_blocked()
            assert 10 < sent < len(UNREAD) / 2
            await Reader(peer.stream).wait_end(2 * MANY - 1)

    @virtual
    async def test_a_peer_that_did_not_hear_may_go(self) -> None:
        """End, though the server neither reads nor writes at that moment."""
        async with served(Methods().routes(), trio.testing.lockstep_stream_pair) as peer:
            with trio.move_on_after(1):
                await peer.send(HELLO + b"".join(UNREAD))

    @virtual
    async def test_too_many_calls_close_the_connection(self, caplog: pytest.LogCaptureFixture) -> None:
        """Cancel all of its calls, and log the limit."""
        methods = Methods()
        async with served(methods.routes()) as peer:
            await peer.send(HELLO + b"".join(request(2 * n + 1, WAIT) for n in range(128)))
            await methods.wait_waiting(128)
            await peer.send(request(257, WAIT))
            await methods.wait_waiting(0)
            await peer.wait_hung_up()
        (line,) = logged(caplog, logging.WARNING)
        assert "128" in line

    @pytest.mark.parametrize(
        ("sent", "said"),
        [
            pytest.param(b"GET / HTTP/1.1\r\n\r\n", "b'GET / HTTP/1.1", id="HTTP/1"),
            pytest.param(HELLO + headers(1, te="gzip"), "'te': 'gzip'", id="no trailers"),
            pytest.param(HELLO + headers(1, path=b"/\xff/x"), "UTF-8", id="not UTF-8"),
            pytest.param(HELLO + data(1, message()), "DATA on stream 1", id="data of no call"),
            pytest.param(HELLO + data(1, bytes(20_000))[:9], "20000", id="long frame"),
        ],
    )
    @virtual
    async def test_a_broken_peer_is_hung_up_on(self, sent: bytes, said: str, caplog: pytest.LogCaptureFixture) -> None:
        """Log one warning that says what the peer did."""
        async with served(Methods().routes()) as peer:
            await peer.send(sent)
            await peer.wait_hung_up()
        (line,) = logged(caplog, logging.WARNING)
        assert said in line
        assert "BrokenPeerError" not in line  # which says nothing, and wraps nothing


class TestEnded:
    """Reports of each call, for metrics."""

    @pytest.mark.parametrize(
        ("method", "reported"),
        [
            pytest.param(ECHO, [("Echo", "OK", 0.0)], id="answered"),
            pytest.param(REFUSE, [("Refuse", "NOT_FOUND", 0.0)], id="refused"),
            pytest.param(BUG, [("Bug", "UNKNOWN", 0.0)], id="bug"),
            pytest.param(UNKNOWN, [], id="no such method"),
        ],
    )
    @virtual
    async def test_how_it_ended(self, method: str, reported: list[tuple[str, str, float]]) -> None:
        """Report name and status, but no name that a peer made up: there is no end to those."""
        ended: list[tuple[str, str, float]] = []
        async with channel_to(Methods().routes(), lambda *call: ended.append(call)) as channel:
            with suppress(RpcError):
                await channel.unary(method, text(""), BytesValue)
        assert ended == reported

    @virtual
    async def test_how_long_it_took(self) -> None:
        """Report the time from its first frame until it is answered, or given up; of a stream, until its end."""
        ended: list[tuple[str, str, float]] = []

        async def slow(message: BytesValue) -> BytesValue:
            await trio.sleep(2)
            return message

        table = {**Methods().routes(), ECHO: Route(slow, BytesValue, streams=False)}
        async with channel_to(table, lambda *call: ended.append(call)) as channel:
            await channel.unary(ECHO, text(""), BytesValue)
            with trio.move_on_after(1):
                await channel.unary(WATCH, text(""), BytesValue)
        assert [call[:2] for call in ended] == [("Echo", "OK"), ("Watch", "CANCELLED")]
        assert [seconds for *_, seconds in ended] == pytest.approx([2, 1])


class TestServerCancellation:
    """`serve_connection` where it waits: it ends, it lets Cancelled through, and the peer sees the end."""

    @pytest.mark.parametrize(
        ("sent", "reads"),
        [
            pytest.param(b"", True, id="before the first byte"),
            pytest.param(HELLO, True, id="idle"),
            pytest.param(HELLO + headers(1) + b"\0\0", True, id="within a request"),
            pytest.param(HELLO + request(1, WAIT), True, id="handler waits"),
            pytest.param(HELLO + request(1, WATCH), True, id="generator waits"),
            pytest.param(HELLO + request(1, FLOOD), True, id="window closed"),
            pytest.param(HELLO + window_update(0, WIDE - 65535) + request(1, FLOOD), False, id="writer blocked"),
            pytest.param(HELLO + b"".join(UNREAD), False, id="writer and reader blocked"),
        ],
    )
    @virtual
    async def test_cancelled_is_not_swallowed(
        self, sent: bytes, *, reads: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """End all tasks at once."""
        methods = Methods()
        ours, theirs = trio.testing.lockstep_stream_pair()
        scope = trio.CancelScope()

        async def serve() -> None:
            with scope:
                await serve_connection(methods.routes(), ours)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            if reads:
                nursery.start_soon(Peer(theirs).wait_hung_up)
            with trio.move_on_after(1):
                await theirs.send_all(sent)
            await trio.testing.wait_all_tasks_blocked()
            before = trio.current_time()
            scope.cancel()
        assert trio.current_time() == before
        assert scope.cancelled_caught
        assert methods.waiting == 0
        assert not caplog.records


#: What a server says by and by to the first call of a client.
BEGIN: Final = settings() + header_block(1, {":status": "200", "content-type": "application/grpc"})
FIRST: Final = data(1, message(text("first").SerializeToString()), end=False)
END: Final = header_block(1, {"grpc-status": "0"}, end=True)
REFUSED: Final = header_block(1, {"grpc-status": "5", "grpc-message": "why%20not"}, end=True)


@asynccontextmanager
async def channel_to_script(*answers: bytes) -> AsyncIterator[Channel]:
    """A channel to a server that sends the next of `answers` whenever it has received something, then hangs up."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def answer() -> None:
        async with theirs:
            for raw in answers:
                await theirs.receive_some()
                await theirs.send_all(raw)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        yield Channel(ours, Protocol(client_side=True))
        await ours.aclose()


class TestServers:
    """Our client with servers whose every byte is chosen."""

    @pytest.mark.parametrize(
        ("answer", "error", "said"),
        [
            pytest.param(b"", trio.BrokenResourceError, "", id="gone"),
            pytest.param(BEGIN, trio.BrokenResourceError, "", id="gone within the answer"),
            pytest.param(BEGIN + FIRST[:-1], trio.BrokenResourceError, "", id="gone within a message"),
            pytest.param(BEGIN + FIRST + data(1, b""), trio.BrokenResourceError, "", id="end without a status"),
            pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", BrokenPeerError, "4740180", id="HTTP/1"),
            pytest.param(bytes(100), BrokenPeerError, "SETTINGS", id="zeros"),
            pytest.param(
                settings() + header_block(1, {":status": "404"}, end=True), BrokenPeerError, "http status", id="404"
            ),
            pytest.param(
                BEGIN + FIRST + header_block(1, {"x": "y"}, end=True), BrokenPeerError, "grpc-status", id="no status"
            ),
            pytest.param(BEGIN + reset(1), RpcError, "CANCELLED.*/test.Service/Echo.*CANCEL", id="reset"),
            pytest.param(BEGIN + REFUSED, RpcError, "NOT_FOUND: why not", id="refused"),
            pytest.param(BEGIN + FIRST + REFUSED, RpcError, "NOT_FOUND: why not", id="refused after a message"),
            pytest.param(
                BEGIN + data(1, message(b"x", compressed=True), end=False) + END,
                RpcError,
                "UNIMPLEMENTED",
                id="compressed",
            ),
        ],
    )
    @virtual
    async def test_what_is_no_answer_is_an_error(self, answer: bytes, error: type[Exception], said: str) -> None:
        """Raise the kind of error that says whose fault it is."""
        async with channel_to_script(answer) as channel:
            with pytest.raises(error, match=said or None):
                await channel.unary(ECHO, text(""), BytesValue)

    @virtual
    async def test_a_stream_that_breaks_off_gives_what_came_before(self) -> None:
        """Yield it, then raise BrokenResourceError."""
        async with (
            channel_to_script(BEGIN + FIRST) as channel,
            aclosing(channel.streaming(WATCH, text(""), BytesValue)) as responses,
        ):
            assert await anext(responses) == text("first")
            with pytest.raises(trio.BrokenResourceError):
                await anext(responses)

    @virtual
    async def test_what_is_no_part_of_the_answer_is_ignored(self) -> None:
        """Return the answer whatever the server says beside it."""
        interim = header_block(1, {":status": "103"})
        async with channel_to_script(settings() + goaway() + interim + BEGIN + FIRST + END) as channel:
            assert await channel.unary(ECHO, text(""), BytesValue) == text("first")

    @virtual
    async def test_a_request_waits_for_the_window(self) -> None:
        """Send what the server admits, also when it closes the window again while the request is on its way."""
        received = b""
        ours, theirs = trio.testing.memory_stream_pair()

        async def answer() -> None:
            nonlocal received
            for raw in (
                settings(initial_window_size=5),
                settings(initial_window_size=0) + window_update(1, 3),
                window_update(1, 20),
            ):
                await theirs.send_all(raw)
                await trio.testing.wait_all_tasks_blocked()
            for event in Protocol(client_side=False).receive(bytes(await theirs.receive_some())):
                received += getattr(event, "data", b"")
            await theirs.send_all(BEGIN + FIRST + END)

        await theirs.send_all(settings(initial_window_size=5))
        channel = Channel(ours, Protocol(client_side=True))
        channel.protocol.receive(bytes(await ours.receive_some()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            assert await channel.unary(ECHO, text("0123456789"), BytesValue) == text("first")
        assert received == text("0123456789").SerializeToString()

    @virtual
    async def test_a_refusal_is_heard_before_the_request_is_sent(self) -> None:
        """Raise it while the server opens no window for the rest of the request."""
        refusal = settings(initial_window_size=0) + BEGIN + REFUSED + reset(1)
        async with channel_to_script(refusal) as channel:
            with pytest.raises(RpcError, match="NOT_FOUND"):
                await channel.unary(ECHO, BytesValue(value=bytes(100_000)), BytesValue)

    @virtual
    async def test_a_server_that_admits_no_call_is_broken(self) -> None:
        """Raise BrokenPeerError, once there has been a call from whose answer the settings are known."""
        async with channel_to_script(BEGIN + FIRST + settings(max_concurrent_streams=0) + END) as channel:
            assert await channel.unary(ECHO, text(""), BytesValue) == text("first")
            with pytest.raises(BrokenPeerError):
                await channel.unary(ECHO, text(""), BytesValue)


class TestClientCancellation:
    """A call where it waits: Cancelled comes through, at once."""

    @pytest.mark.parametrize(
        ("reads", "answer", "size"),
        [
            pytest.param(False, b"", 0, id="sending"),
            pytest.param(True, b"", 0, id="waiting for the first byte"),
            pytest.param(True, BEGIN + FIRST, 0, id="waiting for the next message"),
            pytest.param(True, settings(), 100_000, id="waiting for the window"),
        ],
    )
    @virtual
    async def test_cancelled_is_not_swallowed(self, answer: bytes, size: int, *, reads: bool) -> None:
        """Raise nothing else in its place."""
        ours, theirs = trio.testing.lockstep_stream_pair()
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                channel = Channel(ours, Protocol(client_side=True))
                await channel.unary(ECHO, BytesValue(value=bytes(size)), BytesValue)

        async def read() -> None:
            while await theirs.receive_some():
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            if reads:
                nursery.start_soon(read)
                await theirs.send_all(answer)
            await trio.testing.wait_all_tasks_blocked()
            before = trio.current_time()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert scope.cancelled_caught
            assert trio.current_time() == before
            nursery.cancel_scope.cancel()

    @virtual_clock.real
    async def test_a_cancelled_call_closes_its_connection(self, tmp_path: Path) -> None:
        """Cancel `unary_call` while it connects and while it waits for an answer."""
        methods = Methods()
        async with serving(methods.routes(), tmp_path / "s"):
            with trio.CancelScope() as scope:
                scope.cancel()
                await unary_call(tmp_path / "s", WAIT, text(""), BytesValue)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(unary_call, tmp_path / "s", WAIT, text(""), BytesValue)
                await methods.wait_waiting(1)
                nursery.cancel_scope.cancel()
            await methods.wait_waiting(0)


class Caller:
    """A grpcio client, in a thread of its own: a second opinion on what the server says."""

    def __init__(self, channel: grpc.Channel, methods: Methods) -> None:
        self._channel = channel
        self._methods = methods

    def unary(self, method: str, value: bytes) -> bytes:
        call = self._channel.unary_unary(method, BytesValue.SerializeToString, BytesValue.FromString)
        answer: BytesValue = call(BytesValue(value=value), timeout=TIMEOUT)
        return answer.value

    def watch(self) -> Any:  # noqa: ANN401  # grpcio's call
        call = self._channel.unary_stream(WATCH, BytesValue.SerializeToString, BytesValue.FromString)
        return call(BytesValue(), timeout=TIMEOUT)

    def wait_waiting(self, count: int) -> None:
        trio.from_thread.run(self._methods.wait_waiting, count)


def with_grpcio(path: Path, body: Callable[[Caller], T]) -> T:
    """Run `body` with a grpcio client of our server."""
    methods = Methods()
    local = ("grpc.use_local_subchannel_pool", 1)  # connections are not shared between tests

    def call() -> T:
        with grpc.insecure_channel(f"unix:{path}", options=[local]) as channel:
            return body(Caller(channel, methods))

    async def main() -> T:
        async with serving(methods.routes(), path):
            return await trio.to_thread.run_sync(call)

    return trio.run(main)


class TestGrpcioClient:
    """Our server as an independent client sees it."""

    def test_the_largest_message_passes_both_ways(self, tmp_path: Path) -> None:
        """Take and send 4 MiB, by flow control."""
        value = PATTERN[:FITTING]
        assert with_grpcio(tmp_path / "s", lambda client: client.unary(ECHO, value)) == value

    def test_many_calls_at_once(self, tmp_path: Path) -> None:
        """Make no call on a connection wait for another."""

        def body(client: Caller) -> list[bytes]:
            with futures.ThreadPoolExecutor(20) as pool:
                big = [pool.submit(client.unary, BIG, b"3000000") for _ in range(5)]
                small = [pool.submit(client.unary, ECHO, b"%d" % number) for number in range(100)]
                assert {len(call.result()) for call in big} == {3_000_000}
                return [call.result() for call in small]

        assert with_grpcio(tmp_path / "s", body) == [b"%d" % number for number in range(100)]

    def test_errors(self, tmp_path: Path) -> None:
        """Deliver code and message, and go on with the connection."""

        def body(client: Caller) -> None:
            for method, size, code, said in (
                (REFUSE, 0, grpc.StatusCode.NOT_FOUND, REFUSAL),
                (UNKNOWN, 0, grpc.StatusCode.UNIMPLEMENTED, UNKNOWN),
                (ECHO, 3 * MAX_MESSAGE_BYTES, grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    client.unary(method, bytes(size))
                assert caught.value.code() is code
                assert said in caught.value.details()
                assert client.unary(ECHO, b"next") == b"next"

        with_grpcio(tmp_path / "s", body)

    def test_cancelling_a_stream_ends_its_generator(self, tmp_path: Path) -> None:
        """End it promptly, and go on with the connection."""

        def body(client: Caller) -> bytes:
            call = client.watch()
            assert next(call).value == b"first"
            client.wait_waiting(1)
            call.cancel()
            client.wait_waiting(0)
            return client.unary(ECHO, b"next")

        assert with_grpcio(tmp_path / "s", body) == b"next"


def echo(request: BytesValue, _: grpc.ServicerContext) -> BytesValue:
    return request


def count(request: BytesValue, _: grpc.ServicerContext) -> Iterator[BytesValue]:
    for number in range(int(request.value)):
        yield text(str(number))


@contextmanager
def grpcio_server(path: Path) -> Iterator[None]:
    codec = (BytesValue.FromString, BytesValue.SerializeToString)
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo, *codec),
        "Count": grpc.unary_stream_rpc_method_handler(count, *codec),
    }
    service = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[service])
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait(TIMEOUT)


def test_a_grpcio_server(tmp_path: Path) -> None:
    """Call an independent server: long messages by flow control, one that it refuses, a stream, all on one channel."""
    value = BytesValue(value=PATTERN[:FITTING])

    async def main() -> None:
        async with open_channel(tmp_path / "s") as channel:
            for _ in range(2):
                assert await channel.unary(ECHO, value, BytesValue) == value
            with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
                await channel.unary(ECHO, BytesValue(value=bytes(3 * MAX_MESSAGE_BYTES)), BytesValue)
            async with aclosing(channel.streaming(COUNT, text("1000"), BytesValue)) as responses:
                assert [response.value async for response in responses] == [b"%d" % number for number in range(1000)]

    with grpcio_server(tmp_path / "s"):
        trio.run(main)
