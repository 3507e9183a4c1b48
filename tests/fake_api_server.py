"""An API server in memory: objects of any kind, resource versions, conflicts, watches, and what goes wrong.

`transport` connects a client in the same trio program, so that a virtual clock does; `serving` serves HTTPS, for whole
processes. Faults are set by attributes, at any time.
"""

from __future__ import annotations

import copy
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import httpx
import trio
import trustme

from sgpu.kubeapi import Access, ApiServer
from sgpu.kubeapi.access import Credentials

Object = dict[str, Any]

COLLECTIONS: Final = {"nodes", "resourceslices", "resourceclaims", "deviceclasses"}
TOKEN: Final = "a-token"
#: A server has said 200 by then.
_TOO_OLD: Final = b'{"type":"ERROR","object":{"code":410,"message":"too old resource version"}}\n'


class Answer(NamedTuple):
    """An answer: of an object, or of an error."""

    status: int
    content: Object | bytes
    headers: Mapping[str, str] = {}


class FakeApiServer:
    """`requests` has all requests, as `GET /api/v1/nodes/a` and `GET /api/v1/nodes?watch`."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
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
        self._version = 0
        self._events: list[tuple[int, str, str, Object]] = []  # version, collection, kind, object
        self._changed = threading.Condition()
        self._awake = trio.Event()
        self._hang_ups = 0

    # For tests

    def put(self, path: str, thing: Object) -> Object:
        """Create or change an object, as somebody else does."""
        with self._changed:
            return self._store(path, copy.deepcopy(thing), "MODIFIED" if path in self.objects else "ADDED")

    def remove(self, path: str) -> None:
        """Delete an object, as somebody else does."""
        with self._changed:
            self._remove(path)

    def hang_up(self) -> None:
        """End all watches in the middle of a line."""
        with self._changed:
            self._hang_ups += 1
            self._wake()

    def forget(self) -> None:
        """Let no watch begin at a version that anybody has."""
        self._version += 1
        self.forget_before_now()

    def forget_before_now(self) -> None:
        """Let watches begin at the latest version only."""
        self.forgotten = self._version - 1

    def below(self, collection: str) -> dict[str, Object]:
        """Return the objects of a kind by path."""
        return {path: thing for path, thing in self.objects.items() if path.rpartition("/")[0] == collection}

    # What clients ask

    def answer(self, method: str, target: str, token: str, body: bytes) -> Answer:
        """Answer all requests but watches."""
        url, query = urlsplit(target), dict(parse_qsl(urlsplit(target).query))
        with self._changed:
            request = f"{method} {url.path}{'?watch' * ('watch' in query)}"
            self.requests.append(request)
            for prefix, answers in self.instead.items():
                if request.startswith(prefix) and answers:
                    return answers.pop(0) if len(answers) > 1 else answers[0]
            if token not in self.tokens:
                return _status(401, "Unauthorized")
            thing = json.loads(body) if body else {}
            return self._do(method, url.path, query, thing)

    async def watch(self, target: str) -> AsyncIterator[bytes]:
        """Yield the lines of a watch, for a client in this trio program."""
        path, query, version = _watched(target)
        if version <= self.forgotten:
            yield _TOO_OLD
            return
        hang_ups, end = self._hang_ups, trio.current_time() + float(query["timeoutSeconds"])
        over = False
        while hang_ups == self._hang_ups and not over:
            awake = self._awake
            for number, line in list(self._since(path, query, version)):
                version = number
                yield line
            with trio.move_on_at(end) as scope:  # around the wait alone: a generator must not yield in a scope
                await awake.wait()
            over = scope.cancelled_caught
        bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self._version)}}}
        yield json.dumps(bookmark).encode() + b"\n" if over else b'{"type":'

    def blocking_watch(self, target: str) -> Iterator[bytes]:
        """Yield the lines of a watch, for a thread."""
        path, query, version = _watched(target)
        if version <= self.forgotten:
            yield _TOO_OLD
            return
        hang_ups, until = self._hang_ups, time.monotonic() + float(query["timeoutSeconds"])
        while time.monotonic() < until:
            with self._changed:
                if hang_ups != self._hang_ups:
                    raise ConnectionAbortedError("hang up")
                lines = list(self._since(path, query, version))
                if not lines:
                    self._changed.wait(0.1)
            for number, line in lines:
                version = number
                yield line

    def _do(self, method: str, path: str, query: Mapping[str, str], thing: Object) -> Answer:
        known = self.objects.get(path)
        if method == "POST":
            target = f"{path}/{thing['metadata'].get('name') or thing['metadata']['generateName'] + 'x'}"
            if target in self.objects:
                return _status(409, f"{target} already exists")
            return Answer(201, self._store(target, thing, "ADDED", dry_run="dryRun" in query))
        if path.rpartition("/")[2] in COLLECTIONS:
            items = [each for each in self.below(path).values() if _selected(each, query)]
            return Answer(200, {"metadata": {"resourceVersion": str(self._version)}, "items": items})
        if known is None:
            return _status(404, f"{path} not found")
        if method == "GET":
            return Answer(200, known)
        if method == "DELETE":
            return Answer(200, self._remove(path))
        if method == "PATCH":
            return Answer(200, self._store(path, _merged(known, thing), "MODIFIED"))
        if thing["metadata"].get("resourceVersion") != known["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified")
        return Answer(200, self._store(path, thing, "MODIFIED"))

    def _store(self, path: str, thing: Object, kind: str, dry_run: bool = False) -> Object:
        self.drop(thing)
        if dry_run:
            return thing
        self._version += 1
        before = self.objects.get(path, {"metadata": {"uid": f"uid-{self._version}"}})
        metadata = {**thing.get("metadata", {}), "name": path.rpartition("/")[2]}
        metadata.update(uid=before["metadata"]["uid"], resourceVersion=str(self._version))
        self.objects[path] = {**thing, "metadata": metadata}
        self._log(path, kind)
        return self.objects[path]

    def _remove(self, path: str) -> Object:
        self._version += 1
        thing = self.objects[path]
        self.objects[path] = {**thing, "metadata": {**thing["metadata"], "resourceVersion": str(self._version)}}
        self._log(path, "DELETED")
        return self.objects.pop(path)

    def _log(self, path: str, kind: str) -> None:
        self._events.append((self._version, path.rpartition("/")[0], kind, copy.deepcopy(self.objects[path])))
        self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        self._awake.set()
        self._awake = trio.Event()

    def _since(self, path: str, query: Mapping[str, str], version: int) -> Iterator[tuple[int, bytes]]:
        for number, collection, kind, thing in self._events:
            if number > version and collection == path and _selected(thing, query):
                yield number, json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def _status(status: int, message: str) -> Answer:
    return Answer(status, {"kind": "Status", "code": status, "message": message})


def _merged(old: Any, change: Any) -> Any:  # noqa: ANN401  # as JSON has it
    """Return the merge of RFC 7386."""
    if not isinstance(change, dict):
        return change
    before = old if isinstance(old, dict) else {}
    kept = {key: value for key, value in before.items() if key not in change}
    return {**kept, **{key: _merged(before.get(key), each) for key, each in change.items() if each is not None}}


def _watched(target: str) -> tuple[str, Mapping[str, str], int]:
    query = dict(parse_qsl(urlsplit(target).query))
    return urlsplit(target).path, query, int(query["resourceVersion"])


def _selected(thing: Object, query: Mapping[str, str]) -> bool:
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        found: Any = thing
        for key in path.split("."):
            found = found.get(key, {})
        if (found or "") != value:  # as of an object without a namespace
            return False
    return True


def _encode(content: Object | bytes) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


class _Stream(httpx.AsyncByteStream):
    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        self._lines = lines

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for line in self._lines:
            yield line


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, server: FakeApiServer) -> None:
        self._server = server

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        target = request.url.raw_path.decode()
        await trio.sleep(self._server.delay)
        token = request.headers["Authorization"].removeprefix("Bearer ")
        answer = self._server.answer(request.method, target, token, request.content)
        if answer.status == 200 and "watch" in request.url.params and isinstance(answer.content, dict):
            return httpx.Response(200, stream=_Stream(self._server.watch(target)))
        return httpx.Response(answer.status, stream=_Stream(_once(_encode(answer.content))), headers=answer.headers)


class _Known(Credentials):
    """A token without files: reading them takes a thread, which a virtual clock does not wait for."""

    async def token(self) -> str:
        return TOKEN


@asynccontextmanager
async def connected(server: FakeApiServer) -> AsyncIterator[ApiServer]:
    """Yield a client of this server, in this trio program."""
    access = Access("http://fake", Path(), Path())
    async with httpx.AsyncClient(transport=_Transport(server), base_url=access.url) as client:
        yield ApiServer(client, _Known(access))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeApiServer

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.fake.delay)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        wanted = "application/merge-patch+json" if self.command == "PATCH" else "application/json"
        if body and self.headers["Content-Type"] != wanted:
            answer = _status(415, f"{self.command} takes {wanted}")
        else:
            answer = self.fake.answer(self.command, self.path, token, body)
        if answer.status == 200 and "watch" in dict(parse_qsl(urlsplit(self.path).query)):
            self._stream(self.fake.blocking_watch(self.path))
            return
        content = _encode(answer.content)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _stream(self, lines: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serving(server: FakeApiServer, directory: Path) -> Iterator[Access]:
    """Serve HTTPS on a free port; `directory` gets what a pod has of its service account. Yields the access to it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.crt")
    (directory / "token").write_text(f"{TOKEN}\n")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": server}))
    http.socket = tls.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Access(f"https://127.0.0.1:{http.server_port}", directory / "token", directory / "ca.crt")
    finally:
        server.hang_up()
        http.shutdown()
        thread.join()
        http.server_close()
