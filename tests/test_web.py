"""The HTTP server, over streams in memory and on a virtual clock: what is asked, by hand, and what comes back."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from sgpu import web
from sgpu.web import MAX_CONNECTIONS, REQUEST_TIMEOUT, RESPONSE_TIMEOUT, Request, Response, Server, serve, text

T = TypeVar("T")

HOST = b"Host: gpu-node\r\n"
HELLO = b"GET /hello HTTP/1.1\r\n" + HOST + b"\r\n"


async def hello(request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    return text(200, f"hello {request.headers.get('user-agent', 'you')}")


async def bug(_: Request) -> Response:
    raise ZeroDivisionError("a bug in the handler")


async def long(_: Request) -> Response:
    return text(200, "x" * 10_000_000)


async def odd(request: Request) -> Response:
    return Response(200, b"", f"text/{request.headers['odd']}…")


async def slow(_: Request) -> Response:
    await trio.sleep_forever()
    raise AssertionError


ROUTES: web.Routes = {"/hello": hello, "/bug": bug, "/long": long, "/odd": odd, "/slow": slow}


def virtual(main: Callable[[], Awaitable[T]]) -> T:
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@attrs.frozen
class Answer:
    """A response. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def parse(raw: bytes, *, bodies: bool) -> Iterator[Answer]:
    """The responses in what was received."""
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers["content-length"]) if bodies else 0
        assert len(raw) >= length
        yield Answer(int(first.removeprefix("HTTP/1.1 ")[:3]), headers, raw[:length])
        raw = raw[length:]


def exchange(*sent: bytes, bodies: bool = True) -> list[Answer]:
    """Send these to a server, one by one, and hang up when nothing more comes. Returns what it answered."""

    async def main() -> bytes:
        ours, theirs = trio.testing.memory_stream_pair()
        received = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(ROUTES).serve_connection, ours)
            with suppress(trio.BrokenResourceError):  # it has hung up first
                for data in sent:
                    await theirs.send_all(data)
                    with trio.move_on_after(1):
                        while more := await theirs.receive_some():
                            received += more
                await theirs.send_eof()
            while more := await theirs.receive_some():
                received += more
        return received

    return list(parse(virtual(main), bodies=bodies))


