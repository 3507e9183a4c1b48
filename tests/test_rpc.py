"""Server and client against each other, against grpcio, and against peers that do what those two don't."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent import futures
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import pytest
import trio
import trio.testing
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
    data,
    goaway,
    header_block,
    headers,
    http2_frame,
    message,
    ping,
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
FITTING = MAX_MESSAGE_BYTES - 5
WIDE = 2**31 - 1


def run(main: Callable[[], Awaitable[T]]) -> T:
    """On a virtual clock that jumps when all tasks wait: what would hang fails at once."""

    async def bounded() -> T:
        with trio.fail_after(TIMEOUT):
            return await main()

    return trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))


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
        for number in range(self.CALLS):  # h2 takes answers only to what it has asked
            self._protocol.start_request(2 * number + 1, "http", "", "", None, "localhost")

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
) -> AsyncIterator[Peer]:
    """The peer of a connection that is served, and whose serving must end when the peer goes."""
    ours, theirs = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, table, ours)
        yield Peer(theirs)
        await theirs.aclose()


@asynccontextmanager
async def channel_to(table: Mapping[str, Route]) -> AsyncIterator[Channel]:
    """Our client, connected to our server."""
    async with served(table) as peer:
        yield Channel(peer.stream, Protocol(client_side=True))


class TestTogether:
    """Our client with our server."""

    def test_a_unary_call_is_answered(self) -> None:
        """One message there, one back."""

        async def main() -> BytesValue:
            async with channel_to(Methods().routes()) as channel:
                return await channel.unary(ECHO, text("hallo"), BytesValue)

        assert run(main) == text("hallo")

    @pytest.mark.parametrize("count", [0, 1, 1000])
    def test_a_stream_is_answered(self, count: int) -> None:
        """All messages arrive, in order."""

        async def main() -> list[BytesValue]:
            async with (
                channel_to(Methods().routes()) as channel,
                aclosing(channel.streaming(COUNT, text(str(count)), BytesValue)) as responses,
            ):
                return [response async for response in responses]

        assert run(main) == [text(str(number)) for number in range(count)]

    def test_the_largest_message_passes_both_ways(self) -> None:
        """Messages beyond the first window, which flow control sends in parts."""

        async def main() -> BytesValue:
            async with channel_to(Methods().routes()) as channel:
                return await channel.unary(ECHO, BytesValue(value=bytes(FITTING)), BytesValue)

        assert run(main) == BytesValue(value=bytes(FITTING))

    def test_a_stream_may_be_longer_than_any_window(self) -> None:
        """Who takes messages admits more."""
        taken = 0

        async def main() -> None:
            nonlocal taken
            async with (
                channel_to(Methods().routes()) as channel,
                aclosing(channel.streaming(FLOOD, text(""), BytesValue)) as responses,
            ):
                async for response in responses:
                    taken += len(response.value)
                    if taken > 3 * MAX_MESSAGE_BYTES:
                        break

        run(main)
        assert taken > 3 * MAX_MESSAGE_BYTES

    def test_a_channel_takes_one_call_after_the_other(self) -> None:
        """Also after calls that failed, and after a stream that was left early."""

        async def main() -> list[bytes]:
            answers = []
            async with channel_to(Methods().routes()) as channel:
                for number in range(20):
                    with pytest.raises(RpcError, match="NOT_FOUND"):
                        await channel.unary(REFUSE, text(""), BytesValue)
                    async with aclosing(channel.streaming(COUNT, text("100"), BytesValue)) as responses:
                        async for _ in responses:
                            break
                    answers.append((await channel.unary(ECHO, text(str(number)), BytesValue)).value)
            return answers

        assert run(main) == [b"%d" % number for number in range(20)]

    def test_a_stream_that_is_left_ends_at_the_server(self) -> None:
        """The client says so with its next call."""
        methods = Methods()

        async def main() -> None:
            async with channel_to(methods.routes()) as channel:
                async with aclosing(channel.streaming(WATCH, text(""), BytesValue)) as responses:
                    async for _ in responses:
                        break
                assert methods.waiting == 1
                await channel.unary(ECHO, text(""), BytesValue)
                await methods.wait_waiting(0)

        run(main)

    @pytest.mark.parametrize(
        ("method", "argument", "code", "answer"),
        [
            pytest.param(REFUSE, "", StatusCode.NOT_FOUND, REFUSAL, id="refused"),
            pytest.param("/test.Service/Nope", "", StatusCode.UNIMPLEMENTED, "/test.Service/Nope", id="method"),
            pytest.param("/other.Service/Echo", "", StatusCode.UNIMPLEMENTED, "/other.Service/Echo", id="service"),
            pytest.param(BUG, "", StatusCode.UNKNOWN, f"{BUG} failed; the plugin's log says why", id="bug"),
            pytest.param(LATE_BUG, "", StatusCode.UNKNOWN, "the plugin's log says why", id="bug after an answer"),
            pytest.param(COUNT, "0", StatusCode.INTERNAL, "answered no message", id="no answer"),
            pytest.param(COUNT, "2", StatusCode.INTERNAL, "answered more than one message", id="two answers"),
            pytest.param(BIG, str(FITTING + 1), StatusCode.RESOURCE_EXHAUSTED, "a message of 4194305", id="long"),
        ],
    )
    def test_a_failed_call_tells_why(self, method: str, argument: str, code: StatusCode, answer: str) -> None:
        """As RpcError, with the message whole, whatever is in it; and the connection goes on."""

        async def main() -> None:
            async with channel_to(Methods().routes()) as channel:
                with pytest.raises(RpcError) as caught:
                    await channel.unary(method, text(argument), BytesValue)
                assert caught.value.code is code
                assert answer in caught.value.message
                assert await channel.unary(ECHO, text("next"), BytesValue) == text("next")

        run(main)

    def test_a_request_too_long_is_refused_and_the_connection_goes_on(self) -> None:
        """RESOURCE_EXHAUSTED, as soon as the length is known."""

        async def main() -> None:
            async with channel_to(Methods().routes()) as channel:
                with pytest.raises(RpcError, match=f"RESOURCE_EXHAUSTED.*{MAX_MESSAGE_BYTES}"):
                    await channel.unary(ECHO, BytesValue(value=bytes(FITTING + 1)), BytesValue)
                assert await channel.unary(ECHO, text("next"), BytesValue) == text("next")

        run(main)

    def test_a_message_of_another_type_is_refused(self) -> None:
        """INVALID_ARGUMENT from the server, INTERNAL from the client."""

        async def answer_garbage(_: BytesValue) -> Garbage:
            return Garbage()

        async def main() -> None:
            table = {**Methods().routes(), BIG: Route(answer_garbage, BytesValue, streams=False)}
            async with channel_to(table) as channel:
                with pytest.raises(RpcError, match="INVALID_ARGUMENT: not a BytesValue"):
                    await channel.unary(ECHO, Garbage(), BytesValue)
                with pytest.raises(RpcError, match=r"INTERNAL: /test\.Service/Big answered what is not a BytesValue"):
                    await channel.unary(BIG, text(""), BytesValue)

        run(main)

    @pytest.mark.parametrize(
        ("text_of_error", "expected"),
        [
            pytest.param("stray byte \udcff", "stray byte ?", id="surrogate"),
            pytest.param("x" * 100_000, "x" * 1000, id="long"),
        ],
    )
    def test_any_error_message_arrives(self, text_of_error: str, expected: str) -> None:
        """What can't be said in a header is left out; the code arrives in any case."""

        async def fail(_: BytesValue) -> BytesValue:
            raise RpcError(StatusCode.ABORTED, text_of_error)

        async def main() -> None:
            async with channel_to({ECHO: Route(fail, BytesValue, streams=False)}) as channel:
                with pytest.raises(RpcError) as caught:
                    await channel.unary(ECHO, text(""), BytesValue)
            assert (caught.value.code, caught.value.message) == (StatusCode.ABORTED, expected)

        run(main)

    @pytest.mark.parametrize("method", [BUG, LATE_BUG])
    def test_a_bug_is_logged_with_its_traceback(self, method: str, caplog: pytest.LogCaptureFixture) -> None:
        """And the connection goes on."""

        async def main() -> None:
            async with channel_to(Methods().routes()) as channel:
                with pytest.raises(RpcError, match="UNKNOWN"):
                    await channel.unary(method, text(""), BytesValue)
                assert await channel.unary(ECHO, text("next"), BytesValue) == text("next")

        run(main)
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.message == f"{method} failed"
        assert "ZeroDivisionError: a bug in the handler" in caplog.text

    def test_a_bug_in_a_clean_up_ends_no_more_than_its_call(self, caplog: pytest.LogCaptureFixture) -> None:
        """An error of a call that is being cancelled, in a group with Cancelled, after a reset or at the end."""

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

        async def main() -> None:
            table = {**Methods().routes(), WAIT: Route(handler, BytesValue, streams=False)}
            async with served(table) as peer:
                await peer.send(HELLO + request(1, WAIT) + request(3, WAIT))
                await trio.testing.wait_all_tasks_blocked()
                await peer.send(reset(1) + request(5, ECHO))
                assert await peer.status(5) is StatusCode.OK

        run(main)
        assert [record.message for record in caplog.records] == [f"{WAIT} failed"] * 2

    def test_routes_come_from_generated_servicers(self) -> None:
        """By gRPC path; handlers may take the request's headers or not."""
        service = Service(SERVICE)
        signature = RPCSignature(Cardinality.UNARY_UNARY, BytesValue, BytesValue)
        service.add_method("Echo", Methods().echo, signature)

        async def main() -> BytesValue:
            async with channel_to(routes([service])) as channel:
                return await channel.unary(ECHO, text("hallo"), BytesValue)

        assert run(main) == text("hallo")

    @pytest.mark.parametrize("cardinality", [Cardinality.STREAM_UNARY, Cardinality.STREAM_STREAM])
    def test_methods_that_stream_requests_are_not_served(self, cardinality: Cardinality) -> None:
        """That is said when the table is made, not when somebody calls."""
        service = Service(SERVICE)
        service.add_method("Echo", Methods().echo, RPCSignature(cardinality, BytesValue, BytesValue))
        with pytest.raises(NotImplementedError, match=r"test\.Service/Echo"):
            routes([service])


