"""Connections of HTTP/2 with peers that flood, and what each rule of the RFC is about. That they agree with h2 in all
else is in test_fuzz_http2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

import pytest
from rpc_peer import PREFACE, data, goaway, headers, http2_frame, ping, reset, settings, window_update

from sgpu.rpc.headers import encode
from sgpu.rpc.http2 import MAX_FRAME_BYTES, MAX_STREAMS, PATIENCE, Code, Connection, Http2Error

WINDOW: Final = 100_000
HELLO: Final = PREFACE + settings()
ANSWER: Final = encode((":status", "200"))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def server(clock: Clock | None = None) -> Connection:
    """A server's end, greeted."""
    connection = Connection(client=False, window=WINDOW, clock=clock or Clock())
    connection.receive(HELLO)
    connection.output.clear()
    return connection


def refused(connection: Connection, *sent: bytes) -> Code:
    """Return why the last of these is refused, which GOAWAY says as well; all before it are taken."""
    for piece in sent[:-1]:
        connection.receive(piece)
    connection.output.clear()
    with pytest.raises(Http2Error) as caught:
        connection.receive(sent[-1])
    farewell = connection.output.rindex(b"\x07\0\0\0\0\0")
    assert connection.output[farewell + 10 : farewell + 14] == caught.value.code.to_bytes(4, "big")
    return caught.value.code


def block(size: int) -> bytes:
    """A block of headers of about that size."""
    return encode(*((f"x-{number}", "x" * 90) for number in range(size // 100)))


#: The n-th frame of each flood, by the name that it is known by. The first stream is open for as long as they last.
FLOODS: Final[dict[str, Callable[[int], bytes]]] = {
    "PING": lambda _: ping(),
    "answers to no PING": lambda _: http2_frame(0x6, 0x1, 0, bytes(8)),
    "SETTINGS": lambda _: settings(initial_window_size=1),
    "answers to no SETTINGS": lambda _: http2_frame(0x4, 0x1, 0),
    "rapid reset": lambda n: headers(2 * n + 3) + reset(2 * n + 3),
    "reset of what has ended": lambda n: reset(3) if n else headers(3) + reset(3),
    "empty DATA": lambda _: data(1, b"", end=False),
    "padding alone": lambda _: http2_frame(0x0, 0x8, 1, bytes([9]) + bytes(9)),
    "WINDOW_UPDATE, byte by byte": lambda _: window_update(1, 1),
    "WINDOW_UPDATE of what has ended": lambda n: window_update(3, 1) if n else headers(3) + reset(3),
    "PRIORITY": lambda _: http2_frame(0x2, 0, 3, bytes(5)),
    "GOAWAY": lambda _: goaway(),
    "unknown frames": lambda _: http2_frame(0xBE, 0, 1, b"x"),
    "CONTINUATION": lambda n: http2_frame(0x9, 0, 3) if n else http2_frame(0x1, 0, 3),
}


class TestFloods:
    @pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
    def test_patience_ends(self, flood: Callable[[int], bytes]) -> None:
        """Refuse frames that carry no call forward when there are too many, before they have cost much."""
        connection = server()
        connection.receive(headers(1))
        for number in range(PATIENCE - 10):
            connection.receive(flood(number))
        assert len(connection.output) < 30 * PATIENCE
        assert refused(connection, b"".join(map(flood, range(PATIENCE, PATIENCE + 20)))) is Code.ENHANCE_YOUR_CALM

    def test_patience_grows_with_time_and_with_calls(self) -> None:
        """Bear as many again after a while, and a few for each call that is done and for what was sent."""
        clock = Clock()
        connection = server(clock)
        for _ in range(5):
            connection.receive((PATIENCE - 10) * ping())
            clock.now += 60
        stream_ids = itertools.count(1, 2)
        connection.receive(window_update(0, 2**30) + settings(initial_window_size=2**30))
        for stream_id in itertools.islice(stream_ids, 1000):
            connection.receive(headers(stream_id, end=True) + 5 * ping())
            connection.send_headers(stream_id, ANSWER, end=True)
        stream_id = next(stream_ids)
        connection.receive(headers(stream_id, end=True))
        connection.send_headers(stream_id, ANSWER, end=False)
        for _ in range(1000):
            connection.send_data(stream_id, memoryview(bytes(3 * MAX_FRAME_BYTES)))
            connection.receive(6 * window_update(stream_id, MAX_FRAME_BYTES // 2))
            connection.output.clear()

    @pytest.mark.parametrize(
        "sent",
        [
            # 4000 bytes, which go into the table, and are meant by each of the bytes behind them.
            pytest.param(
                [http2_frame(0x1, 0x4, 1, b"\x40" + encode(("x", "x" * 4000))[1:] + 4 * b"\xbe")], id="HPACK bomb"
            ),
            pytest.param([http2_frame(0x1, 0x4, 1, encode(("x", "x" * 4000)) * 4 + block(300))], id="long"),
            pytest.param(
                [http2_frame(0x1, 0, 1, block(16_000)), http2_frame(0x9, 0, 1, block(16_000))], id="CONTINUATION"
            ),
        ],
    )
    def test_headers_have_a_bound(self, sent: list[bytes]) -> None:
        """Refuse a block that is long, or says much: what it means is held in memory."""
        assert refused(server(), *sent) is Code.ENHANCE_YOUR_CALM

    def test_streams_have_a_bound(self) -> None:
        """Refuse one more than were announced, at once."""
        many = b"".join(headers(2 * number + 1) for number in range(MAX_STREAMS))
        assert refused(server(), many, headers(2 * MAX_STREAMS + 1)) is Code.ENHANCE_YOUR_CALM

    def test_settings_have_a_bound(self) -> None:
        """Refuse a frame with more of them than there are kinds, several times over."""
        assert refused(server(), http2_frame(0x4, 0, 0, 33 * settings(initial_window_size=1)[9:])) is (
            Code.ENHANCE_YOUR_CALM
        )

    def test_a_peer_has_to_keep_to_its_window(self) -> None:
        """Refuse data beyond it, and open it again for data that fits."""
        connection = server()
        connection.receive(headers(1))
        for _ in range(20):
            connection.receive(data(1, bytes(MAX_FRAME_BYTES), end=False))
        assert connection.output.count(http2_frame(0x8, 0, 1)[3:9]) in range(4, 8)
        burst = 7 * data(1, bytes(MAX_FRAME_BYTES), end=False)
        huge = Connection(client=False, window=10)
        assert refused(huge, HELLO + headers(1), burst) is Code.FLOW_CONTROL_ERROR
