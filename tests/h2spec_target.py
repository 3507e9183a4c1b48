"""Serves `sgpu.rpc.http2` for h2spec, which speaks TCP and asks with GET: `python tests/h2spec_target.py 8443`.

Every request is answered with 200 and a few bytes, as its windows admit. Then, in another terminal, for all three
suites: `h2spec -p 8443`.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Final

import trio

from sgpu.rpc import headers
from sgpu.rpc.http2 import Connection, Data, Event, Headers, Http2Error, Reset

ANSWER: Final = b"hello"


async def serve(stream: trio.abc.Stream) -> None:
    """Answer until the peer hangs up, or breaks the protocol."""
    connection = Connection(client=False, window=1 << 20)
    unsent: dict[int, memoryview] = {}
    with suppress(trio.BrokenResourceError, Http2Error):
        async with stream:
            while data := await stream.receive_some():
                try:
                    for event in connection.receive(bytes(data)):
                        answer(connection, event, unsent)
                    for stream_id in list(unsent):
                        send(connection, stream_id, unsent)
                finally:
                    await stream.send_all(bytes(connection.output))
                connection.output.clear()


def answer(connection: Connection, event: Event, unsent: dict[int, memoryview]) -> None:
    if isinstance(event, Reset):
        unsent.pop(event.stream_id, None)
    elif isinstance(event, Headers | Data) and event.end:
        connection.send_headers(event.stream_id, headers.encode((":status", "200")), end=False)
        unsent[event.stream_id] = memoryview(ANSWER)


def send(connection: Connection, stream_id: int, unsent: dict[int, memoryview]) -> None:
    """Send as much of an answer as there is room for."""
    rest = unsent[stream_id]
    if (room := min(connection.room(stream_id), len(rest))) > 0:
        connection.send_data(stream_id, rest[:room], end=room == len(rest))
        unsent[stream_id] = rest[room:]
    if not unsent[stream_id]:
        del unsent[stream_id]


if __name__ == "__main__":
    trio.run(trio.serve_tcp, serve, int(sys.argv[1]))
