"""The protocol of one gRPC connection, without I/O: purerpc's, with what it hides made visible."""

from __future__ import annotations

import struct
from typing import Any, Final

import attrs
import h2.events
import h2.exceptions
from purerpc import StatusCode
from purerpc.grpclib.config import GRPCConfiguration
from purerpc.grpclib.connection import GRPCConnection
from purerpc.grpclib.events import Event

#: Largest message accepted, in bytes: grpc-go's default, which is also all that the kubelet accepts from us.
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024


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


class Protocol(GRPCConnection):  # type: ignore[misc]  # purerpc is not typed
    """The state of one connection: feed it bytes, get events; tell it what to send, take the bytes."""

    #: The kubelet needs a handful; a peer that opens more is refused by h2.
    MAX_CONCURRENT_STREAMS = 128

    def __init__(self, *, client_side: bool) -> None:
        super().__init__(GRPCConfiguration(client_side=client_side, max_message_length=MAX_MESSAGE_BYTES))
        self.initiate_connection()

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes off the wire. Raises BrokenPeerError, after which the connection must be closed."""
        try:
            events: list[Event] = self.receive_data(data)
        except Exception as error:
            # Whatever the layers below trip over (h2, hpack, a header that is missing or not UTF-8), the peer wrote.
            raise BrokenPeerError(f"{type(error).__name__}: {error}") from error
        return events

    def acknowledge(self, stream_id: int, flow_controlled_length: int) -> None:
        """Let the peer send as much again. A stream that it has reset meanwhile needs none."""
        try:
            self.acknowledge_received_data(stream_id, flow_controlled_length)
        except h2.exceptions.StreamClosedError:
            pass

    def _request_received(self, event: h2.events.RequestReceived) -> list[Event]:
        # purerpc refuses a request without a body by failing the connection. Here it becomes a call with no
        # message, which is answered like any other bad call.
        event.stream_ended = None
        events: list[Event] = super()._request_received(event)
        return events

    def _stream_reset(self, event: h2.events.StreamReset) -> list[Event]:
        # purerpc drops this event, and keeps the stream's buffer for as long as the connection lives.
        self.message_read_buffers.pop(event.stream_id, None)
        return [StreamReset(event.stream_id)]


def frame(message: Any) -> memoryview:  # noqa: ANN401  # any protobuf message; protobuf has no typed base here
    """A protobuf message as gRPC writes it: not compressed, length first."""
    payload = message.SerializeToString()
    return memoryview(struct.pack(">?I", False, len(payload)) + payload)
