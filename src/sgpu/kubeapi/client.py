"""Requests to the API server, by httpcore. Each ends within a deadline, and every answer has a largest size."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

import trio

from sgpu import __version__
from sgpu.kubeapi.access import Access, Credentials
from sgpu.kubeapi.error import ApiServerError, refusal
from sgpu.lib.postpone import postponed
from sgpu.lib.retry import growing_delays, jittered

#: HTTP/2, and httpcore's synchronous twin, which nobody uses here: 1.4 MB.
UNUSED: Final = {
    "httpcore._api": ("request", "stream"),
    "httpcore._async.http2": ("AsyncHTTP2Connection",),
    "httpcore._sync": (
        *("ConnectionInterface", "ConnectionPool", "HTTP11Connection", "HTTP2Connection"),
        *("HTTPConnection", "HTTPProxy", "SOCKSProxy"),
    ),
}

with postponed(UNUSED):
    import httpcore

Object = dict[str, Any]
Query = Mapping[str, str]

#: Seconds for a request with its retries. The kubelet gives a driver 45 s to prepare a claim.
REQUEST_TIMEOUT: Final = 15.0
#: Seconds until the server ends a watch, at least; at most twice that, so that the nodes' watches don't end together.
WATCH_SECONDS: Final = 300.0
#: Seconds after which a watch is given up that the server should have ended.
WATCH_GRACE: Final = 30.0
#: Seconds between retries within one request, growing from the first to the last.
RETRY_DELAYS: Final = (0.2, 3.0)
#: Bytes of an answer, or of one event of a watch. etcd refuses objects of more than 1.5 MB.
MAX_BYTES: Final = 8 << 20
#: 429 is sent before anything is done, so even a request that changes something may be sent again.
_NOT_DONE: Final = frozenset({429})
#: Reads may be sent again after any of these; 0 is no answer at all.
_PASSING: Final = frozenset({0, 429, 500, 502, 503, 504})
#: Where it is not that of JSON.
_CONTENT_TYPES: Final = {"PATCH": "application/merge-patch+json"}
#: httpcore's errors have no common base. The others are of proxies and of URLs that are not of HTTP.
_FAILURES: Final = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)
#: Notices within a minute that the other side is gone, which a watch at rest would not.
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class Event(NamedTuple):
    """An event of a watch: `ADDED`, `MODIFIED`, `DELETED` or `BOOKMARK`, and the object."""

    kind: str
    object: Object


@asynccontextmanager
async def open_api_server(access: Access) -> AsyncIterator[ApiServer]:
    """Yield the API server, and close the connections at the end. Connects to nothing yet."""
    credentials = Credentials(access)
    async with httpcore.AsyncConnectionPool(
        ssl_context=credentials.tls,
        max_connections=16,
        max_keepalive_connections=2,
        keepalive_expiry=30.0,
        socket_options=_KEEPALIVE,
    ) as pool:
        yield ApiServer(pool, access.url, credentials)


class _Request(NamedTuple):
    """A request, for messages: `GET /api/v1/nodes/a`, and the server's address."""

    name: str
    server: str


