"""A small API server in memory: objects of any kind, resource versions, conflicts, watches. Knows no GPU and no rights.

HTTP/1.1 on h11, for the demo and, with faults on top, for the tests. `observe.http` answers strangers, and so takes no
bodies and streams nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import h11
import trio

from sgpu.lib.concurrency import Broadcast

Object = dict[str, Any]

#: Last parts of paths that are lists. What is not among them is an object.
COLLECTIONS: Final = {"nodes", "resourceslices", "resourceclaims", "deviceclasses"}
#: Bytes taken off a connection at a time.
RECEIVE_BYTES: Final = 65536


class Answer(NamedTuple):
    """An answer: of an object, or of an error."""

    status: int
    content: Object | bytes
    headers: Mapping[str, str] = {}


class ApiObjects:
    """All objects, by path: `/api/v1/nodes/a`. `changed` notifies of another one."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        #: Of Kubernetes, as `/version` says it.
        self.release = "v1.36.2"
        self.changed = Broadcast()
        self.version = 0
        self._events: list[tuple[int, str, str, Object]] = []  # version, collection, kind, object

    def put(self, path: str, thing: Object) -> Object:
        """Create or change an object, as somebody else does."""
        return self._store(path, copy.deepcopy(thing), "MODIFIED" if path in self.objects else "ADDED")

    def remove(self, path: str) -> Object:
        """Delete an object, as somebody else does."""
        self.version += 1
        thing = self.objects[path]
        self.objects[path] = {**thing, "metadata": {**thing["metadata"], "resourceVersion": str(self.version)}}
        self._note(path, "DELETED")
        return self.objects.pop(path)

    def below(self, collection: str) -> dict[str, Object]:
        """Return the objects of a kind by path."""
        return {path: thing for path, thing in self.objects.items() if path.rpartition("/")[0] == collection}

    async def answer(self, method: str, target: str, body: bytes, token: str) -> Answer:
        """Answer a request, whoever sends it: all but the events of watches."""
        url = urlsplit(target)
        return self._do(method, url.path, dict(parse_qsl(url.query)), json.loads(body) if body else {})

    async def watch(self, target: str) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a watch as far as there are new ones, each time that something has changed."""
        query = dict(parse_qsl(urlsplit(target).query))
        path, version = urlsplit(target).path, int(query["resourceVersion"])
        end, over = trio.current_time() + float(query["timeoutSeconds"]), False
        while not over:
            changed = self.changed.next
            lines = [line for number, line in self._since(path, query, version)]
            version = self.version
            yield b"".join(lines)
            with trio.move_on_at(end) as scope:  # around the wait alone: a generator must not yield in a scope
                await changed.wait()
            over = scope.cancelled_caught
        bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self.version)}}}
        yield json.dumps(bookmark).encode() + b"\n"

    def _do(self, method: str, path: str, query: Mapping[str, str], thing: Object) -> Answer:
        known = self.objects.get(path)
        if path == "/version":
            return Answer(200, {"gitVersion": self.release})
        if method == "POST":
            target = f"{path}/{thing['metadata'].get('name') or thing['metadata']['generateName'] + 'x'}"
            if target in self.objects:
                return status(409, f"{target} already exists")
            return Answer(201, self._store(target, thing, "ADDED", dry_run="dryRun" in query))
        if path.rpartition("/")[2] in COLLECTIONS:
            items = [each for each in self.below(path).values() if _selected(each, query)]
            return Answer(200, {"metadata": {"resourceVersion": str(self.version)}, "items": items})
        if known is None:
            return status(404, f"{path} not found")
        if method == "GET":
            return Answer(200, known)
        if method == "DELETE":
            return Answer(200, self.remove(path))
        if method == "PATCH":
            return Answer(200, self._store(path, _merged(known, thing), "MODIFIED"))
        if thing["metadata"].get("resourceVersion") != known["metadata"]["resourceVersion"]:
            return status(409, "the object has been modified")
        return Answer(200, self._store(path, thing, "MODIFIED"))

    def _store(self, path: str, thing: Object, kind: str, *, dry_run: bool = False) -> Object:
        if dry_run:
            return thing
        self.version += 1
        before = self.objects.get(path, {"metadata": {"uid": f"uid-{self.version}"}})
        metadata = {**thing.get("metadata", {}), "name": path.rpartition("/")[2]}
        metadata.update(uid=before["metadata"]["uid"], resourceVersion=str(self.version))
        self.objects[path] = {**thing, "metadata": metadata}
        self._note(path, kind)
        return self.objects[path]

    def _note(self, path: str, kind: str) -> None:
        self._events.append((self.version, path.rpartition("/")[0], kind, copy.deepcopy(self.objects[path])))
        self.changed.notify()

    def _since(self, path: str, query: Mapping[str, str], version: int) -> Iterator[tuple[int, bytes]]:
        for number, collection, kind, thing in self._events:
            if number > version and collection == path and _selected(thing, query):
                yield number, json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def status(code: int, message: str) -> Answer:
    """Return an error as the API has it."""
    return Answer(code, {"kind": "Status", "code": code, "message": message})


def _merged(old: Any, change: Any) -> Any:  # noqa: ANN401  # as JSON has it
    """Return the merge of RFC 7386."""
    if not isinstance(change, dict):
        return change
    before = old if isinstance(old, dict) else {}
    kept = {key: value for key, value in before.items() if key not in change}
    return {**kept, **{key: _merged(before.get(key), each) for key, each in change.items() if each is not None}}


def encode(content: Object | bytes) -> bytes:
    """Return the body of an answer."""
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def is_watch(target: str, answer: Answer) -> bool:
    """Return whether the answer to a request is the events of a watch."""
    return (
        answer.status == 200 and "watch" in dict(parse_qsl(urlsplit(target).query)) and isinstance(answer.content, dict)
    )


def _selected(thing: Object, query: Mapping[str, str]) -> bool:
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        found: Any = thing
        for key in path.split("."):
            found = found.get(key, {})
        if (found or "") != value:  # as of an object without a namespace
            return False
    return True


async def serve_connection(objects: ApiObjects, stream: trio.abc.Stream) -> None:
    """Answer one request after the other, until the client hangs up."""
    http = h11.Connection(h11.SERVER)
    try:
        async with stream:
            while request := await _receive(http, stream):
                await _respond(objects, http, stream, *request)
                http.start_next_cycle()
    except (trio.BrokenResourceError, h11.ProtocolError):
        pass  # a client that hangs up is no news


async def _receive(http: h11.Connection, stream: trio.abc.Stream) -> tuple[h11.Request, bytes] | None:
    request, body = None, b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(bytes(await stream.receive_some(RECEIVE_BYTES)))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and request:
            return request, body
        else:  # closed
            return None


async def _respond(
    objects: ApiObjects, http: h11.Connection, stream: trio.abc.Stream, request: h11.Request, body: bytes
) -> None:
    async def send(*events: h11.Event) -> None:
        await stream.send_all(b"".join(http.send(event) or b"" for event in events))

    method, target, headers = request.method.decode(), request.target.decode(), dict(request.headers)
    token = headers.get(b"authorization", b"").decode().removeprefix("Bearer ")
    wanted = b"application/merge-patch+json" if method == "PATCH" else b"application/json"
    if body and headers.get(b"content-type") != wanted:
        answer = status(415, f"{method} takes {wanted.decode()}")
    else:
        answer = await objects.answer(method, target, body, token)
    if is_watch(target, answer):
        await send(h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")]))
        async with aclosing(objects.watch(target)) as chunks:
            async for chunk in chunks:
                if chunk:
                    await send(h11.Data(data=chunk))
        await send(h11.EndOfMessage())
        return
    content = encode(answer.content)
    fields = {**answer.headers, "Content-Length": str(len(content))}
    await send(
        h11.Response(status_code=answer.status, headers=list(fields.items())),
        h11.Data(data=content),
        h11.EndOfMessage(),
    )
