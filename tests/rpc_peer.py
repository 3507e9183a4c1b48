"""Helpers of the tests of sgpu.rpc: methods to call, and HTTP/2 made by hand, valid or not."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import trio
from google.protobuf.wrappers_pb2 import BytesValue
from purerpc import StatusCode

from sgpu import rpc
from sgpu.lib.concurrency import Broadcast, wait_until
from sgpu.rpc import Route, RpcError

SERVICE: Final = "test.Service"
ECHO: Final = f"/{SERVICE}/Echo"
BIG: Final = f"/{SERVICE}/Big"
COUNT: Final = f"/{SERVICE}/Count"
FLOOD: Final = f"/{SERVICE}/Flood"
WAIT: Final = f"/{SERVICE}/Wait"
WATCH: Final = f"/{SERVICE}/Watch"
REFUSE: Final = f"/{SERVICE}/Refuse"
BUG: Final = f"/{SERVICE}/Bug"
LATE_BUG: Final = f"/{SERVICE}/LateBug"

#: A message that a header can't carry as it is.
REFUSAL: Final = "no such share: ‘GPU-ü::7’ 100 % 🂡\n"
#: Seconds that a test's own wait may take; only a failing test gets there.
TIMEOUT: Final = 30.0


class Methods:
    """A service to be called, with a count of the calls that are waiting and of the messages that were taken.

    Some of its unary methods are coroutines, and some answer at once.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.taken = 0
        self._changed = Broadcast()

    def routes(self) -> Mapping[str, Route]:
        unary = {ECHO: self.echo, BIG: self.big, WAIT: self.wait, REFUSE: self.refuse, BUG: self.bug}
        streaming = {COUNT: self.count, FLOOD: self.flood, WATCH: self.watch, LATE_BUG: self.late_bug}
        return {path: Route(handler, BytesValue, streams=False) for path, handler in unary.items()} | {
            path: Route(handler, BytesValue, streams=True) for path, handler in streaming.items()
        }

    async def wait_waiting(self, count: int) -> None:
        """Until so many calls wait."""
        with trio.fail_after(TIMEOUT):
            await wait_until(lambda: self.waiting == count, self._changed)

    async def echo(self, message: BytesValue) -> BytesValue:
        return message

    def big(self, message: BytesValue) -> BytesValue:
        """As many bytes as the request says."""
        return BytesValue(value=bytes(int(message.value)))

    async def count(self, message: BytesValue) -> AsyncGenerator[BytesValue, None]:
        """As many messages as the request says."""
        for number in range(int(message.value)):
            yield text(str(number))

    async def flood(self, _: BytesValue) -> AsyncGenerator[BytesValue, None]:
        """Messages without an end and without a pause."""
        with self._noted():
            while True:
                yield BytesValue(value=bytes(50_000))
                self.taken += 1

    async def wait(self, message: BytesValue) -> BytesValue:
        with self._noted():
            await trio.sleep_forever()
        return message

    async def watch(self, _: BytesValue) -> AsyncGenerator[BytesValue, None]:
        with self._noted():
            yield text("first")
            await trio.sleep_forever()

    def refuse(self, _: BytesValue) -> BytesValue:
        raise RpcError(StatusCode.NOT_FOUND, REFUSAL)

    def bug(self, _: BytesValue) -> BytesValue:
        raise ZeroDivisionError("a bug in the handler")

    async def late_bug(self, _: BytesValue) -> AsyncGenerator[BytesValue, None]:
        yield text("first")
        raise ZeroDivisionError("a bug in the handler")

    @contextmanager
    def _noted(self) -> Iterator[None]:
        self._note(+1)
        try:
            yield
        finally:
            self._note(-1)

    def _note(self, difference: int) -> None:
        self.waiting += difference
        self._changed.notify()


def text(value: str) -> BytesValue:
    return BytesValue(value=value.encode())


@asynccontextmanager
async def serving(table: Mapping[str, Route], path: Path) -> AsyncIterator[None]:
    """A server on the socket at `path`, as the daemon runs it."""
    with rpc.listen(path) as listener:
        async with trio.open_nursery() as nursery:
            handler = partial(rpc.serve_connection, table)
            nursery.start_soon(partial(trio.serve_listeners, handler, [listener]))
            yield
            nursery.cancel_scope.cancel()


class Reader:
    """Takes apart what the server sends, as far as frames go."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._received = bytearray()

    async def wait_end(self, stream_id: int) -> None:
        """Until the server has ended that stream."""
        await self._until(lambda kind, flags, stream: kind in (0x0, 0x1) and flags & 0x1 and stream == stream_id)

    async def wait_pong(self) -> None:
        await self._until(lambda kind, flags, _: kind == 0x6 and flags & 0x1)

    async def _until(self, wanted: Callable[[int, int, int], bool | int]) -> None:
        received = self._received
        while True:
            while len(received) < 9 or len(received) < 9 + int.from_bytes(received[:3], "big"):
                got = await self._stream.receive_some()
                assert got, "the server hung up"
                received += got
            _, length, kind, flags, stream_id = struct.unpack_from(">BHBBI", received)
            del received[: 9 + length]
            if wanted(kind, flags, stream_id):
                return


# HTTP/2 (RFC 9113, section 6) and HPACK (RFC 7541, section 6.2.2), with nobody's idea of what may be sent.

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS: Final = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", ECHO),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def http2_frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def data(stream_id: int, payload: bytes, *, end: bool = True) -> bytes:
    return http2_frame(0x0, 0x1 if end else 0, stream_id, payload)


def headers(stream_id: int, *, end: bool = False, **changed: str | bytes | None) -> bytes:
    """A request's header: `path="/…"` changes one field, `te=None` leaves it out."""
    fields: dict[str, str | bytes | None] = dict(HEADERS)
    for name, value in changed.items():
        name = name.replace("_", "-")
        fields[f":{name}" if f":{name}" in fields else name] = value
    return header_block(stream_id, {name: value for name, value in fields.items() if value is not None}, end=end)


def header_block(stream_id: int, fields: Mapping[str, str | bytes], *, end: bool = False) -> bytes:
    block = b"".join(b"\0" + _hpack_string(name) + _hpack_string(value) for name, value in fields.items())
    return http2_frame(0x1, 0x5 if end else 0x4, stream_id, block)


def _hpack_string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    rest = len(raw) - 127
    length = bytearray([127])
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + raw


def reset(stream_id: int) -> bytes:
    return http2_frame(0x3, 0, stream_id, struct.pack(">I", 0x8))  # CANCEL


def settings(**values: int) -> bytes:
    numbers = {"max_concurrent_streams": 0x3, "initial_window_size": 0x4, "max_frame_size": 0x5}
    return http2_frame(0x4, 0, 0, b"".join(struct.pack(">HI", numbers[name], n) for name, n in values.items()))


def ping() -> bytes:
    return http2_frame(0x6, 0, 0, bytes(8))


def goaway() -> bytes:
    return http2_frame(0x7, 0, 0, struct.pack(">II", 0, 0))


def window_update(stream_id: int, increment: int) -> bytes:
    return http2_frame(0x8, 0, stream_id, struct.pack(">I", increment))


def message(payload: bytes = b"", *, compressed: bool = False, length: int | None = None) -> bytes:
    """A message as gRPC writes it, or with a length that is a lie."""
    return struct.pack(">?I", compressed, len(payload) if length is None else length) + payload


def request(stream_id: int, path: str, payload: bytes = b"") -> bytes:
    """A whole call that is as it should be."""
    return headers(stream_id, path=path) + data(stream_id, message(payload))


HELLO: Final = PREFACE + settings()