class TestPeers:
    """Our server with peers whose every byte is chosen. That it survives them by the thousand is in test_rpc_abuse."""

    @pytest.mark.parametrize(
        ("sent", "code"),
        [
            pytest.param(headers(1, end=True), StatusCode.INVALID_ARGUMENT, id="no body"),
            pytest.param(headers(1) + data(1, b""), StatusCode.INVALID_ARGUMENT, id="empty body"),
            pytest.param(headers(1) + data(1, b"\0\0\0"), StatusCode.INVALID_ARGUMENT, id="half a message header"),
            pytest.param(headers(1) + data(1, message(length=7)), StatusCode.INVALID_ARGUMENT, id="half a message"),
            pytest.param(headers(1) + data(1, 2 * message()), StatusCode.INVALID_ARGUMENT, id="two messages"),
            pytest.param(
                headers(1) + data(1, message(), end=False) + data(1, message(), end=False),
                StatusCode.INVALID_ARGUMENT,
                id="a second message and no end",
            ),
            pytest.param(
                headers(1, grpc_encoding="deflate") + data(1, message(b"x", compressed=True)),
                StatusCode.UNIMPLEMENTED,
                id="compressed",
            ),
            pytest.param(
                headers(1) + data(1, message(length=2**32 - 1), end=False),
                StatusCode.RESOURCE_EXHAUSTED,
                id="too long, from its header alone",
            ),
            pytest.param(headers(1, path="//") + data(1, message()), StatusCode.UNIMPLEMENTED, id="no method"),
            pytest.param(
                headers(1, path="/a/" + 3000 * "%F0") + data(1, message()), StatusCode.UNIMPLEMENTED, id="long method"
            ),
        ],
    )
    def test_a_bad_call_gets_a_status_and_the_connection_goes_on(self, sent: bytes, code: StatusCode) -> None:
        """Whatever is wrong with one call is no matter for the others."""

        async def main() -> None:
            async with served(Methods().routes()) as peer:
                await peer.send(HELLO + sent)
                assert await peer.status(1) is code
                await peer.send(request(3, ECHO))
                assert await peer.status(3) is StatusCode.OK

        run(main)

    @pytest.mark.parametrize(
        "rest",
        [
            pytest.param(data(1, bytes(100), end=False), id="goes on"),
            pytest.param(data(1, bytes(100)), id="ends"),
            pytest.param(reset(1), id="is reset"),
        ],
    )
    @pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
    def test_the_rest_of_a_refused_request_is_ignored(self, rest: bytes, *, at_once: bool) -> None:
        """The server asks for no more of it, and minds none that was under way."""

        async def main() -> None:
            async with served(Methods().routes()) as peer:
                refused = headers(1) + data(1, 3 * message(), end=False)
                await peer.send(HELLO + refused + (rest if at_once else b""))
                if not at_once:
                    assert await peer.status(1) is StatusCode.INVALID_ARGUMENT
                    assert peer.resets == {1: "NO_ERROR"}
                    await peer.send(rest)
                await peer.send(request(3, ECHO))
                assert await peer.status(3) is StatusCode.OK

        run(main)

    def test_goodbye_ends_no_call(self) -> None:
        """A peer that says GOAWAY makes no more calls, but waits for the answers to those it made."""

        async def main() -> None:
            async with served(Methods().routes()) as peer:
                await peer.send(HELLO + headers(1, path=ECHO) + goaway() + ping() + data(1, message()))
                assert await peer.status(1) is StatusCode.OK

        run(main)

    def test_a_late_window_update_is_ignored(self) -> None:
        """It is for a call that has ended, when the next has begun: whoever reads a long answer slowly sends it."""

        async def main() -> None:
            methods = Methods()
            async with served(methods.routes()) as peer:
                await peer.send(HELLO + request(1, ECHO) + request(3, WATCH))
                await peer.status(1)
                await peer.send(request(5, ECHO) + window_update(1, 1000))
                assert await peer.status(5) is StatusCode.OK
                assert methods.waiting == 1

        run(main)

    @pytest.mark.parametrize("method", [WAIT, WATCH])
    def test_a_reset_ends_its_call_and_no_other(self, method: str) -> None:
        """RST_STREAM cancels the handler."""

        async def main() -> None:
            methods = Methods()
            async with served(methods.routes()) as peer:
                await peer.send(HELLO + request(1, method) + request(3, method))
                await methods.wait_waiting(2)
                await peer.send(reset(1))
                await methods.wait_waiting(1)

        run(main)

    @pytest.mark.parametrize("method", [ECHO, BIG, COUNT, REFUSE, BUG, "/test.Service/Nope"])
    def test_a_call_that_is_reset_before_it_began_is_not_answered(self, method: str) -> None:
        """Request and RST_STREAM in one piece."""

        async def main() -> None:
            async with served(Methods().routes()) as peer:
                await peer.send(HELLO + request(1, method, text("3").SerializeToString()) + reset(1) + request(3, ECHO))
                assert await peer.status(3) is StatusCode.OK
                assert peer.statuses == {3: StatusCode.OK}

        run(main)

    @pytest.mark.parametrize("method", [WAIT, WATCH, FLOOD])
    def test_the_end_of_the_connection_ends_its_calls(self, method: str) -> None:
        """Handlers are cancelled, whether they wait for something of their own or for the peer to read."""
        methods = Methods()

        async def main() -> None:
            async with served(methods.routes()) as peer:
                await peer.send(HELLO + request(1, method))
                await methods.wait_waiting(1)

        run(main)
        assert methods.waiting == 0

    def test_an_answer_waits_for_the_window(self) -> None:
        """No more is sent than the peer admits, and the rest as soon as it admits more; calls don't block others."""

        async def main() -> None:
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

        run(main)

    def test_a_peer_that_does_not_read_is_not_written_for(self) -> None:
        """With the widest window, a stream makes no more messages than a few until the peer reads; RST_STREAM works."""
        methods = Methods()

        async def main() -> None:
            async with served(methods.routes(), trio.testing.lockstep_stream_pair) as peer:
                wide = settings(initial_window_size=WIDE, max_frame_size=2**24 - 1) + window_update(0, WIDE - 65535)
                await peer.send(HELLO + wide + request(1, FLOOD))
                await trio.testing.wait_all_tasks_blocked()
                assert methods.taken < 10
                await peer.send(reset(1))
                await methods.wait_waiting(0)

        run(main)

    def test_a_peer_that_only_asks_is_not_listened_to(self) -> None:
        """Answers to PING are bounded: the server reads on when the peer does."""

        async def main() -> None:
            async with served(Methods().routes(), trio.testing.lockstep_stream_pair) as peer:
                sent = 0

                async def ask() -> None:
                    nonlocal sent
                    await peer.send(HELLO)
                    for _ in range(60):
                        await peer.send(1000 * ping())
                        sent += 1000
                    await peer.send(request(1, ECHO))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask)
                    await trio.testing.wait_all_tasks_blocked()
                    assert 10_000 < sent < 50_000
                    assert await peer.status(1) is StatusCode.OK

        run(main)

    def test_a_peer_that_only_asked_may_go(self) -> None:
        """The server ends, though it neither reads nor writes at that moment."""

        async def main() -> None:
            async with served(Methods().routes(), trio.testing.lockstep_stream_pair) as peer:
                with trio.move_on_after(1):
                    await peer.send(HELLO + 40_000 * ping())

        run(main)

    def test_too_many_calls_close_the_connection(self, caplog: pytest.LogCaptureFixture) -> None:
        """They and all others are cancelled, and the log says why."""
        methods = Methods()

        async def main() -> None:
            async with served(methods.routes()) as peer:
                await peer.send(HELLO + b"".join(request(2 * n + 1, WAIT) for n in range(128)))
                await methods.wait_waiting(128)
                await peer.send(request(257, WAIT))
                await methods.wait_waiting(0)
                await peer.wait_hung_up()

        run(main)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "TooManyStreamsError: Max outbound streams is 128" in record.message

    @pytest.mark.parametrize(
        ("sent", "said"),
        [
            pytest.param(b"GET / HTTP/1.1\r\n\r\n", "Invalid HTTP/2 preamble", id="HTTP/1"),
            pytest.param(HELLO + headers(1, method="GET"), "'GET /test.Service/Echo' is no gRPC request", id="GET"),
            pytest.param(HELLO + headers(1, te=None), "te header", id="no te"),
            pytest.param(HELLO + headers(1, path="/a/b/c"), "'POST /a/b/c' is no gRPC request", id="path"),
            pytest.param(HELLO + headers(1, path="/" + 9999 * "x"), f"'POST /{94 * 'x'}…' is no", id="long path"),
            pytest.param(HELLO + headers(1, path=b"/\xff/x"), "'utf-8' codec can't decode", id="not UTF-8"),
            pytest.param(HELLO + data(1, message()), "ProtocolError", id="data of no call"),
            pytest.param(HELLO + data(1, bytes(20_000))[:9], "a frame of 20000 bytes", id="long frame"),
        ],
    )
    def test_a_broken_peer_is_hung_up_on_with_one_line(
        self, sent: bytes, said: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A warning that says what the peer did."""

        async def main() -> None:
            async with served(Methods().routes()) as peer:
                await peer.send(sent)
                await peer.wait_hung_up()

        run(main)
        (record,) = caplog.records
        assert record.message.startswith("closed a connection whose peer broke the protocol: ")
        assert said in record.message


class TestEnded:
    """What is told of each call: for metrics."""

    @pytest.mark.parametrize(
        ("method", "told"),
        [
            pytest.param(ECHO, ("Echo", "OK"), id="answered"),
            pytest.param(REFUSE, ("Refuse", "NOT_FOUND"), id="refused"),
            pytest.param(BUG, ("Bug", "UNKNOWN"), id="bug"),
            pytest.param("/test.Service/Nope", None, id="no such method"),
        ],
    )
    def test_how_it_ended(self, method: str, told: tuple[str, str] | None) -> None:
        """Its name and status. A name that a peer made up is not told: there is no end to those."""
        ended: list[tuple[str, str, float]] = []

        async def main() -> None:
            async with ended_calls(ended) as channel:
                with suppress(RpcError):
                    await channel.unary(method, text(""), BytesValue)

        run(main)
        assert ended == ([] if told is None else [(*told, 0.0)])

    def test_how_long_it_took(self) -> None:
        """From its first frame until it is answered, or given up; a stream until its end."""
        ended: list[tuple[str, str, float]] = []

        async def slow(message: BytesValue) -> BytesValue:
            await trio.sleep(2)
            return message

        async def main() -> None:
            async with ended_calls(ended, {ECHO: Route(slow, BytesValue, streams=False)}) as channel:
                await channel.unary(ECHO, text(""), BytesValue)
                with trio.move_on_after(1):
                    await channel.unary(WATCH, text(""), BytesValue)

        run(main)
        assert [call[:2] for call in ended] == [("Echo", "OK"), ("Watch", "CANCELLED")]
        assert [seconds for *_, seconds in ended] == pytest.approx([2, 1])


@asynccontextmanager
async def ended_calls(
    ended: list[tuple[str, str, float]], routes: Mapping[str, Route] | None = None
) -> AsyncIterator[Channel]:
    """A channel to a server that tells of each call that ended."""
    ours, theirs = trio.testing.memory_stream_pair()
    table = {**Methods().routes(), **(routes or {})}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, table, ours, lambda *call: ended.append(call))
        yield Channel(theirs, Protocol(client_side=True))
        await theirs.aclose()


class TestServerCancellation:
    """`serve_connection` where it waits: it ends, it lets Cancelled through, and the peer sees the end."""

    @pytest.mark.parametrize(
        ("sent", "reads"),
        [
            pytest.param(b"", True, id="before the first byte"),
            pytest.param(HELLO, True, id="idle"),
            pytest.param(HELLO + headers(1) + b"\0\0", True, id="within a frame"),
            pytest.param(HELLO + headers(1), True, id="within a request"),
            pytest.param(HELLO + request(1, WAIT), True, id="handler waits"),
            pytest.param(HELLO + request(1, WATCH), True, id="generator waits"),
            pytest.param(HELLO + request(1, FLOOD), True, id="window closed"),
            pytest.param(HELLO + window_update(0, WIDE - 65535) + request(1, FLOOD), False, id="writer blocked"),
            pytest.param(HELLO + 40_000 * ping(), False, id="writer and reader blocked"),
        ],
    )
    def test_cancelled_is_not_swallowed(self, sent: bytes, *, reads: bool, caplog: pytest.LogCaptureFixture) -> None:
        """All tasks end, at once."""
        methods = Methods()
        ours, theirs = trio.testing.lockstep_stream_pair()
        scope = trio.CancelScope()

        async def serve() -> None:
            with scope:
                await serve_connection(methods.routes(), ours)

        async def main() -> None:
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

        run(main)
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
            pytest.param(b"", trio.BrokenResourceError, "closed", id="gone"),
            pytest.param(settings(), trio.BrokenResourceError, "closed", id="gone before the answer"),
            pytest.param(BEGIN, trio.BrokenResourceError, "closed", id="gone within the answer"),
            pytest.param(BEGIN + FIRST, trio.BrokenResourceError, "closed", id="gone before the status"),
            pytest.param(BEGIN + FIRST[:-1], trio.BrokenResourceError, "closed", id="gone within a message"),
            pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", BrokenPeerError, "a frame of 4740180 bytes", id="HTTP/1"),
            pytest.param(bytes(100), BrokenPeerError, "ProtocolError", id="zeros"),
            pytest.param(
                settings() + header_block(1, {":status": "404"}, end=True),
                BrokenPeerError,
                "http status is not 200",
                id="not found",
            ),
            pytest.param(
                BEGIN + FIRST + header_block(1, {"x": "y"}, end=True), BrokenPeerError, "grpc-status", id="no status"
            ),
            pytest.param(BEGIN + FIRST + data(1, b""), trio.BrokenResourceError, "closed", id="end without a status"),
            pytest.param(BEGIN + reset(1), RpcError, "CANCELLED: the server reset /test.Service/Echo", id="reset"),
            pytest.param(BEGIN + REFUSED, RpcError, "NOT_FOUND: why not", id="refused"),
            pytest.param(BEGIN + FIRST + REFUSED, RpcError, "NOT_FOUND: why not", id="refused after a message"),
            pytest.param(
                BEGIN + data(1, message(b"x", compressed=True), end=False) + END,
                RpcError,
                "compressed",
                id="compressed",
            ),
        ],
    )
    def test_what_is_no_answer_is_an_error(self, answer: bytes, error: type[Exception], said: str) -> None:
        """Of the kind that tells whose fault it is."""

        async def main() -> None:
            async with channel_to_script(answer) as channel:
                with pytest.raises(error, match=said):
                    await channel.unary(ECHO, text(""), BytesValue)

        run(main)

    def test_a_stream_that_breaks_off_gives_what_came_before(self) -> None:
        """Then BrokenResourceError."""
        got = []

        async def main() -> None:
            async with (
                channel_to_script(BEGIN + FIRST) as channel,
                aclosing(channel.streaming(WATCH, text(""), BytesValue)) as responses,
            ):
                got.append(await responses.__anext__())
                with pytest.raises(trio.BrokenResourceError):
                    await responses.__anext__()

        run(main)
        assert got == [text("first")]

    def test_goodbye_does_not_keep_the_answer_away(self) -> None:
        """A server that says GOAWAY answers the calls it has."""

        async def main() -> BytesValue:
            async with channel_to_script(settings() + goaway() + BEGIN + FIRST + END) as channel:
                return await channel.unary(ECHO, text(""), BytesValue)

        assert run(main) == text("first")

    def test_what_was_not_asked_for_is_ignored(self) -> None:
        """A stream that the server pushes is no part of the answer."""
        promise = http2_frame(0x5, 0x4, 1, bytes([0, 0, 0, 2]) + headers(2)[9:])
        pushed = header_block(2, {":status": "200", "content-type": "application/grpc"})
        pushed += data(2, message(), end=False) + header_block(2, {"grpc-status": "5"}, end=True)

        async def main() -> BytesValue:
            async with channel_to_script(BEGIN + promise + pushed + FIRST + END) as channel:
                return await channel.unary(ECHO, text(""), BytesValue)

        assert run(main) == text("first")

    def test_a_request_waits_for_the_window(self) -> None:
        """Also for one that is closed again while the request is on its way."""
        payload = message(text("0123456789").SerializeToString())
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
            protocol = Protocol(client_side=False)
            for event in protocol.h2_connection.receive_data(await theirs.receive_some()):
                received += getattr(event, "data", None) or b""
            await theirs.send_all(BEGIN + FIRST + END)

        async def main() -> BytesValue:
            await theirs.send_all(settings(initial_window_size=5))
            channel = Channel(ours, Protocol(client_side=True))
            channel.protocol.receive(bytes(await ours.receive_some()))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                return await channel.unary(ECHO, text("0123456789"), BytesValue)

        assert run(main) == text("first")
        assert received == payload

    def test_a_refusal_is_heard_before_the_request_is_sent(self) -> None:
        """A server that wants no more of a request says so, and opens no window."""

        async def main() -> None:
            refusal = settings(initial_window_size=0) + BEGIN + REFUSED + reset(1)
            async with channel_to_script(refusal) as channel:
                with pytest.raises(RpcError, match="NOT_FOUND"):
                    await channel.unary(ECHO, BytesValue(value=bytes(100_000)), BytesValue)

        run(main)

    def test_a_server_that_admits_no_call_is_broken(self) -> None:
        """Known from its settings once there has been a call."""

        async def main() -> None:
            answers = BEGIN + FIRST + settings(max_concurrent_streams=0) + END
            async with channel_to_script(answers) as channel:
                assert await channel.unary(ECHO, text(""), BytesValue) == text("first")
                with pytest.raises(BrokenPeerError, match="admits no call"):
                    await channel.unary(ECHO, text(""), BytesValue)

        run(main)


class TestClientCancellation:
    """A call where it waits: Cancelled comes through, at once."""

    @pytest.mark.parametrize(
        ("reads", "answer", "size"),
        [
            pytest.param(False, b"", 0, id="sending"),
            pytest.param(True, b"", 0, id="waiting for the first byte"),
            pytest.param(True, BEGIN, 0, id="waiting for a message"),
            pytest.param(True, BEGIN + FIRST, 0, id="waiting for the next message"),
            pytest.param(True, settings(), 100_000, id="waiting for the window"),
        ],
    )
    def test_cancelled_is_not_swallowed(self, answer: bytes, size: int, *, reads: bool) -> None:
        """Nor is anything else in its place."""
        ours, theirs = trio.testing.lockstep_stream_pair()
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                channel = Channel(ours, Protocol(client_side=True))
                await channel.unary(ECHO, BytesValue(value=bytes(size)), BytesValue)

        async def read() -> None:
            while await theirs.receive_some():
                pass

        async def main() -> None:
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

        run(main)

    def test_a_cancelled_call_closes_its_connection(self, tmp_path: Path) -> None:
        """`unary_call`, while it connects and while it waits for an answer."""
        methods = Methods()

        async def main() -> None:
            async with serving(methods.routes(), tmp_path / "socket"):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await unary_call(tmp_path / "socket", WAIT, text(""), BytesValue)
                assert scope.cancelled_caught
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(unary_call, tmp_path / "socket", WAIT, text(""), BytesValue))
                    await methods.wait_waiting(1)
                    nursery.cancel_scope.cancel()
                await methods.wait_waiting(0)

        trio.run(main)


class Caller:
    """A grpcio client, in a thread of its own: a second opinion on what the server says."""

    def __init__(self, channel: grpc.Channel, methods: Methods) -> None:
        self.channel = channel
        self.methods = methods

    def unary(self, method: str, value: bytes, timeout: float = TIMEOUT) -> bytes:
        call = self.channel.unary_unary(method, BytesValue.SerializeToString, BytesValue.FromString)
        answer: BytesValue = call(BytesValue(value=value), timeout=timeout)
        return answer.value

    def streaming(self, method: str, value: bytes, timeout: float = TIMEOUT) -> Any:  # noqa: ANN401  # grpcio's call
        call = self.channel.unary_stream(method, BytesValue.SerializeToString, BytesValue.FromString)
        return call(BytesValue(value=value), timeout=timeout)

    def requests(self, method: str, values: list[bytes]) -> bytes:
        """A call with any number of requests."""
        call = self.channel.stream_unary(method, BytesValue.SerializeToString, BytesValue.FromString)
        answer: BytesValue = call(iter([BytesValue(value=value) for value in values]), timeout=TIMEOUT)
        return answer.value

    def wait_waiting(self, count: int) -> None:
        trio.from_thread.run(self.methods.wait_waiting, count)


def with_grpcio(path: Path, body: Callable[[Caller], T], *options: tuple[str, int], compression: Any = None) -> T:  # noqa: ANN401  # grpcio's
    """Run `body` with a grpcio client of our server."""
    methods = Methods()

    def call() -> T:
        local = ("grpc.use_local_subchannel_pool", 1)  # connections are not shared between tests
        with grpc.insecure_channel(f"unix:{path}", options=(local, *options), compression=compression) as channel:
            return body(Caller(channel, methods))

    async def main() -> T:
        async with serving(methods.routes(), path):
            return await trio.to_thread.run_sync(call)

    return trio.run(main)


class TestGrpcioClient:
    """Our server as an independent client sees it."""

    def test_unary(self, tmp_path: Path) -> None:
        """Many calls on one connection."""
        answers = with_grpcio(
            tmp_path / "s", lambda caller: [caller.unary(ECHO, b"%d" % number) for number in range(300)]
        )
        assert answers == [b"%d" % number for number in range(300)]

    def test_streaming(self, tmp_path: Path) -> None:
        """All messages, in order, then the end."""
        answers = with_grpcio(tmp_path / "s", lambda caller: [m.value for m in caller.streaming(COUNT, b"1000")])
        assert answers == [b"%d" % number for number in range(1000)]

    def test_the_largest_message_passes_both_ways(self, tmp_path: Path) -> None:
        """4 MiB, by flow control."""
        value = bytes(range(256)) * (FITTING // 256)
        assert with_grpcio(tmp_path / "s", lambda caller: caller.unary(ECHO, value)) == value

    def test_many_calls_at_once(self, tmp_path: Path) -> None:
        """Calls on one connection don't wait for each other."""

        def body(caller: Caller) -> list[bytes]:
            with futures.ThreadPoolExecutor(20) as pool:
                big = [pool.submit(caller.unary, BIG, b"3000000") for _ in range(5)]
                small = [pool.submit(caller.unary, ECHO, b"%d" % number) for number in range(100)]
                assert {len(call.result()) for call in big} == {3_000_000}
                return [call.result() for call in small]

        assert with_grpcio(tmp_path / "s", body) == [b"%d" % number for number in range(100)]

    @pytest.mark.parametrize(
        ("method", "code", "details"),
        [
            pytest.param(REFUSE, grpc.StatusCode.NOT_FOUND, REFUSAL, id="refused"),
            pytest.param(BUG, grpc.StatusCode.UNKNOWN, f"{BUG} failed; the plugin's log says why", id="bug"),
            pytest.param("/test.Service/No", grpc.StatusCode.UNIMPLEMENTED, "no method '/test.S", id="method"),
            pytest.param("/no.Service/Echo", grpc.StatusCode.UNIMPLEMENTED, "no method '/no.S", id="service"),
        ],
    )
    def test_errors(self, method: str, code: grpc.StatusCode, details: str, tmp_path: Path) -> None:
        """The code and the message arrive, and the server goes on."""

        def body(caller: Caller) -> grpc.Call:
            with pytest.raises(grpc.RpcError) as caught:
                caller.unary(method, b"")
            assert caller.unary(ECHO, b"next") == b"next"
            return caught.value

        error = with_grpcio(tmp_path / "s", body)
        assert error.code() is code
        assert error.details().startswith(details)

    def test_a_bug_after_an_answer(self, tmp_path: Path) -> None:
        """The message arrives, then the status."""

        def body(caller: Caller) -> grpc.StatusCode:
            call = caller.streaming(LATE_BUG, b"")
            assert next(call).value == b"first"
            with pytest.raises(grpc.RpcError):
                next(call)
            return call.code()

        assert with_grpcio(tmp_path / "s", body) is grpc.StatusCode.UNKNOWN

    @pytest.mark.parametrize("values", [[], [b"one", b"two"]], ids=["none", "two"])
    def test_a_unary_call_takes_one_message(self, values: list[bytes], tmp_path: Path) -> None:
        """INVALID_ARGUMENT for none and for two; the connection goes on."""

        def body(caller: Caller) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as caught:
                caller.requests(ECHO, values)
            assert caller.unary(ECHO, b"next") == b"next"
            code: grpc.StatusCode = caught.value.code()
            return code

        assert with_grpcio(tmp_path / "s", body) is grpc.StatusCode.INVALID_ARGUMENT

    def test_a_message_too_long_is_refused(self, tmp_path: Path) -> None:
        """RESOURCE_EXHAUSTED; the connection goes on."""

        def body(caller: Caller) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as caught:
                caller.unary(ECHO, bytes(3 * MAX_MESSAGE_BYTES))
            assert caller.unary(ECHO, b"next") == b"next"
            code: grpc.StatusCode = caught.value.code()
            return code

        assert with_grpcio(tmp_path / "s", body) is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_a_compressed_message_is_refused(self, tmp_path: Path) -> None:
        """UNIMPLEMENTED, as the gRPC protocol asks of servers that can't inflate."""

        def body(caller: Caller) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as caught:
                caller.unary(ECHO, bytes(10_000))
            code: grpc.StatusCode = caught.value.code()
            return code

        code = with_grpcio(tmp_path / "s", body, compression=grpc.Compression.Gzip)
        assert code is grpc.StatusCode.UNIMPLEMENTED

    def test_cancelling_a_stream_ends_its_generator(self, tmp_path: Path) -> None:
        """Promptly, and the connection goes on."""

        def body(caller: Caller) -> bytes:
            call = caller.streaming(WATCH, b"")
            assert next(call).value == b"first"
            caller.wait_waiting(1)
            call.cancel()
            caller.wait_waiting(0)
            return caller.unary(ECHO, b"next")

        assert with_grpcio(tmp_path / "s", body) == b"next"

    @pytest.mark.parametrize("method", [WAIT, WATCH])
    def test_a_deadline_ends_the_call(self, method: str, tmp_path: Path) -> None:
        """DEADLINE_EXCEEDED at the client, cancellation at the server."""

        def body(caller: Caller) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as caught:
                list(caller.streaming(method, b"", timeout=0.3))
            caller.wait_waiting(0)
            code: grpc.StatusCode = caught.value.code()
            return code

        assert with_grpcio(tmp_path / "s", body) is grpc.StatusCode.DEADLINE_EXCEEDED

    def test_closing_the_channel_ends_its_calls(self, tmp_path: Path) -> None:
        """All of them."""

        def body(caller: Caller) -> None:
            calls = [caller.streaming(WATCH, b"") for _ in range(3)]
            caller.wait_waiting(3)
            caller.channel.close()
            caller.wait_waiting(0)
            assert all(call.done() for call in calls)

        with_grpcio(tmp_path / "s", body)

    def test_the_end_of_the_server_ends_the_call(self, tmp_path: Path) -> None:
        """UNAVAILABLE, not a hang."""
        methods = Methods()

        def call() -> grpc.StatusCode:
            local = ("grpc.use_local_subchannel_pool", 1)
            with grpc.insecure_channel(f"unix:{tmp_path / 's'}", options=[local]) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    Caller(channel, methods).unary(WAIT, b"")
            code: grpc.StatusCode = caught.value.code()
            return code

        async def main() -> None:
            codes = []

            async def thread() -> None:
                codes.append(await trio.to_thread.run_sync(call))

            async with trio.open_nursery() as nursery:
                async with serving(methods.routes(), tmp_path / "s"):
                    nursery.start_soon(thread)
                    await methods.wait_waiting(1)
            assert codes == [grpc.StatusCode.UNAVAILABLE]

        trio.run(main)


class GrpcioMethods:
    """What the grpcio server does."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def echo(self, request: BytesValue, _: grpc.ServicerContext) -> BytesValue:
        return request

    def refuse(self, _: BytesValue, context: grpc.ServicerContext) -> BytesValue:
        context.abort(grpc.StatusCode.NOT_FOUND, REFUSAL)
        raise AssertionError

    def count(self, request: BytesValue, _: grpc.ServicerContext) -> Iterator[BytesValue]:
        for number in range(int(request.value)):
            yield text(str(number))

    def watch(self, _: BytesValue, context: grpc.ServicerContext) -> Iterator[BytesValue]:
        context.add_callback(self.ended.set)
        yield text("first")
        self.ended.wait(TIMEOUT)

    def handler(self) -> grpc.GenericRpcHandler:
        codec = (BytesValue.FromString, BytesValue.SerializeToString)
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Echo": grpc.unary_unary_rpc_method_handler(self.echo, *codec),
                "Refuse": grpc.unary_unary_rpc_method_handler(self.refuse, *codec),
                "Count": grpc.unary_stream_rpc_method_handler(self.count, *codec),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch, *codec),
            },
        )


@contextmanager
def grpcio_server(path: Path) -> Iterator[GrpcioMethods]:
    methods = GrpcioMethods()
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[methods.handler()])
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield methods
    finally:
        server.stop(None).wait(TIMEOUT)


class TestGrpcioServer:
    """Our client with an independent server."""

    def test_unary(self, tmp_path: Path) -> None:
        """Many calls, each on a connection of its own."""

        async def main() -> list[bytes]:
            path = tmp_path / "s"
            return [(await unary_call(path, ECHO, text(str(number)), BytesValue)).value for number in range(30)]

        with grpcio_server(tmp_path / "s"):
            assert trio.run(main) == [b"%d" % number for number in range(30)]

    def test_the_largest_message_passes_both_ways(self, tmp_path: Path) -> None:
        """4 MiB, by flow control, twice on one connection."""
        value = BytesValue(value=bytes(range(256)) * (FITTING // 256))

        async def main() -> None:
            async with open_channel(tmp_path / "s") as channel:
                for _ in range(2):
                    assert await channel.unary(ECHO, value, BytesValue) == value

        with grpcio_server(tmp_path / "s"):
            trio.run(main)

    def test_a_request_too_long_is_refused(self, tmp_path: Path) -> None:
        """By the server, before it has the whole."""

        async def main() -> None:
            async with open_channel(tmp_path / "s") as channel:
                with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
                    await channel.unary(ECHO, BytesValue(value=bytes(3 * MAX_MESSAGE_BYTES)), BytesValue)
                assert await channel.unary(ECHO, text("next"), BytesValue) == text("next")

        with grpcio_server(tmp_path / "s"):
            trio.run(main)

    def test_streaming(self, tmp_path: Path) -> None:
        """All messages, in order, then the end."""

        async def main() -> list[bytes]:
            async with (
                open_channel(tmp_path / "s") as channel,
                aclosing(channel.streaming(COUNT, text("1000"), BytesValue)) as responses,
            ):
                return [response.value async for response in responses]

        with grpcio_server(tmp_path / "s"):
            assert trio.run(main) == [b"%d" % number for number in range(1000)]

    def test_leaving_a_stream_ends_it_at_the_server(self, tmp_path: Path) -> None:
        """At the latest when the connection closes."""

        async def main() -> None:
            async with (
                open_channel(tmp_path / "s") as channel,
                aclosing(channel.streaming(WATCH, text(""), BytesValue)) as responses,
            ):
                async for _ in responses:
                    break

        with grpcio_server(tmp_path / "s") as methods:
            trio.run(main)
            assert methods.ended.wait(TIMEOUT)

    @pytest.mark.parametrize(
        ("method", "code", "said"),
        [
            pytest.param(REFUSE, StatusCode.NOT_FOUND, REFUSAL, id="refused"),
            pytest.param("/test.Service/No", StatusCode.UNIMPLEMENTED, "Method not found!", id="method"),
        ],
    )
    def test_errors(self, method: str, code: StatusCode, said: str, tmp_path: Path) -> None:
        """The code and the message arrive."""

        async def main() -> None:
            with pytest.raises(RpcError) as caught:
                await unary_call(tmp_path / "s", method, text(""), BytesValue)
            assert (caught.value.code, caught.value.message) == (code, said)

        with grpcio_server(tmp_path / "s"):
            trio.run(main)

    def test_nobody_listens(self, tmp_path: Path) -> None:
        """OSError, whether or not there is a socket."""

        async def main() -> None:
            await unary_call(tmp_path / "s", ECHO, text(""), BytesValue)

        with pytest.raises(FileNotFoundError):
            trio.run(main)
        (tmp_path / "s").touch()
        with pytest.raises(ConnectionRefusedError):
            trio.run(main)
