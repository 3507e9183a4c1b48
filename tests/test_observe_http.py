"""The HTTP server, over streams in memory and on a virtual clock."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from virtual_clock import beside, real, virtual

from sgpu.observe import http
from sgpu.observe.http import MAX_CONNECTIONS, REQUEST_TIMEOUT, RESPONSE_TIMEOUT, Request, Response, Server, serve, text

HOST = b"Host: gpu-node\r\n"


def asking(path: bytes = b"/hello", method: bytes = b"GET", headers: bytes = b"", version: bytes = b"1.1") -> bytes:
    return method + b" " + path + b" HTTP/" + version + b"\r\n" + HOST + headers + b"\r\n"


def posting(path: bytes, body: bytes) -> bytes:
    return asking(path, b"POST", b"Content-Length: %d\r\n" % len(body)) + body


HELLO, SLOW, LONG = asking(), asking(b"/slow"), asking(b"/long")


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


async def tell(request: Request) -> Response:
    return text(200, f"told {request.body.decode()}")


POSTS: http.Routes = {"/tell": tell}
ROUTES: http.Routes = {"/hello": hello, "/bug": bug, "/long": long, "/odd": odd, "/slow": slow}


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


async def exchange(*sent: bytes, bodies: bool = True) -> list[Answer]:
    """Send these to a server, one by one, and hang up when nothing more comes. Returns what it answered."""
    ours, theirs = trio.testing.memory_stream_pair()
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server(ROUTES, POSTS).serve_connection, ours)
        with suppress(trio.BrokenResourceError):  # it has hung up first
            for data in sent:
                await theirs.send_all(data)
                with trio.move_on_after(1):
                    while more := await theirs.receive_some():
                        received += more
            await theirs.send_eof()
        while more := await theirs.receive_some():
            received += more
    return list(parse(received, bodies=bodies))


class TestAnswers:
    @pytest.mark.parametrize(
        "sent",
        [(HELLO, HELLO, HELLO), (HELLO * 3,), (HELLO[:1], HELLO[1:-1], HELLO[-1:] + HELLO, HELLO)],
        ids=["one after the other", "at once", "in pieces"],
    )
    @virtual
    async def test_pages(self, sent: tuple[bytes, ...]) -> None:
        """Answer all requests on a connection in order, with the headers that proxies and people need."""
        answers = await exchange(*sent)
        assert [(answer.status, answer.body) for answer in answers] == [(200, b"hello you\n")] * 3
        assert answers[0].headers["content-type"] == "text/plain; charset=utf-8"
        assert answers[0].headers["date"].endswith(" GMT")

    @virtual
    async def test_headers_and_query(self) -> None:
        """Give headers to the handler, joined where there are several, and ignore the query."""
        (answer,) = await exchange(asking(b"/hello?a=b", headers=b"User-Agent: a\r\nuser-agent: b\r\n"))
        assert answer.body == b"hello a, b\n"

    @virtual
    async def test_odd_headers(self) -> None:
        """Send back what a handler repeats of a request as it was, and replace what no header can have."""
        (answer,) = await exchange(asking(b"/odd", headers=b"Odd: a\xe9\r\n"))
        assert answer.headers["content-type"] == "text/a\xe9?"

    @virtual
    async def test_head(self) -> None:
        """Answer HEAD without the body, on a connection that goes on, and also where it is refused."""
        refused = asking(method=b"HEAD", headers=b"Content-Length: 1\r\n") + b"x"
        answers = await exchange(*[asking(method=b"HEAD")] * 2, refused, bodies=False)
        assert [answer.status for answer in answers] == [200, 200, 413]
        assert answers[0].headers["content-length"] == "10"

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (asking(b"/\xc3"), 400),
            (HELLO.replace(HOST, b""), 400),
            (asking(headers=b"a b: c\r\n"), 400),
            (b"\x16\x03\x01 TLS\r\n\r\n", 400),
            (asking(headers=b"Content-Length: 1\r\n") + b"x", 413),
            (asking(headers=b"A: " + 100_000 * b"a" + b"\r\n"), 431),
        ],
        ids=["odd bytes", "no host", "header", "TLS", "body", "long"],
    )
    @virtual
    async def test_refused(self, sent: bytes, status: int) -> None:
        """Refuse what is no request that is understood here, with its status, and hang up."""
        (answer,) = await exchange(sent, HELLO)
        assert answer.status == status
        assert answer.body

    @virtual
    async def test_path_and_method(self, caplog: pytest.LogCaptureFixture) -> None:
        """Say which paths and methods there are. Log a bug in a handler with its traceback. Go on after each."""
        path, method, bug, _ = await exchange(asking(b"/"), asking(method=b"DELETE"), asking(b"/bug"), HELLO)
        assert path.status == 404
        assert b"/bug, /hello, /long, /odd, /slow" in path.body
        assert (method.status, method.headers["allow"]) == (405, "GET, HEAD")
        assert bug.status == 500
        assert "ZeroDivisionError: a bug in the handler" in caplog.text

    @virtual
    async def test_post(self) -> None:
        """Give the body of a POST to the handler, however it is cut, and go on; answer nothing else on its path."""
        whole = posting(b"/tell", b"the truth")
        *told, get, head = await exchange(whole[:-3], whole[-3:] + whole, asking(b"/tell"), HELLO)
        assert [answer.body for answer in told] == [b"told the truth\n"] * 2
        assert (get.status, get.headers["allow"], head.status) == (405, "POST", 200)

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (posting(b"/hello", b""), 405),
            (posting(b"/hello", b"x"), 413),
            (posting(b"/tell", b"x" * 5000), 413),
            (posting(b"/tell", b"x").replace(b"POST", b"PUT"), 413),
        ],
        ids=["no such POST", "with a body", "too much", "PUT"],
    )
    @virtual
    async def test_post_refused(self, sent: bytes, status: int) -> None:
        """Take a body where it is wanted, no more of it than that, and nowhere else."""
        answer, *_ = await exchange(sent)
        assert answer.status == status

    @pytest.mark.parametrize("last", [asking(headers=b"Connection: close\r\n"), asking(version=b"1.0")])
    @virtual
    async def test_hanging_up(self, last: bytes) -> None:
        """Hang up after the answer where the peer expects it, whatever else was sent."""
        assert len(await exchange(last, HELLO)) == 1


async def connect(nursery: trio.Nursery, server: Server, sent: bytes = b"") -> trio.StapledStream[Any, Any]:
    """A connection to the server on which this was sent."""
    ours, theirs = trio.testing.memory_stream_pair()
    nursery.start_soon(server.serve_connection, ours)
    await theirs.send_all(sent)
    await trio.testing.wait_all_tasks_blocked()
    return theirs


class TestLimits:
    @pytest.mark.parametrize("sent", [b"", HELLO[:-2]], ids=["nothing", "half a request"])
    @virtual
    async def test_silence(self, sent: bytes) -> None:
        """Hang up on a peer that does not complete a request."""
        async with trio.open_nursery() as nursery:
            stream = await connect(nursery, Server(ROUTES), sent)
            before = trio.current_time()
            assert await stream.receive_some() == b""
            assert trio.current_time() - before == pytest.approx(REQUEST_TIMEOUT)

    @virtual
    async def test_a_peer_that_does_not_read(self) -> None:
        """Hang up on a peer that does not take the answer."""
        ours, theirs = trio.testing.lockstep_stream_pair()
        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(ROUTES).serve_connection, ours)
            await theirs.send_all(LONG)
        assert trio.current_time() - before == pytest.approx(RESPONSE_TIMEOUT)

    @pytest.mark.parametrize("sent", [b"", SLOW, SLOW * 2], ids=["idle", "being answered", "asking on"])
    @virtual
    async def test_many_connections_keep_nobody_out(self, sent: bytes) -> None:
        """Close the connection that came first, and no other, to make room for another."""
        async with trio.open_nursery() as nursery:
            server = Server(ROUTES)
            first, second, *_ = [await connect(nursery, server, sent) for _ in range(MAX_CONNECTIONS)]
            answered = await connect(nursery, server, HELLO)
            assert await first.receive_some() == b""
            assert b"hello you" in await answered.receive_some()
            with trio.move_on_after(1) as scope:
                await second.receive_some()
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()

    @virtual
    async def test_an_answer_keeps_a_connection(self) -> None:
        """Close the one that was answered longest ago: Prometheus keeps its connection between scrapes."""
        async with trio.open_nursery() as nursery:
            server = Server(ROUTES)
            kept = await connect(nursery, server)
            idle = [await connect(nursery, server) for _ in range(MAX_CONNECTIONS - 1)]
            for newcomers in (1, 0):
                await kept.send_all(HELLO)
                assert b"hello you" in await kept.receive_some()
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(newcomers):
                    await connect(nursery, server)
            assert await idle[0].receive_some() == b""
            nursery.cancel_scope.cancel()

    @virtual
    async def test_whoever_left_takes_no_place(self) -> None:
        """Forget connections that ended, however many came."""
        async with trio.open_nursery() as nursery:
            server = Server(ROUTES)
            kept = await connect(nursery, server)
            for _ in range(2 * MAX_CONNECTIONS):
                await (await connect(nursery, server, HELLO)).aclose()
                await trio.testing.wait_all_tasks_blocked()
            await kept.send_all(HELLO)
            assert b"hello you" in await kept.receive_some()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "sent", [b"", HELLO[:-2], SLOW, LONG], ids=["idle", "within a request", "handler waits", "peer does not read"]
)
@virtual
async def test_cancellation(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """End at once when it is cancelled."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with beside(Server(ROUTES).serve_connection, ours):
        with trio.move_on_after(1):
            await theirs.send_all(sent)
        before = trio.current_time()
    assert trio.current_time() == before
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@real
async def test_on_a_socket() -> None:
    """Serve the next connection after a peer reset one."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    async with beside(serve, [listener], ROUTES):
        rude = await trio.open_tcp_stream(*address)
        await rude.send_all(LONG)
        await rude.receive_some(1)
        await trio.aclose_forcefully(rude)
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(HELLO)
            assert bytes(await stream.receive_some()).endswith(b"hello you\n")
