"""Requests to the API server, by httpx. Every request ends within a deadline, and every answer has a largest size."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, NamedTuple

import httpx
import trio

from sgpu import __version__
from sgpu.kubeapi.access import Access, Credentials
from sgpu.kubeapi.error import ApiServerError, refusal
from sgpu.lib.retry import growing_delays, jittered

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
_CONTENT_TYPES: Final = {"PATCH": {"Content-Type": "application/merge-patch+json"}}
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
    transport = httpx.AsyncHTTPTransport(
        verify=credentials.tls,
        trust_env=False,
        socket_options=_KEEPALIVE,
        limits=httpx.Limits(max_connections=16, max_keepalive_connections=2, keepalive_expiry=30.0),
    )
    headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": f"sgpu/{__version__}"}
    # Nothing of the environment: a proxy for the internet is not one for the API server.
    async with httpx.AsyncClient(
        base_url=access.url, transport=transport, headers=headers, trust_env=False, timeout=REQUEST_TIMEOUT
    ) as client:
        yield ApiServer(client, credentials)


class ApiServer:
    """Requests by path: `/apis/resource.k8s.io/v1/resourceslices/name`. All of them raise ApiServerError alone."""

    def __init__(self, client: httpx.AsyncClient, credentials: Credentials) -> None:
        self._client = client
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
        timeout = httpx.Timeout(REQUEST_TIMEOUT, read=seconds + WATCH_GRACE)
        async with self._stream("GET", path, {**(query or {}), **asked}, timeout=timeout) as response:
            async with aclosing(_events(response, self._credentials.manifest)) as events:
                yield events

    async def _request(self, method: str, path: str, query: Query | None = None, body: Object | None = None) -> Object:
        again = _PASSING if method == "GET" else _NOT_DONE
        failure = ApiServerError(f"{method} {path}: no answer within {REQUEST_TIMEOUT:g} s")
        with trio.move_on_after(REQUEST_TIMEOUT):
            for delay in growing_delays(*RETRY_DELAYS):
                try:
                    async with self._stream(method, path, query, body) as response:
                        return await _object(response)
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
        timeout: httpx.Timeout | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """Yield a successful answer, whose body is still to come."""
        token = await self._credentials.token()
        request = self._client.build_request(
            method,
            path,
            params=query,
            json=body,
            headers={**({"Authorization": f"Bearer {token}"} if token else {}), **_CONTENT_TYPES.get(method, {})},
            timeout=timeout or REQUEST_TIMEOUT,
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _broken(request, error) from error
        try:
            if not response.is_success:
                if response.status_code == httpx.codes.UNAUTHORIZED:
                    self._credentials.expire()
                raise await _refusal(response, self._credentials.manifest)
            yield response
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await response.aclose()


async def _object(response: httpx.Response) -> Object:
    """Return the object in an answer."""
    async with aclosing(_chunks(response)) as chunks:
        return _parse(response.request, await _join(response, chunks))


async def _events(response: httpx.Response, manifest: str) -> AsyncGenerator[Event, None]:
    failure = None
    async with aclosing(_lines(response)) as lines:
        async for line in lines:
            content = _parse(response.request, line)
            kind, thing = content.get("type"), content.get("object")
            if not isinstance(kind, str) or not isinstance(thing, dict):
                raise _broken(response.request, ValueError("an event without type or object"))
            if kind == "ERROR":
                # It is the last event. To its end, because httpx leaves generators that are not to the collector.
                code, message = int(thing.get("code", 500)), str(thing.get("message"))
                failure = refusal(_name(response.request), code, message, manifest)
            else:
                yield Event(kind, thing)
    if failure:
        raise failure


async def _refusal(response: httpx.Response, manifest: str) -> ApiServerError:
    """Return the error for an answer that is not a success, with the message of the server's Status if it is one."""
    async with aclosing(_chunks(response)) as chunks:
        body = await _join(response, chunks)
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError):  # from a proxy, or the server's own plain text
        message = body[:200].decode("utf-8", "replace").strip() or response.reason_phrase
    retry_after = response.headers.get("Retry-After", "")
    return refusal(_name(response.request), response.status_code, message, manifest, retry_after)


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    rest = bytearray()
    async with aclosing(_chunks(response)) as chunks:
        async for chunk in chunks:
            rest += chunk
            _check_size(response, rest)
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield bytes(line)


async def _join(response: httpx.Response, chunks: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        _check_size(response, body)
    return bytes(body)


async def _chunks(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except httpx.HTTPError as error:
        raise _broken(response.request, error) from error


def _parse(request: httpx.Request, text: bytes) -> Object:
    try:
        thing = json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one
        raise _broken(request, error) from error
    if not isinstance(thing, dict):
        raise _broken(request, ValueError(f"a {type(thing).__name__} instead of an object"))
    return thing


def _check_size(response: httpx.Response, received: bytearray) -> None:
    if len(received) > MAX_BYTES:
        raise _broken(response.request, ValueError(f"more than {MAX_BYTES >> 20} MiB for one object"))


def _broken(request: httpx.Request, error: Exception) -> ApiServerError:
    """Return the error for an answer that did not come, or not to its end."""
    server = f"{request.url.scheme}://{request.url.netloc.decode()}"
    reason = _reason(error)
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        reason += "; the service account's ca.crt did not sign its certificate"
    return ApiServerError(f"{_name(request)}: no usable answer from {server}: {reason}")


def _reason(error: BaseException) -> str:
    """Return the first message in the chain of causes: of a failed handshake, only the innermost error has one."""
    cause = error.__cause__ or error.__context__
    return str(error) or (_reason(cause) if cause else type(error).__name__)


def _name(request: httpx.Request) -> str:
    return f"{request.method} {request.url.path}"