class TestAnswers:
    def test_a_page(self) -> None:
        """With what proxies and people need to make sense of it."""
        (answer,) = exchange(HELLO)
        assert (answer.status, answer.body) == (200, b"hello you\n")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["date"].endswith(" GMT")

    def test_headers_and_query(self) -> None:
        """Headers arrive, joined where there are several; the query is not looked at."""
        (answer,) = exchange(b"GET /hello?a=b HTTP/1.1\r\nUser-Agent: a\r\n" + HOST + b"user-agent: b\r\n\r\n")
        assert answer.body == b"hello a, b\n"

    def test_odd_headers(self) -> None:
        """What a handler repeats of a request comes back as it was; what no header can have is replaced."""
        asked = HELLO.replace(b"/hello", b"/odd").replace(HOST, HOST + b"Odd: a\xe9\r\n")
        (answer,) = exchange(asked)
        assert answer.headers["content-type"] == "text/a\xe9?"

    def test_head(self) -> None:
        """The same without the body."""
        answers = exchange(HELLO.replace(b"GET", b"HEAD"), HELLO.replace(b"GET", b"HEAD"), bodies=False)
        assert [(answer.status, answer.headers["content-length"]) for answer in answers] == [(200, "10")] * 2

    @pytest.mark.parametrize(
        "sent",
        [(HELLO, HELLO, HELLO), (HELLO * 3,), (HELLO[:1], HELLO[1:-1], HELLO[-1:] + HELLO, HELLO)],
        ids=["one after the other", "at once", "in pieces"],
    )
    def test_several_on_a_connection(self, sent: tuple[bytes, ...]) -> None:
        """Each is answered, in order."""
        assert [answer.body for answer in exchange(*sent)] == [b"hello you\n"] * 3

    @pytest.mark.parametrize(
        ("sent", "status", "words"),
        [
            pytest.param(
                HELLO.replace(b"/hello", b"/"),
                404,
                b"there is no '/' here, but /bug, /hello, /long, /odd, /slow",
                id="path",
            ),
            pytest.param(HELLO.replace(b"/hello", b"/\xc3"), 400, b"not a request", id="odd bytes"),
            pytest.param(HELLO.replace(b"GET", b"DELETE"), 405, b"only GET and HEAD", id="method"),
            pytest.param(HELLO.replace(HOST, b""), 400, b"not a request", id="no host"),
            pytest.param(HELLO.replace(HOST, HOST + b"Content-Length: 1\r\n") + b"x", 413, b"it has a body", id="body"),
            pytest.param(HELLO.replace(HOST, HOST + b"a b: c\r\n"), 400, b"not a request", id="header"),
            pytest.param(b"\x16\x03\x01 TLS\r\n\r\n", 400, b"not a request", id="TLS"),
            pytest.param(HELLO.replace(HOST, HOST + b"A: " + 100_000 * b"a" + b"\r\n"), 431, b"too long", id="long"),
            pytest.param(HELLO.replace(b"/hello", b"/bug"), 500, b"the daemon's log says why", id="bug"),
        ],
    )
    def test_refused(self, sent: bytes, status: int, words: bytes) -> None:
        """With a status and words that say what is wrong."""
        (answer,) = exchange(sent)
        assert answer.status == status
        assert words in answer.body

    def test_allow(self) -> None:
        """As a 405 must have it."""
        (answer,) = exchange(HELLO.replace(b"GET", b"PUT"))
        assert answer.headers["allow"] == "GET, HEAD"

    def test_head_with_a_body(self) -> None:
        """Is refused, and nothing comes behind the headers."""
        asked = HELLO.replace(b"GET", b"HEAD").replace(HOST, HOST + b"Content-Length: 1\r\n") + b"x"
        (answer,) = exchange(asked, bodies=False)
        assert answer.status == 413

    def test_a_bug_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """With its traceback; and the connection goes on."""
        assert [answer.status for answer in exchange(HELLO.replace(b"/hello", b"/bug"), HELLO)] == [500, 200]
        assert "ZeroDivisionError: a bug in the handler" in caplog.text

    @pytest.mark.parametrize(
        "sent",
        [
            pytest.param(HELLO.replace(HOST, HOST + b"Connection: close\r\n"), id="it was asked to"),
            pytest.param(HELLO.replace(b"1.1", b"1.0"), id="HTTP 1.0"),
            pytest.param(b"nonsense\r\n\r\n", id="nonsense"),
        ],
    )
    def test_it_hangs_up(self, sent: bytes) -> None:
        """After the answer, whatever else was sent."""
        assert len(exchange(sent, HELLO)) == 1


PIECES = [
    *(
        b"GET ",
        b"HEAD ",
        b"POST ",
        b"CONNECT ",
        b"/hello",
        b"/bug",
        b"*",
        b"http://x/hello",
        b" HTTP/1.1",
        b" HTTP/1.0",
    ),
    *(
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b": ",
        b"\0",
        b"\xff",
        b"0\r\n\r\n",
        b"Connection: close\r\n",
        HOST,
        HELLO,
        HELLO[:-2],
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"x" * 5000),
]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join), max_size=4))
def test_whatever_is_sent(sent: list[bytes]) -> None:
    """It raises nothing, and ends when the peer hangs up."""

    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Server(ROUTES).serve_connection, ours)
                with suppress(trio.BrokenResourceError):
                    for data in sent:
                        await theirs.send_all(data)
                        await trio.testing.wait_all_tasks_blocked()
                await theirs.aclose()

    virtual(main)