class ApiServer:
    """Requests by path: `/apis/resource.k8s.io/v1/resourceslices/name`. All of them raise ApiServerError alone."""

    def __init__(self, pool: httpcore.AsyncConnectionPool, url: str, credentials: Credentials) -> None:
        self._pool = pool
        self._url = url
        self._credentials = credentials

    async def get(self, path: str, query: Query | None = None) -> Object:
        """Return an object, or a list of them with its resource version."""
        return await self._request("GET", path, query)

    async def create(self, path: str, thing: Object, *, dry_run: bool = False) -> Object:
        """Create an object below the path of its kind, and return it as the server has it, or would have it."""
        return await self._request("POST", path, {"dryRun": "All"} if dry_run else None, thing)

    async def replace(self, path: str, thing: Object) -> Object:
        """Replace an object; a conflict if it is not of the resource version in `thing` any more."""
        return await self._request("PUT", path, body=thing)

    async def patch(self, path: str, change: Object) -> Object:
        """Merge a change into an object, where null removes (RFC 7386), and return it as the server has it then."""
        return await self._request("PATCH", path, body=change)

    async def delete(self, path: str) -> None:
        """Delete an object. It may be gone already."""
        try:
            await self._request("DELETE", path)
        except ApiServerError as error:
            if not error.not_found:
                raise

    @asynccontextmanager
    async def watch(self, path: str, version: str, query: Query | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        """Yield the events after a resource version, until the server ends the watch after some minutes.

        Whoever iterates gets ApiServerError too; `expired` where the version is too old.
        """
        seconds = random.uniform(WATCH_SECONDS, 2 * WATCH_SECONDS)
        asked = {
            "watch": "1",
            "allowWatchBookmarks": "1",
            "resourceVersion": version,
            "timeoutSeconds": f"{seconds:.0f}",
        }
        silence = seconds + WATCH_GRACE
        async with self._stream("GET", path, {**(query or {}), **asked}, silence=silence) as (request, chunks):
            async with aclosing(_events(request, chunks, self._credentials.manifest)) as events:
                yield events

    async def _request(self, method: str, path: str, query: Query | None = None, body: Object | None = None) -> Object:
        again = _PASSING if method == "GET" else _NOT_DONE
        failure = ApiServerError(f"{method} {path}: no answer within {REQUEST_TIMEOUT:g} s")
        with trio.move_on_after(REQUEST_TIMEOUT):
            for delay in growing_delays(*RETRY_DELAYS):
                try:
                    async with self._stream(method, path, query, body) as (request, chunks):
                        return _parse(request, await _join(request, chunks))
                except ApiServerError as error:
                    failure = error
                    if error.status not in again:
                        raise
                await trio.sleep(max(jittered(delay), failure.retry_after))
        raise failure

    @asynccontextmanager
    async def _stream(
        self,
        method: str,
        path: str,
        query: Query | None,
        body: Object | None = None,
        silence: float | None = None,
    ) -> AsyncIterator[tuple[_Request, AsyncIterator[bytes]]]:
        """Yield the body of a successful answer, which is still to come. Silence of so many seconds breaks it."""
        token = await self._credentials.token()
        request = _Request(f"{method} {path}", self._url)
        try:
            response = await self._pool.handle_async_request(
                self._build(method, path, query, body, token, silence or REQUEST_TIMEOUT)
            )
        except _FAILURES as error:
            raise _broken(request, error) from error
        chunks = _chunks(request, response)
        try:
            if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                if response.status == HTTPStatus.UNAUTHORIZED:
                    self._credentials.expire()
                raise await _refusal(request, response, chunks, self._credentials.manifest)
            yield request, chunks
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await response.aclose()
                # What httpcore reads is closed, so its generators come to their end instead of to the collector.
                with suppress(ApiServerError):
                    async for _ in chunks:
                        pass

    def _build(
        self, method: str, path: str, query: Query | None, body: Object | None, token: str, silence: float
    ) -> httpcore.Request:
        headers: dict[str | bytes, str | bytes] = {
            "Host": self._url.partition("//")[2],
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"sgpu/{__version__}",
        }
        if token:
            headers["Authorization"] = f"Bearer {token}".encode()
        content = None
        if body is not None:
            content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
            headers["Content-Type"] = _CONTENT_TYPES.get(method, "application/json")
            headers["Content-Length"] = str(len(content))
        url = self._url + quote(path) + (f"?{urlencode(query)}" if query else "")
        timeout = {**dict.fromkeys(("connect", "write", "pool"), REQUEST_TIMEOUT), "read": silence}
        return httpcore.Request(method, url, headers=headers, content=content, extensions={"timeout": timeout})


async def _events(request: _Request, chunks: AsyncIterator[bytes], manifest: str) -> AsyncGenerator[Event, None]:
    async with aclosing(_lines(request, chunks)) as lines:
        async for line in lines:
            content = _parse(request, line)
            kind, thing = content.get("type"), content.get("object")
            if not isinstance(kind, str) or not isinstance(thing, dict):
                raise _broken(request, ValueError("an event without type or object"))
            if kind == "ERROR":
                raise refusal(request.name, int(thing.get("code", 500)), str(thing.get("message")), manifest)
            yield Event(kind, thing)


async def _refusal(
    request: _Request, response: httpcore.Response, chunks: AsyncIterator[bytes], manifest: str
) -> ApiServerError:
    """Return the error for an answer that is not a success, with the message of the server's Status if it is one."""
    body = await _join(request, chunks)
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError):  # from a proxy, or the server's own plain text
        reason: bytes = response.extensions.get("reason_phrase", b"")
        message = body[:200].decode("utf-8", "replace").strip() or reason.decode("ascii", "ignore")
    headers = {name.lower(): value.decode("ascii", "ignore") for name, value in response.headers}
    return refusal(request.name, response.status, message, manifest, headers.get(b"retry-after", ""))


async def _lines(request: _Request, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    rest = bytearray()
    async for chunk in chunks:
        rest += chunk
        _check_size(request, rest)
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield bytes(line)


async def _join(request: _Request, chunks: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        _check_size(request, body)
    return bytes(body)


async def _chunks(request: _Request, response: httpcore.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.aiter_stream():
            yield chunk
    except _FAILURES as error:
        raise _broken(request, error) from error


def _parse(request: _Request, text: bytes) -> Object:
    try:
        thing = json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one
        raise _broken(request, error) from error
    if not isinstance(thing, dict):
        raise _broken(request, ValueError(f"a {type(thing).__name__} instead of an object"))
    return thing


def _check_size(request: _Request, received: bytearray) -> None:
    if len(received) > MAX_BYTES:
        raise _broken(request, ValueError(f"more than {MAX_BYTES >> 20} MiB for one object"))


def _broken(request: _Request, error: Exception) -> ApiServerError:
    """Return the error for an answer that did not come, or not to its end."""
    reason = _reason(error)
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        reason += "; the service account's ca.crt did not sign its certificate"
    return ApiServerError(f"{request.name}: no usable answer from {request.server}: {reason}")


def _reason(error: BaseException) -> str:
    """Return the first message in the chain of causes: of a failed handshake, only the innermost error has one."""
    cause = error.__cause__ or error.__context__
    return str(error) or (_reason(cause) if cause else type(error).__name__)
