"""The protocol of one gRPC connection, without I/O: purerpc's, with what it hides made visible."""

from __future__ import annotations

import struct
from collections import defaultdict
from contextlib import suppress
from typing import Any, Final

import attrs
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from purerpc import Status, StatusCode
from purerpc.grpclib.config import GRPCConfiguration
from purerpc.grpclib.connection import GRPCConnection
from purerpc.grpclib.events import Event, MessageReceived

from sgpu.lib.logs import cut
from sgpu.rpc.headers import Decoder, Encoder

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


class _Http2(h2.connection.H2Connection):  # type: ignore[misc]  # h2 < 4 is not typed
    """h2, with two things that a sound peer does no longer taken for the end of the connection.

    h2 4 does the second by itself, but purerpc needs h2 3. And with a memory for headers.
    """

    #: Ended streams remembered, to tell their stragglers from nonsense.
    MAX_CLOSED_STREAMS = 1024

    def __init__(self, config: h2.config.H2Configuration) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.decoder.max_header_list_size = self.DEFAULT_MAX_HEADER_LIST_SIZE

    def _receive_goaway_frame(self, _: object) -> tuple[list[Any], list[Any]]:
        # "No more calls from here": those that are under way go on, and the peer hangs up after the last.
        return [], []

    def _receive_window_update_frame(self, frame: object) -> tuple[list[Any], list[Any]]:
        try:
            frames, events = super()._receive_window_update_frame(frame)
        except h2.exceptions.StreamClosedError:
            # Whoever reads the end of a long answer gives its stream leave to send more, when it has ended already.
            return [], []
        return frames, events


class Protocol(GRPCConnection):  # type: ignore[misc]  # purerpc is not typed
    """The state of one connection: feed it bytes, get events; tell it what to send, take the bytes."""

    #: The kubelet needs a handful; a connection that opens more is closed.
    MAX_CONCURRENT_STREAMS = 128
    #: Bytes; HTTP/2's own default. Larger frames would only be buffered twice.
    MAX_INBOUND_FRAME_SIZE = 16 * 1024

    def __init__(self, *, client_side: bool, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        super().__init__(GRPCConfiguration(client_side=client_side, max_message_length=max_message_bytes))
        self._max_message_bytes = max_message_bytes
        config = self.h2_connection.config
        # What we send is ours, and well-formed; of what we get, purerpc checks what matters and the rest means nothing
        # here. To have h2 check it all takes a tenth of an Allocate.
        config.validate_outbound_headers = config.normalize_outbound_headers = False
        config.validate_inbound_headers = False
        self.h2_connection: h2.connection.H2Connection = _Http2(config)
        self._set_h2_connection_local_settings()
        self._incomplete: defaultdict[int, bytearray] = defaultdict(bytearray)
        self.initiate_connection()

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes off the wire. Raises BrokenPeerError, after which the connection must be closed."""
        try:
            events: list[Event] = self.receive_data(data)
        except BrokenPeerError:
            raise
        except Exception as error:
            # Whatever the layers below trip over (h2, hpack, a header that is missing or not UTF-8), the peer wrote.
            raise BrokenPeerError(cut(f"{type(error).__name__}: {error}", MAX_STATUS_MESSAGE)) from error
        started = self.h2_connection.incoming_buffer.data  # the beginning of a frame; h2 looks at whole ones only
        if len(started) >= 3 and (length := int.from_bytes(started[:3], "big")) > self.MAX_INBOUND_FRAME_SIZE:
            raise BrokenPeerError(f"a frame of {length} bytes, where {self.MAX_INBOUND_FRAME_SIZE} are taken")
        return events

    def give_up(self, stream_id: int) -> None:
        """Want no more of a stream. One that has ended needs none of this, nor does one of a broken connection."""
        self._forget(stream_id)
        with suppress(h2.exceptions.ProtocolError):
            self.reset_stream(stream_id, h2.errors.ErrorCodes.NO_ERROR)

    def _request_received(self, event: h2.events.RequestReceived) -> list[Event]:
        # purerpc refuses a request without a body by failing the connection. Here it becomes a call with no
        # message, which is answered like any other bad call.
        event.stream_ended = None
        try:
            events: list[Event] = super()._request_received(event)
        except Exception as error:
            headers = dict(event.headers)
            what = quoted(f"{headers.get(':method')} {headers.get(':path')}")
            raise BrokenPeerError(f"{what} is no gRPC request; {type(error).__name__}: {error}") from error
        return events

    def _data_received(self, event: h2.events.DataReceived) -> list[Event]:
        # Not purerpc's own buffers: those lend a stream that is reset the connection's window for good, inflate
        # whatever a peer has deflated, and fail the connection for one message that is too long.
        stream_id = event.stream_id
        self.acknowledge_received_data(stream_id, event.flow_controlled_length)
        data = self._incomplete[stream_id]
        data += event.data
        found: list[Event] = []
        while len(data) >= _MESSAGE_HEADER.size:
            compressed, length = _MESSAGE_HEADER.unpack_from(data)
            if compressed:
                error = RpcError(StatusCode.UNIMPLEMENTED, "compressed messages are not taken")
                return [*found, MessageRefused(stream_id, error)]
            if length > self._max_message_bytes:
                message = f"a message of {length} bytes, where {self._max_message_bytes} are taken"
                error = RpcError(StatusCode.RESOURCE_EXHAUSTED, message)
                return [*found, MessageRefused(stream_id, error)]
            end = _MESSAGE_HEADER.size + length
            if len(data) < end:
                break
            found.append(MessageReceived(stream_id, bytes(data[_MESSAGE_HEADER.size : end]), 0))
            del data[:end]
        return found

    def _stream_ended(self, event: h2.events.StreamEnded) -> list[Event]:
        self._incomplete.pop(event.stream_id, None)
        events: list[Event] = super()._stream_ended(event)
        return events

    def _stream_reset(self, event: h2.events.StreamReset) -> list[Event]:
        # purerpc drops this event, and keeps the stream's buffer for as long as the connection lives.
        self._forget(event.stream_id)
        return [StreamReset(event.stream_id, getattr(event.error_code, "name", str(event.error_code)))]

    def _forget(self, stream_id: int) -> None:
        self._incomplete.pop(stream_id, None)
        self.message_read_buffers.pop(stream_id, None)


def frame(message: Any) -> memoryview:  # noqa: ANN401  # any protobuf message; protobuf has no typed base here
    """Return a protobuf message as gRPC writes it: not compressed, length first."""
    payload = message.SerializeToString()
    return memoryview(_MESSAGE_HEADER.pack(False, len(payload)) + payload)


def status(code: StatusCode, message: str) -> Status:
    """Return a status that can be sent, whatever the message: a stray byte of a file name has no UTF-8."""
    return Status(code, message[:MAX_STATUS_MESSAGE].encode("utf-8", "replace").decode())


def quoted(text: str) -> str:
    """Return what a peer wrote, safe to repeat: on one line, and not long."""
    return repr(cut(text, _QUOTED))
