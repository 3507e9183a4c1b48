"""HTTP/2 (RFC 9113) without I/O, as much as gRPC on a socket of this node needs: bytes in, events out.

Any fault of the peer ends the connection (5.4.1 allows it), also one of a single stream: a program that breaks the
protocol is not one to go on with. Server push is refused, priorities are ignored. Knows nothing of gRPC.
"""

from __future__ import annotations

import enum
import struct
import time
from collections.abc import Callable, Mapping
from typing import ClassVar, Final

import attrs
import hpack

from sgpu.rpc.headers import MAX_HEADER_BYTES, NO_TABLE, Decoder, MalformedError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: Streams that a peer may have open. The kubelet needs a handful.
MAX_STREAMS: Final = 128
#: Bytes of a frame: HTTP/2's default. Larger ones would only be buffered twice.
MAX_FRAME_BYTES: Final = 16 * 1024
#: Bytes that a peer may send on a connection ahead of us. Each stream has a narrower window of its own.
_CONNECTION_WINDOW: Final = 2**30
_DEFAULT_WINDOW: Final = 65535
#: Largest window, stream id and the like; what of a word is not reserved.
_MAX: Final = 2**31 - 1
#: Streams given up while the peer was still sending, and remembered to ignore what it had under way.
_MAX_ABANDONED: Final = 128
#: Frames that carry no call forward: so many at once, and so many more a second. nghttp2 has the same for resets.
#: Floods (CVE-2019-9511 to 9518, CVE-2023-44487, CVE-2024-27316) are of thousands a second.
PATIENCE: Final = 1000
_PATIENCE_PER_SECOND: Final = 33.0
#: What a finished call is worth in such frames, and bytes that are worth one: gRPC's peers measure, and open windows.
_FRAMES_PER_CALL: Final = 8
_BYTES_PER_FRAME: Final = 4096
#: Settings in a frame. Six are defined, and each may concern all streams.
_MAX_SETTINGS: Final = 32

_HEADER: Final = struct.Struct(">BHBBL")  # length in 24 bits, type, flags, stream
_SETTING: Final = struct.Struct(">HL")
_WORD: Final = struct.Struct(">L")
_ACK = _END_STREAM = 0x1
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
#: Settings (6.5.2).
_ENABLE_PUSH, _CONCURRENT_STREAMS, _INITIAL_WINDOW, _FRAME_SIZE, _HEADER_LIST_SIZE = range(2, 7)


#: Types of frames (6), and error codes (7), in the order of their numbers.
Frame = enum.IntEnum(
    "Frame",
    "DATA HEADERS PRIORITY RST_STREAM SETTINGS PUSH_PROMISE PING GOAWAY WINDOW_UPDATE CONTINUATION",
    start=0,
)
Code = enum.IntEnum(
    "Code",
    "NO_ERROR PROTOCOL_ERROR INTERNAL_ERROR FLOW_CONTROL_ERROR SETTINGS_TIMEOUT STREAM_CLOSED FRAME_SIZE_ERROR "
    "REFUSED_STREAM CANCEL COMPRESSION_ERROR CONNECT_ERROR ENHANCE_YOUR_CALM INADEQUATE_SECURITY HTTP_1_1_REQUIRED",
    start=0,
)


