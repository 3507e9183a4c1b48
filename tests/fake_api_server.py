"""The demo's API server with what goes wrong: refusals, conflicts, fields that are dropped, slow answers, cut watches.

`connected` connects a client in the same trio program, so that a virtual clock does; `serving` serves HTTPS, for whole
processes. Faults are set by attributes, at any time.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import parse_qsl, urlsplit

import httpcore
import trio
import trustme

from sgpu.commands.demo.api_server import (
    Answer,
    ApiObjects,
    Object,
    encode,
    is_watch,
    serve_connection,
    status,
)
from sgpu.kubeapi import Access, ApiServer
from sgpu.kubeapi.access import Credentials
from sgpu.lib import listeners

__all__ = ["Answer", "FakeApiServer", "Object", "connected", "serving"]

T = TypeVar("T")

TOKEN: Final = "a-token"
#: Seconds after which a server that should have started is taken to hang.
TIMEOUT: Final = 30.0
#: A server has said 200 by then.
_TOO_OLD: Final = b'{"type":"ERROR","object":{"code":410,"message":"too old resource version"}}\n'


class FakeApiServer(ApiObjects):
    """`requests` has all requests, as `GET /api/v1/nodes/a` and `GET /api/v1/nodes?watch`."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        #: Changes what is stored, as a server does that does not know a field.
        self.drop: Callable[[Object], None] = lambda thing: None
        #: Answers that come instead of the next ones; for requests that begin with the key. The last one stays.
        self.instead: dict[str, list[Answer]] = {}
        #: Versions up to this are too old to watch from.
        self.forgotten = -1
        #: Seconds until each answer.
        self.delay = 0.0
        self.tokens = {TOKEN}
        #: The event loop that serves, where that is another thread's.
        self.loop: trio.lowlevel.TrioToken | None = None
        self._hang_ups = 0

    def put(self, path: str, thing: Object) -> Object:
        return self._in_loop(partial(super().put, path, thing))

    def remove(self, path: str) -> Object:
        """Delete an object, as somebody else does; in the answer to a request, too."""
        return self._in_loop(partial(super().remove, path))

    def hang_up(self) -> None:
        """End all watches in the middle of a line."""
        self._hang_ups += 1
        self._in_loop(self.changed.notify)

    def forget(self) -> None:
        """Let no watch begin at a version that anybody has."""
        self.version += 1
        self.forget_before_now()

    def forget_before_now(self) -> None:
        """Let watches begin at the latest version only."""
        self.forgotten = self.version - 1

    async def answer(self, method: str, target: str, body: bytes, token: str) -> Answer:
        await trio.sleep(self.delay)
        url = urlsplit(target)
        request = f"{method} {url.path}{'?watch' * ('watch' in dict(parse_qsl(url.query)))}"
        self.requests.append(request)
        for prefix, answers in self.instead.items():
            if request.startswith(prefix) and answers:
                return answers.pop(0) if len(answers) > 1 else answers[0]
        if token not in self.tokens:
            return status(401, "Unauthorized")
        return await super().answer(method, target, body, token)

    async def watch(self, target: str) -> AsyncGenerator[bytes, None]:
        if int(dict(parse_qsl(urlsplit(target).query))["resourceVersion"]) <= self.forgotten:
            yield _TOO_OLD
            return
        hang_ups = self._hang_ups
        async with aclosing(super().watch(target)) as chunks:
            async for chunk in chunks:
                yield chunk
                if hang_ups != self._hang_ups:
                    yield b'{"type":'
                    raise trio.BrokenResourceError("hung up")

    def _store(self, path: str, thing: Object, kind: str, *, dry_run: bool = False) -> Object:
        self.drop(thing)
        return super()._store(path, thing, kind, dry_run=dry_run)

    def _in_loop(self, change: Callable[[], T]) -> T:
        """Change something where the watches wait for it."""
        if self.loop is None or (trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self.loop):
            return change()
        done = Future[T]()
        self.loop.run_sync_soon(lambda: done.set_result(change()))
        return done.result(TIMEOUT)


async def _once(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content


class _Body:
    """The body of an answer, as httpcore's: to read on when it is closed is an error."""

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self._chunks = chunks
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._chunks):
                async for chunk in self._chunks:
                    if chunk:
                        yield chunk
                    if self._closed:
                        raise httpcore.ReadError("closed")
        except trio.BrokenResourceError as error:
            raise httpcore.ReadError(str(error)) from error

    async def aclose(self) -> None:
        self._closed = True


class _Pool(httpcore.AsyncConnectionPool):
    def __init__(self, server: FakeApiServer) -> None:
        super().__init__()
        self._server = server

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        target = request.url.target.decode()
        headers = dict(request.headers)
        token = headers[b"Authorization"].decode().removeprefix("Bearer ")
        assert isinstance(request.stream, AsyncIterable)
        body = b"".join([chunk async for chunk in request.stream])
        answer = await self._server.answer(request.method.decode(), target, body, token)
        if is_watch(target, answer):
            return httpcore.Response(200, content=_Body(self._server.watch(target)))
        return httpcore.Response(
            answer.status, headers=list(answer.headers.items()), content=_Body(_once(encode(answer.content)))
        )


class _Known(Credentials):
    """A token without files: reading them takes a thread, which a virtual clock does not wait for."""

    async def token(self) -> str:
        return TOKEN


@asynccontextmanager
async def connected(server: FakeApiServer, manifest: str = "") -> AsyncIterator[ApiServer]:
    """Yield a client of this server, in this trio program."""
    access = Access("http://fake", Path(), Path(), manifest)
    async with _Pool(server) as pool:
        yield ApiServer(pool, access.url, _Known(access))


@contextmanager
def serving(server: FakeApiServer, directory: Path) -> Iterator[Access]:
    """Serve HTTPS on a free port; `directory` gets what a pod has of its service account. Yields the access to it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.crt")
    (directory / "token").write_text(f"{TOKEN}\n")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with serving_plain(server, tls) as port:
        yield Access(f"https://127.0.0.1:{port}", directory / "token", directory / "ca.crt")


@contextmanager
def serving_plain(server: FakeApiServer, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve HTTP, or HTTPS, on a free port, in an event loop of another thread. Yields the port."""
    ports: list[int] = []
    started, stop = threading.Event(), trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        if tls is None:
            await serve_connection(server, stream)
        else:
            await serve_connection(server, trio.SSLStream(stream, tls, server_side=True, https_compatible=True))

    async def serve() -> None:
        listening = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ports.extend(listener.socket.getsockname()[1] for listener in listening)
        server.loop = trio.lowlevel.current_trio_token()
        started.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listeners.serve, listening, handle)
            await stop.wait()
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    try:
        assert started.wait(TIMEOUT)
        assert server.loop
        yield ports[0]
    finally:
        if server.loop:
            server.loop.run_sync_soon(stop.set)
        thread.join()
        server.loop = None
