"""The protocol of one gRPC connection, without I/O: HTTP/2's events → those of purerpc's connection, and back."""

from __future__ import annotations

import struct
from typing import Any, Final
from urllib.parse import quote, unquote

import attrs
from purerpc import Status, StatusCode
from purerpc.grpclib.events import (
    Event,
    MessageReceived,
    RequestEnded,
    RequestReceived,
    ResponseEnded,
    WindowUpdated,
)

from sgpu.lib.logs import cut
from sgpu.rpc.headers import encode
from sgpu.rpc.http2 import Code, Connection, Data, Headers, Http2Error, Reset

#: Largest message accepted unless said otherwise, in bytes: the default of grpc-go, and so of the kubelet.
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
#: Bytes taken off a socket at a time.
RECEIVE_BYTES: Final = 64 * 1024
#: What precedes each message: whether it is compressed, and its length in bytes.
_MESSAGE_HEADER: Final = struct.Struct(">?I")
#: Most characters of a status message. They travel percent-encoded in a header, where clients take some 8 KiB.
MAX_STATUS_MESSAGE: Final = 1000
#: Most characters of a peer's header that are repeated in a log or an answer.
_QUOTED: Final = 100
_CONTENT_TYPE: Final = "application/grpc"
_BEGIN: Final = encode((":status", "200"), ("content-type", "application/grpc+proto"))
_OK: Final = encode(("grpc-status", "0"))
#: What gRPC answers to a request that is none of its own.
_UNSUPPORTED: Final = encode((":status", "415"))