class Http2Error(Exception):
    """The peer broke the protocol: send what there is to send, and close the connection."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code


@attrs.frozen
class Headers:
    """The first block of a request or of its answer, or the trailers."""

    stream_id: int
    fields: Mapping[str, str]
    end: bool


@attrs.frozen
class Data:
    stream_id: int
    data: bytes
    end: bool


@attrs.frozen
class Reset:
    """The peer gave up a stream, or has to be taken to."""

    stream_id: int
    code: int


@attrs.frozen
class WindowOpened:
    """There may be room to send more: on that stream, or where it is 0, on any."""

    stream_id: int


Event = Headers | Data | Reset | WindowOpened


@attrs.define(eq=False)
class _Stream:
    """A stream that is open in one direction at least."""

    send_window: int  # negative once the peer has narrowed it
    receive_window: int
    sending: bool = True
    receiving: bool = True
    begun: bool = False  # whether the peer's headers have come
    expected: int | None = None  # bytes of data still to come, if the peer said how many


class Connection:
    """One end of a connection. Whoever sends takes what is to be sent from `output`."""

    def __init__(self, *, client: bool, window: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.output = bytearray(PREFACE if client else b"")
        self._client = client
        self._window = window
        self._clock = clock
        self._decoder = Decoder()
        self._no_table = NO_TABLE
        self._preface = b"" if client else PREFACE  # what is still to come of it
        self._unread = b""
        self._only: Frame | None = Frame.SETTINGS  # the frame that has to come next
        self._block, self._block_of = bytearray(), (0, 0)  # headers that are coming in, their stream and its flags
        self._streams: dict[int, _Stream] = {}
        self._abandoned: dict[int, None] = {}
        self._highest = 0  # stream id that the client used
        self._send_window = self._initial_window = _DEFAULT_WINDOW
        self._unacknowledged = 0
        self._frame_bytes = MAX_FRAME_BYTES
        self._max_streams = MAX_STREAMS
        self._patience, self._looked = float(PATIENCE), clock()
        settings = {_CONCURRENT_STREAMS: MAX_STREAMS, _INITIAL_WINDOW: window, _HEADER_LIST_SIZE: MAX_HEADER_BYTES}
        settings |= {_ENABLE_PUSH: 0} if client else {}
        self._send(Frame.SETTINGS, 0, 0, b"".join(_SETTING.pack(*each) for each in settings.items()))
        self._send(Frame.WINDOW_UPDATE, 0, 0, _WORD.pack(_CONNECTION_WINDOW))

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes off the wire. Raises Http2Error, with a GOAWAY in `output` that says the same."""
        events: list[Event] = []
        try:
            self._receive(data, events)
        except Http2Error as error:
            last = 0 if self._client else self._highest
            self._send(Frame.GOAWAY, 0, 0, _WORD.pack(last) + _WORD.pack(error.code) + str(error).encode()[:200])
            raise
        return events

    def open_stream(self) -> int:
        """Return a new stream for a client's request. Raises Http2Error when the server admits none."""
        if len(self._streams) >= self._max_streams:
            raise Http2Error(Code.PROTOCOL_ERROR, f"the server admits {self._max_streams} calls at a time")
        self._highest += 1 + self._highest % 2
        self._streams[self._highest] = _Stream(self._initial_window, self._window)
        return self._highest

    def send_headers(self, stream_id: int, block: bytes, *, end: bool) -> None:
        """Send a block of headers, unless the stream has ended. It has to fit into a frame, as all of ours do."""
        if (stream := self._streams.get(stream_id)) is None:
            return  # the peer has reset it, maybe with what came right behind the request
        self._send(Frame.HEADERS, _END_HEADERS | end, stream_id, self._no_table + block)
        self._no_table = b""
        if end:
            self._end(stream_id, stream, sent=True)

    def room(self, stream_id: int) -> int:
        """Return how many bytes of data the peer takes on a stream now; none where it is negative."""
        return min(self._send_window, self._streams[stream_id].send_window)

    def send_data(self, stream_id: int, data: memoryview, *, end: bool = False) -> None:
        """Send data for which there is room."""
        for start in range(0, len(data) or 1, self._frame_bytes):
            part = data[start : start + self._frame_bytes]
            self._send(Frame.DATA, end and start + len(part) == len(data), stream_id, part)
            self._patience = min(self._patience + len(part) // _BYTES_PER_FRAME, PATIENCE)
        stream = self._streams[stream_id]
        stream.send_window -= len(data)
        self._send_window -= len(data)
        if end:
            self._end(stream_id, stream, sent=True)

    def reset(self, stream_id: int, code: Code) -> None:
        """Give up a stream, unless it has ended."""
        if (stream := self._streams.pop(stream_id, None)) is not None:
            self._send(Frame.RST_STREAM, 0, stream_id, _WORD.pack(code))
            if stream.receiving:
                self._abandoned[stream_id] = None
                if len(self._abandoned) > _MAX_ABANDONED:
                    del self._abandoned[next(iter(self._abandoned))]

    def _send(self, kind: Frame, flags: int, stream_id: int, payload: bytes | memoryview) -> None:
        size = len(payload)
        self.output += _HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id)
        self.output += payload

    def _end(self, stream_id: int, stream: _Stream, *, sent: bool) -> None:
        """End one direction of a stream."""
        if sent:
            stream.sending = False
        elif stream.expected:
            raise Http2Error(Code.PROTOCOL_ERROR, f"{stream.expected} bytes less than the content-length")
        else:
            stream.receiving = False
        if not (stream.sending or stream.receiving):
            del self._streams[stream_id]
            self._patience = min(self._patience + _FRAMES_PER_CALL, PATIENCE)

    def _receive(self, data: bytes, events: list[Event]) -> None:
        if self._preface:
            begin, data = data[: len(self._preface)], data[len(self._preface) :]
            if not self._preface.startswith(begin):
                raise Http2Error(Code.PROTOCOL_ERROR, f"no HTTP/2, it begins with {begin!r}")
            self._preface = self._preface[len(begin) :]
        data = self._unread + data if self._unread else data
        start, have = 0, len(data)
        while have - start >= _HEADER.size:
            high, low, kind, flags, stream_id = _HEADER.unpack_from(data, start)
            if (size := high << 16 | low) > MAX_FRAME_BYTES:
                raise Http2Error(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes, where {MAX_FRAME_BYTES} are taken")
            body = start + _HEADER.size
            if body + size > have:
                break
            start = body + size
            if self._only is not None and kind != self._only:
                raise Http2Error(Code.PROTOCOL_ERROR, f"a frame of type {kind} in place of {self._only.name}")
            if (handler := self._HANDLERS.get(kind)) is None:
                self._bear()
            else:
                handler(self, flags, stream_id & _MAX, data[body:start], events)
        self._unread = data[start:]

    def _bear(self) -> None:
        """Count a frame that carries no call forward."""
        self._patience -= 1
        if self._patience < 0:
            now = self._clock()
            self._patience = min((now - self._looked) * _PATIENCE_PER_SECOND, PATIENCE) - 1
            self._looked = now
            if self._patience < 0:
                raise Http2Error(Code.ENHANCE_YOUR_CALM, "too many frames that carry no call forward")

    def _is_idle(self, stream_id: int) -> bool:
        return stream_id > self._highest or stream_id % 2 == 0

    def _straggles(self, kind: Frame, stream_id: int, *, end: bool) -> None:
        """Ignore a frame of a stream that was given up here. Raises Http2Error for any other stream."""
        if stream_id not in self._abandoned:
            code = Code.PROTOCOL_ERROR if self._is_idle(stream_id) else Code.STREAM_CLOSED
            raise Http2Error(code, f"{kind.name} on stream {stream_id}, which is not open")
        if end:
            del self._abandoned[stream_id]

    def _on_data(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        size, end = len(payload), bool(flags & _END_STREAM)
        if flags & _PADDED:
            payload = _unpadded(payload)
        self._unacknowledged += size
        if self._unacknowledged >= _CONNECTION_WINDOW // 2:
            self._send(Frame.WINDOW_UPDATE, 0, 0, _WORD.pack(self._unacknowledged))
            self._unacknowledged = 0
        if not (payload or end):
            self._bear()
        stream = self._streams.get(stream_id)
        if stream is None or not stream.receiving:
            self._straggles(Frame.DATA, stream_id, end=end)
            return
        stream.receive_window -= size
        if stream.expected is not None:
            stream.expected -= len(payload)
        if stream.receive_window < 0:
            raise Http2Error(Code.FLOW_CONTROL_ERROR, f"{-stream.receive_window} bytes more than there is room for")
        if not stream.begun or (stream.expected or 0) < 0:
            raise Http2Error(Code.PROTOCOL_ERROR, "data before the headers, or more than the content-length")
        events.append(Data(stream_id, payload, end))
        if end:
            self._end(stream_id, stream, sent=False)
        elif stream.receive_window <= self._window // 2:
            self._send(Frame.WINDOW_UPDATE, 0, stream_id, _WORD.pack(self._window - stream.receive_window))
            stream.receive_window = self._window

    def _on_headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if flags & _PADDED:
            payload = _unpadded(payload)
        if flags & _PRIORITY:
            self._on_priority(0, stream_id, payload[:5], events)
            payload = payload[5:]
        if flags & _END_HEADERS:
            self._on_block(flags, stream_id, payload, events)
        else:
            _check(Frame.HEADERS, True, of_stream=stream_id)
            self._only, self._block_of = Frame.CONTINUATION, (flags, stream_id)
            self._block += payload

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._bear()
        if self._only is None or stream_id != self._block_of[1]:
            raise Http2Error(Code.PROTOCOL_ERROR, f"CONTINUATION on stream {stream_id} of no headers")
        self._block += payload
        if len(self._block) > MAX_HEADER_BYTES:
            raise Http2Error(Code.ENHANCE_YOUR_CALM, f"headers of more than {MAX_HEADER_BYTES} bytes")
        if flags & _END_HEADERS:
            self._only, block = None, bytes(self._block)
            self._block.clear()
            self._on_block(*self._block_of, block, events)

    def _on_block(self, flags: int, stream_id: int, block: bytes, events: list[Event]) -> None:
        end = bool(flags & _END_STREAM)
        try:
            fields = self._decoder.decode(block)
        except MalformedError as error:
            raise Http2Error(Code.PROTOCOL_ERROR, f"{error}") from error
        except hpack.OversizedHeaderListError as error:
            raise Http2Error(Code.ENHANCE_YOUR_CALM, f"headers of more than {MAX_HEADER_BYTES} bytes") from error
        except Exception as error:  # hpack 3 lets through more than its own
            raise Http2Error(Code.COMPRESSION_ERROR, f"{type(error).__name__}: {error}") from error
        stream = self._streams.get(stream_id)
        if stream is None and stream_id > self._highest and stream_id % 2 and not self._client:
            if len(self._streams) >= MAX_STREAMS:
                raise Http2Error(Code.ENHANCE_YOUR_CALM, f"more than {MAX_STREAMS} calls at a time")
            self._highest = stream_id
            stream = self._streams[stream_id] = _Stream(self._initial_window, self._window)
        if stream is None or not stream.receiving:
            self._straggles(Frame.HEADERS, stream_id, end=end)
            return
        begins = ":status" in fields if self._client else ":method" in fields
        ends = end and not (":status" in fields or ":method" in fields)
        interim = fields.get(":status", "").startswith("1")  # the real one follows
        if not (ends if stream.begun else begins) or (interim and end):
            raise Http2Error(Code.PROTOCOL_ERROR, "headers out of place")
        if interim:
            self._bear()
            return
        stream.begun = True
        if (length := fields.get("content-length")) is not None:
            if not (length.isascii() and length.isdecimal() and len(length) < 20):
                raise Http2Error(Code.PROTOCOL_ERROR, f"content-length: {length!r}")
            stream.expected = int(length)
        events.append(Headers(stream_id, fields, end))
        if end:
            self._end(stream_id, stream, sent=False)

    def _on_priority(self, _: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        _check(Frame.PRIORITY, len(payload) == 5, of_stream=stream_id)
        if _WORD.unpack_from(payload)[0] & _MAX == stream_id:
            raise Http2Error(Code.PROTOCOL_ERROR, "a stream that depends on itself")
        self._bear()

    def _on_reset(self, _: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        _check(Frame.RST_STREAM, len(payload) == 4, of_stream=stream_id)
        self._bear()
        self._abandoned.pop(stream_id, None)
        if self._streams.pop(stream_id, None) is not None:
            events.append(Reset(stream_id, *_WORD.unpack(payload)))
        elif self._is_idle(stream_id):
            self._straggles(Frame.RST_STREAM, stream_id, end=True)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        _check(Frame.SETTINGS, len(payload) % _SETTING.size == 0 and not (payload and flags & _ACK), other=stream_id)
        self._bear()
        self._only = None
        if len(payload) > _MAX_SETTINGS * _SETTING.size:
            raise Http2Error(Code.ENHANCE_YOUR_CALM, f"more than {_MAX_SETTINGS} settings in a frame")
        if not flags & _ACK:
            for setting, value in _SETTING.iter_unpack(payload):
                self._set(setting, value)
            self._send(Frame.SETTINGS, _ACK, 0, b"")
            events.append(WindowOpened(0))

    def _set(self, setting: int, value: int) -> None:
        if setting == _INITIAL_WINDOW:
            difference, self._initial_window = value - self._initial_window, _widened(0, value)
            for stream in self._streams.values():
                stream.send_window = _widened(stream.send_window, difference)
        elif setting == _CONCURRENT_STREAMS:
            self._max_streams = value
        elif setting == _FRAME_SIZE and MAX_FRAME_BYTES <= value < 2**24:
            self._frame_bytes = value
        elif setting == _FRAME_SIZE or (setting == _ENABLE_PUSH and value > 1):
            raise Http2Error(Code.PROTOCOL_ERROR, f"setting {setting} of {value}")

    def _on_push(self, _: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        raise Http2Error(Code.PROTOCOL_ERROR, "PUSH_PROMISE, which is switched off")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        _check(Frame.PING, len(payload) == 8, other=stream_id)
        self._bear()
        if not flags & _ACK:
            self._send(Frame.PING, _ACK, 0, payload)

    def _on_goaway(self, _: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        # "No more calls from here": those that are under way go on, and the peer hangs up after the last.
        _check(Frame.GOAWAY, len(payload) >= 8, other=stream_id)
        self._bear()

    def _on_window_update(self, _: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        _check(Frame.WINDOW_UPDATE, len(payload) == 4)
        self._bear()
        difference = _WORD.unpack(payload)[0] & _MAX
        if not difference:
            raise Http2Error(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        if not stream_id:
            self._send_window = _widened(self._send_window, difference)
        elif (stream := self._streams.get(stream_id)) is not None:
            stream.send_window += difference
            if stream.send_window > _MAX:  # the one fault that has to end no more than its stream
                self.reset(stream_id, Code.FLOW_CONTROL_ERROR)
                events.append(Reset(stream_id, Code.FLOW_CONTROL_ERROR))
                return
        elif self._is_idle(stream_id):
            self._straggles(Frame.WINDOW_UPDATE, stream_id, end=False)
        else:
            return  # who reads the end of a long answer gives leave to send more, when the stream has ended already
        events.append(WindowOpened(stream_id))

    _HANDLERS: ClassVar[Mapping[int, Callable[[Connection, int, int, bytes, list[Event]], None]]] = {
        Frame.DATA: _on_data,
        Frame.HEADERS: _on_headers,
        Frame.PRIORITY: _on_priority,
        Frame.RST_STREAM: _on_reset,
        Frame.SETTINGS: _on_settings,
        Frame.PUSH_PROMISE: _on_push,
        Frame.PING: _on_ping,
        Frame.GOAWAY: _on_goaway,
        Frame.WINDOW_UPDATE: _on_window_update,
        Frame.CONTINUATION: _on_continuation,
    }


def _check(kind: Frame, size_fits: bool, of_stream: int = 1, other: int = 0) -> None:
    """Raise Http2Error for a frame of a wrong size, or of the connection in place of a stream, or the other way."""
    if not size_fits:
        raise Http2Error(Code.FRAME_SIZE_ERROR, f"{kind.name} of a wrong size")
    if not of_stream or other:
        raise Http2Error(Code.PROTOCOL_ERROR, f"{kind.name} on stream {other}")


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise Http2Error(Code.PROTOCOL_ERROR, "more padding than there is")
    return payload[1 : len(payload) - payload[0]]


def _widened(window: int, difference: int) -> int:
    if window + difference > _MAX:
        raise Http2Error(Code.FLOW_CONTROL_ERROR, f"a window of {window + difference} bytes")
    return window + difference
