"""A small HTTP/1.1 server on h11 and trio: GET and HEAD of a few paths, and POST where a path takes it. Knows nothing
of what is on the pages.

Whoever can reach the port can ask: each connection, and all of them together, cost little and end by themselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, NoReturn

import attrs
import h11
import trio

from sgpu.lib import listeners as listeners_

logger = logging.getLogger(__name__)

#: Connections at a time. When there are more, the one that was answered longest ago is closed, whatever it is doing:
#: those that ask nothing, or much without reading it, keep nobody out, least of all the kubelet's probes.
MAX_CONNECTIONS: Final = 32
#: Seconds for a request to be complete, from the end of the one before: more than most intervals of scraping, so that
#: connections are kept.
REQUEST_TIMEOUT: Final = 75.0
#: Seconds for an answer to be taken. The largest has some 100 KB.
RESPONSE_TIMEOUT: Final = 10.0
#: Bytes of a request's line and headers.
MAX_REQUEST_BYTES: Final = 16 * 1024
#: Bytes of a request's body.
MAX_BODY_BYTES: Final = 4096
#: Bytes taken off a connection at a time.
RECEIVE_BYTES: Final = 4096

TEXT: Final = "text/plain; charset=utf-8"


@attrs.frozen
class Request:
    """An HTTP request. Names of headers are in lower case; several of one name are joined by commas.

    `query` is what follows the path's question mark, as it came. `body` is that of a POST.
    """

    path: str
    headers: Mapping[str, str]
    query: str = ""
    body: bytes = b""


@attrs.frozen
class Response:
    """An HTTP response."""

    status: int
    body: bytes
    content_type: str = TEXT
    headers: Mapping[str, str] = attrs.Factory(dict)


Handler = Callable[[Request], Awaitable[Response]]
Routes = Mapping[str, Handler]


def text(status: int, message: str) -> Response:
    """Return a response of plain text."""
    return Response(status, f"{message}\n".encode("utf-8", "replace"))


async def serve(listeners: Sequence[trio.SocketListener], routes: Routes, posts: Routes | None = None) -> NoReturn:
    """Serve what connects to the listeners, which are closed at the end.

    `routes`: handlers of GET and HEAD by path; `posts`: handlers of POST, by paths of their own.
    """
    await listeners_.serve(listeners, Server(routes, posts).serve_connection)


class Server:
    """The connections that are open."""

    def __init__(self, routes: Routes, posts: Routes | None = None) -> None:
        self._routes = routes
        self._posts = posts or {}
        self._open: dict[trio.CancelScope, None] = {}  # the one whose last answer, or begin, is longest ago comes first

    async def serve_connection(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until either side closes it. Raises nothing for anything the peer does."""
        if len(self._open) >= MAX_CONNECTIONS:
            longest = next(iter(self._open))
            del self._open[longest]
            longest.cancel()
        with trio.CancelScope() as scope:
            self._open[scope] = None
            try:
                async with stream:
                    await _Connection(stream, self._routes, self._posts, partial(self._answered, scope)).run()
            except trio.BrokenResourceError:
                pass  # a peer that did not wait for the end
            finally:
                self._open.pop(scope, None)

    def _answered(self, scope: trio.CancelScope) -> None:
        if scope in self._open:  # else it has had to make room
            del self._open[scope]
            self._open[scope] = None


class _Connection:
    def __init__(self, stream: trio.abc.Stream, routes: Routes, posts: Routes, answered: Callable[[], None]) -> None:
        self._stream = stream
        self._routes = routes
        self._posts = posts
        self._answered = answered
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
        self._wants_body = True  # in the answer, that is

    async def run(self) -> None:
        while True:
            try:
                received = await self._receive()
                if received is None:
                    return
                response = await self._answer(*received)
            except h11.RemoteProtocolError as error:
                response = text(error.error_status_hint, f"not a request that is understood here: {error}")
            with trio.move_on_after(RESPONSE_TIMEOUT):
                await self._send(response)
            if (self._http.our_state, self._http.their_state) != (h11.DONE, h11.DONE):
                return
            self._answered()
            self._http.start_next_cycle()

    async def _receive(self) -> tuple[h11.Request, bytes] | None:
        """Return the next complete request with its body. None if the peer has hung up, or takes too long."""
        with trio.move_on_after(REQUEST_TIMEOUT):
            request = await self._next_event()
            if not isinstance(request, h11.Request):
                return None
            self._wants_body = request.method != b"HEAD"
            body = b""
            most = MAX_BODY_BYTES if request.method == b"POST" and _path(request) in self._posts else 0
            while isinstance(part := await self._next_event(), h11.Data):
                body += part.data
                if len(body) > most:
                    what = f"its body has more than {most} bytes" if most else "it has a body"
                    raise h11.RemoteProtocolError(what, error_status_hint=413)
            return request, body
        return None

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(bytes(await self._stream.receive_some(RECEIVE_BYTES)))
        return event  # type: ignore[return-value]  # h11 does not tell its sentinels apart

    async def _answer(self, request: h11.Request, body: bytes) -> Response:
        path, query = _path(request), request.target.decode("latin-1").partition("?")[2]
        handler = self._routes.get(path) or self._posts.get(path)
        if handler is None:
            return text(404, f"there is no {path!r} here, but {', '.join(sorted((*self._routes, *self._posts)))}")
        if path in self._posts and request.method != b"POST":
            return attrs.evolve(text(405, "only POST is answered"), headers={"Allow": "POST"})
        if path in self._routes and request.method not in (b"GET", b"HEAD"):
            return attrs.evolve(text(405, "only GET and HEAD are answered"), headers={"Allow": "GET, HEAD"})
        headers: dict[str, str] = {}
        for name, value in request.headers:
            key = name.decode("latin-1")
            headers[key] = ", ".join(filter(None, (headers.get(key), value.decode("latin-1"))))
        try:
            return await handler(Request(path, headers, query, body))
        except Exception:
            logger.exception("%s failed", path)
            return text(500, f"{path} failed; the daemon's log says why")

    async def _send(self, response: Response) -> None:
        headers = {
            "Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            "Content-Type": response.content_type,
            "Content-Length": str(len(response.body)),
            **response.headers,
        }
        # As they came: what a handler repeats of a request's headers was decoded so.
        fields = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        events: list[h11.Event] = [h11.Response(status_code=response.status, headers=fields)]
        if self._wants_body:
            events.append(h11.Data(data=response.body))
        # What ends the message has no bytes of its own; it comes last, so that a connection whose peer did not take all
        # is not taken for one that is done.
        await self._stream.send_all(b"".join(self._http.send(event) or b"" for event in events))
        self._http.send(h11.EndOfMessage())


def _path(request: h11.Request) -> str:
    return request.target.decode("latin-1").partition("?")[0]