class RpcError(Exception):
    """A call's outcome other than OK: raise it in a handler to answer it, catch it from a call."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


class BrokenPeerError(Exception):
    """The peer sent what no HTTP/2 or gRPC peer may send. Only closing the connection helps."""


@attrs.frozen
class StreamReset(Event):  # type: ignore[misc]  # purerpc is not typed
    """The peer gave up the call (RST_STREAM)."""

    stream_id: int
    reason: str


@attrs.frozen
class MessageRefused(Event):  # type: ignore[misc]  # purerpc is not typed
    """The peer sent a message that is not taken, and nothing behind it on that stream can be read."""

    stream_id: int
    error: RpcError


class Protocol:
    """The state of one connection: feed it bytes, get events; tell it what to send, take the bytes."""

    def __init__(self, *, client_side: bool, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._client_side = client_side
        self._max_message_bytes = max_message_bytes
        # Two messages: what fits one is no reason to wait, and what is in its way is a message of the same size.
        self._http2 = Connection(client=client_side, window=2 * max_message_bytes)
        self._incomplete: dict[int, bytearray] = {}
        self.output = self._http2.output
        self.room = self._http2.room
        self.send_data = self._http2.send_data

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes off the wire. Raises BrokenPeerError, after which the connection must be closed."""
        events: list[Event] = []
        headers_received = self._response_headers if self._client_side else self._request_headers
        try:
            for event in self._http2.receive(data):
                if isinstance(event, Data):
                    self._data_received(event, events)
                elif isinstance(event, Headers):
                    headers_received(event, events)
                elif isinstance(event, Reset):
                    self._incomplete.pop(event.stream_id, None)
                    name = Code(event.code).name if event.code in list(Code) else str(event.code)
                    events.append(StreamReset(event.stream_id, name))
                else:
                    events.append(WindowUpdated(event.stream_id, None))
        except Http2Error as error:
            raise BrokenPeerError(cut(str(error), MAX_STATUS_MESSAGE)) from error
        return events

    def take_output(self) -> bytes:
        """Return the bytes to send, which are out of `output` then."""
        output = bytes(self.output)
        self.output.clear()
        return output

    def start_request(self, path: str) -> int:
        """Begin a call of `/package.Service/Method`. Returns its stream. Raises BrokenPeerError where none is taken."""
        try:
            stream_id = self._http2.open_stream()
        except Http2Error as error:
            raise BrokenPeerError(str(error)) from error
        # The authority is what the kubelet's own dialler says; a socket has no host to name.
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost", "te": "trailers"}
        block = encode(*fields.items(), ("content-type", "application/grpc+proto"))
        self._http2.send_headers(stream_id, block, end=False)
        return stream_id

    def start_response(self, stream_id: int) -> None:
        self._http2.send_headers(stream_id, _BEGIN, end=False)

    def end_response(self, stream_id: int, code: StatusCode, message: str, *, started: bool) -> None:
        """End a call with a status. What of the message no header can carry is left out."""
        block = _OK if code is StatusCode.OK else encode(("grpc-status", str(code.value)))
        if message:
            raw = message[:MAX_STATUS_MESSAGE].encode("utf-8", "replace")  # a stray byte of a file name has no UTF-8
            block += encode(("grpc-message", quote(raw, safe="")))
        self._http2.send_headers(stream_id, block if started else _BEGIN + block, end=True)

    def give_up(self, stream_id: int) -> None:
        """Want no more of a stream. One that has ended needs none of this."""
        self._incomplete.pop(stream_id, None)
        self._http2.reset(stream_id, Code.NO_ERROR)

    def _request_headers(self, event: Headers, events: list[Event]) -> None:
        stream_id, fields = event.stream_id, event.fields
        if ":method" in fields:  # else trailers, of which gRPC has none here
            content_type = fields.get("content-type", "")
            if fields[":method"] != "POST" or not content_type.startswith(_CONTENT_TYPE):
                self._http2.send_headers(stream_id, _UNSUPPORTED, end=True)
                self.give_up(stream_id)
                return
            service, _, name = fields[":path"].removeprefix("/").rpartition("/")
            events.append(RequestReceived(stream_id, fields[":scheme"], service, name, content_type))
        if event.end:
            self._ended(stream_id, events)

    def _response_headers(self, event: Headers, events: list[Event]) -> None:
        fields = event.fields
        if (code := fields.get(":status", "200")) != "200":
            raise BrokenPeerError(f"no gRPC answer: http status {quoted(code)}")
        if ":status" in fields and not fields.get("content-type", "").startswith(_CONTENT_TYPE):
            raise BrokenPeerError(f"no gRPC answer: content-type {quoted(str(fields.get('content-type')))}")
        if event.end:
            self._incomplete.pop(event.stream_id, None)
            said = fields.get("grpc-status", "")
            if not (said.isascii() and said.isdecimal() and len(said) < 10):
                raise BrokenPeerError(f"the end of an answer with grpc-status {quoted(said)}")
            status = Status(int(said), unquote(fields.get("grpc-message", "")))
            events.append(ResponseEnded(event.stream_id, status))

    def _data_received(self, event: Data, events: list[Event]) -> None:
        stream_id = event.stream_id
        begun = self._incomplete.get(stream_id)
        if begun is not None:
            begun += event.data
        data = event.data if begun is None else begun
        start, size = 0, len(data)
        while size - start >= _MESSAGE_HEADER.size:
            compressed, length = _MESSAGE_HEADER.unpack_from(data, start)
            if compressed:
                error = RpcError(StatusCode.UNIMPLEMENTED, "compressed messages are not taken")
                events.append(MessageRefused(stream_id, error))
                break
            if length > self._max_message_bytes:
                message = f"a message of {length} bytes, where {self._max_message_bytes} are taken"
                error = RpcError(StatusCode.RESOURCE_EXHAUSTED, message)
                events.append(MessageRefused(stream_id, error))
                break
            begin = start + _MESSAGE_HEADER.size
            if begin + length > size:
                break
            start = begin + length
            events.append(MessageReceived(stream_id, bytes(memoryview(data)[begin:start]), 0))
        if event.end:
            self._ended(stream_id, events)
        elif begun is not None:
            del begun[:start]
        elif start < size:
            self._incomplete[stream_id] = bytearray(data[start:])

    def _ended(self, stream_id: int, events: list[Event]) -> None:
        self._incomplete.pop(stream_id, None)
        if not self._client_side:
            events.append(RequestEnded(stream_id))


def frame(message: Any) -> memoryview:  # noqa: ANN401  # any protobuf message; protobuf has no typed base here
    """Return a protobuf message, or the bytes of one, as gRPC writes it: not compressed, length first."""
    payload = message if isinstance(message, bytes) else message.SerializeToString()
    return memoryview(_MESSAGE_HEADER.pack(False, len(payload)) + payload)


def quoted(text: str) -> str:
    """Return what a peer wrote, safe to repeat: on one line, and not long."""
    return repr(cut(text, _QUOTED))
