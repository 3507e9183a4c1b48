"""`sgpu.rpc.http2` against h2 as it is installed: the same bytes in, the same events out, or both refuse them.

Where only one refuses, it is for a reason that has a name here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest
from fuzzing import limited, mutated
from hypothesis import given
from hypothesis import strategies as st
from rpc_peer import (
    ECHO,
    HEADERS,
    PREFACE,
    data,
    goaway,
    header_block,
    headers,
    http2_frame,
    ping,
    request,
    reset,
    settings,
    window_update,
)

from sgpu.rpc.headers import MAX_HEADER_BYTES, encode
from sgpu.rpc.http2 import MAX_STREAMS, Connection, Data, Event, Headers, Http2Error, Reset, WindowOpened

WINDOW: Final = 1000
#: Why we refuse what h2 takes.
STRICTER: Final = {
    "for h2, the fault of a stream ends that stream alone": r"STREAM_CLOSED",
    "h2 ignores the reset of a stream that nobody opened": r"RST_STREAM on stream \d+, which is not open",
    "h2 does not look at how long PRIORITY is": r"PRIORITY of a wrong size",
    "h2 lets values pass that RFC 9113, 8.2.1 forbids, and any fields of a stream that has ended": (
        r"no peer may send|neither a request nor a response|UTF-8"
    ),
    "h2 lets a server begin a stream": r"HEADERS on stream \d+, which is not open",
    "h2 lets an acknowledgement have settings": r"SETTINGS of a wrong size",
    "h2 waits for the rest of a PUSH_PROMISE": r"PUSH_PROMISE, which is switched off",
    "h2 waits for all of a frame that is too long": r"a frame of \d+ bytes",
    "h2 takes anything before SETTINGS": r"in place of SETTINGS",
    "h2 takes data before the headers of an answer": r"data before the headers",
}
#: Why h2 refuses what we take.
MORE_LENIENT: Final = {
    "for h2, GOAWAY ends all": r"Invalid input ConnectionInputs",
    "h2 looks at the begin of a frame before the rest is there": r"Invalid frame header",
    "a straggler of a stream that has ended": r"StreamClosedError",
}


class Ours:
    def __init__(self, *, client: bool) -> None:
        self._connection = Connection(client=client, window=WINDOW)
        for _ in range(2 * client):
            self._connection.send_headers(self._connection.open_stream(), encode(*HEADERS), end=False)

    def receive(self, piece: bytes) -> Iterator[Event]:
        yield from self._connection.receive(piece)


class Theirs:
    def __init__(self, *, client: bool) -> None:
        codes = h2.settings.SettingCodes
        config = h2.config.H2Configuration(client_side=client, header_encoding="utf-8")
        self._connection = h2.connection.H2Connection(config)
        values = {
            codes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            codes.INITIAL_WINDOW_SIZE: WINDOW,
            codes.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
            codes.ENABLE_PUSH: 0,
        }
        self._connection.local_settings = h2.settings.Settings(client=client, initial_values=values)
        self._connection.initiate_connection()
        self._connection.increment_flow_control_window(2**30)
        for _ in range(2 * client):
            self._connection.send_headers(self._connection.get_next_available_stream_id(), HEADERS)

    def receive(self, piece: bytes) -> Iterator[Event]:
        for event in self._connection.receive_data(piece):
            match event:
                case h2.events.RequestReceived() | h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    fields: dict[str, str] = {}
                    for name, value in event.headers:
                        fields[name] = f"{fields[name]}, {value}" if name in fields else value
                    yield Headers(event.stream_id, fields, event.stream_ended is not None)
                case h2.events.DataReceived():
                    with suppress(h2.exceptions.ProtocolError):
                        self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    yield Data(event.stream_id, bytes(event.data), event.stream_ended is not None)
                case h2.events.StreamReset():
                    yield Reset(event.stream_id, int(event.error_code))
                case h2.events.WindowUpdated():
                    yield WindowOpened(event.stream_id)
                case h2.events.RemoteSettingsChanged():
                    yield WindowOpened(0)


def taken(receive: Callable[[bytes], Iterator[Event]], pieces: list[bytes]) -> tuple[list[Event], str]:
    """Return the events, and why they came to an end before the bytes did."""
    events: list[Event] = []
    for piece in pieces:
        try:
            events += list(receive(piece))
        except Exception as error:
            return events, f"{type(error).__name__}: {error}"
    return events, ""


STREAMS: Final = st.sampled_from((1, 1, 1, 3, 3, 5, 0, 2, 2**31 - 1))
COUNTS: Final = st.sampled_from((0, 1, 2, 100, 16384, 65535, 2**31 - 1, 2**31))
ENDS: Final = st.booleans()
VALUES: Final = st.sampled_from((None, "", "x", "GET", "trailers", "5", "200", "103", b"\xff", "a\nb", " x"))
NAMES: Final = ("method", "path", "te", "content_length", "x", "X", "connection")
BLOCKS: Final = (
    st.builds(
        lambda stream, end, fields: headers(stream, end=end, **fields),
        STREAMS,
        ENDS,
        st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2),
    )
    | st.builds(lambda stream, end: header_block(stream, {":status": "200", "x": "y"}, end=end), STREAMS, ENDS)
    | st.builds(lambda stream, end: header_block(stream, {":status": "103"}, end=end), STREAMS, ENDS)
    | st.builds(lambda stream, end: header_block(stream, {"x": "y"}, end=end), STREAMS, ENDS)
)


def in_two(block: bytes, at: int) -> bytes:
    """HEADERS with a CONTINUATION."""
    flags, stream_id, body = block[4], int.from_bytes(block[5:9], "big"), block[9:]
    return http2_frame(0x1, flags & ~0x4, stream_id, body[:at]) + http2_frame(0x9, 0x4, stream_id, body[at:])


FRAMES: Final = (
    BLOCKS
    | BLOCKS
    | st.builds(in_two, BLOCKS, st.integers(0, 40))
    | st.builds(lambda stream, payload, end: data(stream, payload, end=end), STREAMS, st.binary(max_size=9), ENDS)
    | st.builds(lambda stream, end: data(stream, bytes(600), end=end), STREAMS, ENDS)
    | st.builds(lambda stream, padding: http2_frame(0x0, 0x8, stream, padding), STREAMS, st.binary(max_size=9))
    | st.builds(request, STREAMS, st.just(ECHO))
    | st.builds(reset, STREAMS)
    | st.builds(window_update, STREAMS, COUNTS)
    | st.builds(lambda value: settings(initial_window_size=value), COUNTS)
    | st.builds(lambda value: settings(max_frame_size=value), COUNTS)
    | st.sampled_from([ping(), goaway(), settings(), http2_frame(0x4, 0x1, 0)])
    # All types but ALTSVC, which h2 reads and we have never heard of.
    | st.builds(http2_frame, st.sampled_from((*range(10), 11)), st.integers(0, 255), STREAMS, st.binary(max_size=20))
)
PIECES: Final = st.lists(FRAMES | mutated(settings() + request(1, ECHO) + request(3, ECHO)), max_size=6)


@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
@given(PIECES, ENDS)
def test_the_same_events(client: bool, pieces: list[bytes], begins_well: bool) -> None:
    """Emit what h2 does for as long as both do, and stop where it does, but for a reason in the lists above."""
    sent = [b"" if client else PREFACE, settings() if begins_well else b"", *pieces]
    with limited():
        events, refused = taken(Ours(client=client).receive, sent)
        expected, refused_too = taken(Theirs(client=client).receive, sent)
    assert all(one == other for one, other in zip(events, expected, strict=False)), (events, expected)
    if bool(refused) is bool(refused_too):
        assert refused or len(events) == len(expected)
    else:
        reasons = STRICTER if refused else MORE_LENIENT
        assert any(re.search(reason, refused or refused_too) for reason in reasons.values()), (refused, refused_too)
    assert refused.startswith(Http2Error.__name__) or not refused