class World:
    """Connections to one server."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.server = Server(ROUTES)

    async def connect(self, sent: bytes = b"") -> trio.testing.MemoryReceiveStream:
        """A connection on which this was sent."""
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self.server.serve_connection, ours)
        await theirs.send_all(sent)
        await trio.testing.wait_all_tasks_blocked()
        stream = theirs.receive_stream
        assert isinstance(stream, trio.testing.MemoryReceiveStream)
        return stream


class TestLimits:
    @pytest.mark.parametrize("sent", [b"", HELLO[:-2]], ids=["nothing", "half a request"])
    def test_silence(self, sent: bytes) -> None:
        """A peer that does not ask is not waited for."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                stream = await World(nursery).connect(sent)
                before = trio.current_time()
                assert await stream.receive_some() == b""
                assert trio.current_time() - before == pytest.approx(REQUEST_TIMEOUT)

        virtual(main)

    def test_a_peer_that_does_not_read(self) -> None:
        """Is not waited for either."""

        async def main() -> None:
            ours, theirs = trio.testing.lockstep_stream_pair()
            before = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Server(ROUTES).serve_connection, ours)
                await theirs.send_all(HELLO.replace(b"/hello", b"/long"))
            assert trio.current_time() - before == pytest.approx(RESPONSE_TIMEOUT)

        virtual(main)

    @pytest.mark.parametrize(
        "sent",
        [
            pytest.param(b"", id="idle"),
            pytest.param(HELLO.replace(b"/hello", b"/slow"), id="being answered"),
            pytest.param(HELLO.replace(b"/hello", b"/slow") * 2, id="asking on"),
        ],
    )
    def test_many_connections_keep_nobody_out(self, sent: bytes) -> None:
        """The one that came first goes, and no other."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                world = World(nursery)
                first, second, *_ = [await world.connect(sent) for _ in range(MAX_CONNECTIONS)]
                answered = await world.connect(HELLO)
                assert await first.receive_some() == b""
                assert b"hello you" in await answered.receive_some()
                with trio.move_on_after(1) as scope:
                    await second.receive_some()
                assert scope.cancelled_caught
                nursery.cancel_scope.cancel()

        virtual(main)

    def test_whoever_was_answered_is_not_the_first_to_go(self) -> None:
        """Prometheus keeps its connection between scrapes."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                world = World(nursery)
                ours, kept = trio.testing.memory_stream_pair()
                nursery.start_soon(world.server.serve_connection, ours)
                idle = [await world.connect() for _ in range(MAX_CONNECTIONS - 1)]
                await kept.send_all(HELLO)
                assert b"hello you" in await kept.receive_some()
                await trio.testing.wait_all_tasks_blocked()
                await world.connect()
                assert await idle[0].receive_some() == b""
                await kept.send_all(HELLO)
                assert b"hello you" in await kept.receive_some()
                nursery.cancel_scope.cancel()

        virtual(main)

    def test_whoever_left_takes_no_place(self) -> None:
        """However many came before."""

        async def main() -> None:
            server = Server(ROUTES)
            for _ in range(3 * MAX_CONNECTIONS):
                async with trio.open_nursery() as nursery:
                    ours, theirs = trio.testing.memory_stream_pair()
                    nursery.start_soon(server.serve_connection, ours)
                    await theirs.send_all(HELLO)
                    assert b"hello you" in await theirs.receive_some()
                    await theirs.aclose()

        virtual(main)


class TestCancellation:
    @pytest.mark.parametrize(
        "sent",
        [
            pytest.param(b"", id="idle"),
            pytest.param(HELLO[:-2], id="within a request"),
            pytest.param(HELLO.replace(b"/hello", b"/slow"), id="handler waits"),
            pytest.param(HELLO.replace(b"/hello", b"/long"), id="peer does not read"),
        ],
    )
    def test_cancelled_is_not_swallowed(self, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
        """It ends, at once."""

        async def main() -> None:
            ours, theirs = trio.testing.lockstep_stream_pair()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Server(ROUTES).serve_connection, ours)
                with trio.move_on_after(1):
                    await theirs.send_all(sent)
                before = trio.current_time()
                nursery.cancel_scope.cancel()
            assert trio.current_time() == before

        virtual(main)
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_on_a_socket() -> None:
    """A peer that resets its connection is no trouble to the next one."""

    async def main() -> bytes:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listener.socket.getsockname()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, [listener], ROUTES)
            rude = await trio.open_tcp_stream(*address)
            await rude.send_all(HELLO.replace(b"/hello", b"/long"))
            await rude.receive_some(1)
            await trio.aclose_forcefully(rude)
            async with await trio.open_tcp_stream(*address) as stream:
                await stream.send_all(HELLO)
                received = await stream.receive_some()
            nursery.cancel_scope.cancel()
        return bytes(received)

    assert trio.run(main).endswith(b"hello you\n")
