"""Peers that do what peers must not, hundreds of times each: the server goes on, and nothing of them stays.

SGPU_SOAK_STEPS makes more of them.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
import trio.testing
from google.protobuf.wrappers_pb2 import BytesValue
from rpc_peer import (
    BIG,
    BUG,
    ECHO,
    FLOOD,
    HELLO,
    PREFACE,
    REFUSE,
    TIMEOUT,
    WAIT,
    WATCH,
    Methods,
    Reader,
    data,
    goaway,
    headers,
    http2_frame,
    message,
    ping,
    request,
    reset,
    serving,
    settings,
    text,
    window_update,
)
from virtual_clock import real

from sgpu.rpc import http2, unary_call

pytestmark = pytest.mark.soak

TIMES: Final = max(250, int(os.environ.get("SGPU_SOAK_STEPS") or 0))
#: So many first, for all that is made once: caches, interned strings, the allocator's arenas.
WARM_UP: Final = 50
#: Python objects that may come and go on their own between two counts. One that stayed of each abuse would make TIMES.
OBJECTS: Final = 200
#: Bytes by which the process may grow, as it does by itself after other tests. What each abuse leaves shows where it is
#: 16 KB, or a page with SGPU_SOAK_STEPS=1000.
RESIDENT: Final = 4_000_000
#: Calls that a connection may have here: enough to be too many, few enough to make often.
CALLS: Final = 8
#: Frames that carry no call forward which a connection bears here.
PATIENCE: Final = 50
#: Calls that are made in one go.
SOME: Final = 4
SEED: Final = 2_026

WIDE: Final = settings(initial_window_size=2**31 - 1) + window_update(0, 2**31 - 1 - 65535)
LONG_FRAME: Final = b"\xff\xff\xff" + data(1, bytes(1000))[3:]
TOO_MANY: Final = b"".join(headers(2 * number + 1) for number in range(CALLS + 1))
RAPID: Final = b"".join(request(2 * n + 1, WAIT) + reset(2 * n + 1) for n in range(2 * PATIENCE))
PART: Final = message(bytes(9_000), length=9_999)
WHOLE: Final = HELLO + settings() + request(1, ECHO, text("hallo").SerializeToString()) + ping()


@attrs.frozen
class Abuse:
    """A peer's bytes on its own connection, the answer it waits for, and the words in the log."""

    name: str
    sends: bytes | Callable[[random.Random], bytes]
    waits_for: Callable[[trio.SocketStream], Awaitable[None]]
    logged: str = ""  # in a warning, one for each; empty for none, "?" where that depends


async def nothing(_: trio.SocketStream) -> None:
    """It vanishes."""


async def a_pong(stream: trio.SocketStream) -> None:
    """The server has seen all before the PING."""
    await Reader(stream).wait_pong()


async def an_answer(stream: trio.SocketStream) -> None:
    """To the first call."""
    await Reader(stream).wait_end(1)


async def another_answer(stream: trio.SocketStream) -> None:
    """To the second call."""
    await Reader(stream).wait_end(3)


async def hanging_up(stream: trio.SocketStream) -> None:
    """The server's."""
    while await stream.receive_some():
        pass


async def any_bytes(stream: trio.SocketStream) -> None:
    """Whatever it is, and be it the end."""
    await stream.receive_some()


def garbage(source: random.Random) -> bytes:
    return source.randbytes(source.randrange(1, 200))


def garbage_for_frames(source: random.Random) -> bytes:
    """Half of the time in the form of a frame."""
    raw = source.randbytes(source.randrange(1, 100))
    if source.random() < 0.5:
        raw = http2_frame(source.randrange(12), source.randrange(256), source.randrange(4), raw)
    return HELLO + raw


def mutation(source: random.Random) -> bytes:
    """A good request with some bytes changed."""
    raw = bytearray(WHOLE)
    for _ in range(source.randrange(1, 4)):
        raw[source.randrange(len(raw))] = source.randrange(256)
    return bytes(raw)


def truncation(source: random.Random) -> bytes:
    return WHOLE[: source.randrange(len(WHOLE))]


def bad_headers(source: random.Random) -> bytes:
    return HELLO + source.choice(BAD_HEADERS)


BAD_HEADERS: Final = (
    headers(1, path=None),
    headers(1, path=""),
    headers(1, te="gzip"),
    headers(1, x=b"\xff\xfe"),
    headers(1, x="a\nb"),
    headers(1, X="a"),
    headers(1, connection="close"),
    headers(2),
    http2_frame(0x1, 0x4, 1, b"\xff" * 20),
)

ABUSES: Final = [
    Abuse("vanishes at once", b"", nothing),
    Abuse("vanishes within the preface", PREFACE[:11], nothing),
    Abuse("vanishes within a request", truncation, nothing),
    Abuse("vanishes within a call", HELLO + request(1, WAIT) + ping(), a_pong),
    Abuse("vanishes within a stream", HELLO + request(1, WATCH) + ping(), a_pong),
    Abuse("vanishes before the answer", HELLO + request(1, ECHO), nothing),
    Abuse("never opens the window", HELLO + request(1, FLOOD) + ping(), a_pong),
    Abuse("never reads", HELLO + WIDE + request(1, FLOOD) + ping(), a_pong),
    Abuse("resets a call", HELLO + request(1, WAIT) + reset(1) + request(3, ECHO), another_answer),
    Abuse("never ends a request", HELLO + headers(1) + data(1, message(length=1000), end=False) + ping(), a_pong),
    Abuse("GOAWAY, then more", HELLO + headers(1) + goaway() + data(1, message()) + ping() + goaway(), an_answer),
    Abuse("no HTTP/2", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", hanging_up, "no HTTP/2"),
    Abuse(
        "too many calls", HELLO + b"".join(headers(2 * n + 1) for n in range(CALLS + 1)), hanging_up, "calls at a time"
    ),
    Abuse("too long a frame", HELLO + LONG_FRAME, hanging_up, "16777215"),
    Abuse("garbage", garbage, nothing, "?"),
    Abuse("garbage in place of frames", garbage_for_frames, any_bytes, "?"),
    Abuse("mutated request", mutation, any_bytes, "?"),
    Abuse(
        "rapid resets",
        HELLO + b"".join(request(2 * n + 1, WAIT) + reset(2 * n + 1) for n in range(2000)),
        hanging_up,
        "?",
    ),
    Abuse("bad headers", bad_headers, hanging_up, "WARNING"),
]

#: What leaves a connection as it was, by the HTTP/2 stream it is on.
CALLS_ON_ONE_CONNECTION: Final[dict[str, Callable[[int], bytes]]] = {
    "good call": lambda stream: request(stream, ECHO),
    "long answer": lambda stream: request(stream, BIG, text("9999").SerializeToString()) + window_update(0, 10_021),
    "late WINDOW_UPDATE": lambda stream: request(stream, ECHO) + window_update(max(stream - 10, 1), 1),
    "late reset": lambda stream: request(stream, ECHO) + reset(max(stream - 10, 1)),
    "no message of the kind": lambda stream: request(stream, ECHO, b"\xff"),
    "bug in the handler": lambda stream: request(stream, BUG),
    "refusal": lambda stream: request(stream, REFUSE),
    "no body": lambda stream: headers(stream, end=True),
    "no gRPC": lambda stream: headers(stream, method="GET", end=True),
    "no gRPC, and more": lambda stream: headers(stream, content_type="text/html") + data(stream, PART),
    "unknown method": lambda stream: request(stream, "/test.Service/Nope"),
    "two messages": lambda stream: headers(stream) + data(stream, 2 * message()),
    "many messages": lambda stream: headers(stream) + 5 * data(stream, message(), end=False) + reset(stream),
    "compressed message": lambda stream: headers(stream) + data(stream, message(b"x", compressed=True)),
    "too long a message": lambda stream: headers(stream) + data(stream, message(length=2**32 - 1), end=False),
    "half a message": lambda stream: headers(stream) + data(stream, PART),
    "reset of a call": lambda stream: request(stream, WAIT) + reset(stream),
    "reset of a stream": lambda stream: request(stream, WATCH) + reset(stream),
    "reset of a request": lambda stream: headers(stream) + data(stream, PART, end=False) + reset(stream),
}


class Log(logging.Handler):
    """Counts messages, and keeps none of the records that would count as leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[f"{record.levelname} {record.getMessage()}"] += 1


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    logger = logging.Logger("apart from all others")  # pytest keeps the records of all others
    handler = Log()
    logger.addHandler(handler)
    monkeypatch.setattr("sgpu.rpc.server.logger", logger)
    return handler


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "PATIENCE", PATIENCE)
    monkeypatch.setattr(http2, "MAX_STREAMS", CALLS)


@attrs.frozen
class Holdings:
    """Resources of a process that may leak."""

    tasks: int
    descriptors: int
    objects: int
    resident: int

    @classmethod
    def now(cls) -> Holdings:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            tasks=trio.lowlevel.current_statistics().tasks_living,
            descriptors=len(os.listdir("/proc/self/fd")),
            objects=len(gc.get_objects()),
            resident=pages * os.sysconf("SC_PAGE_SIZE"),
        )


async def settled(tasks: int) -> Holdings:
    """Return the process's resources, once the server has seen the end of each connection."""
    with trio.move_on_after(TIMEOUT):
        while trio.lowlevel.current_statistics().tasks_living > tasks:
            await trio.testing.wait_all_tasks_blocked(0.001)
    return Holdings.now()


def assert_nothing_stayed(before: Holdings, after: Holdings) -> None:
    assert after.tasks == before.tasks
    assert after.descriptors == before.descriptors
    assert after.objects - before.objects < OBJECTS
    assert after.resident - before.resident < RESIDENT


@asynccontextmanager
async def connection(path: Path) -> AsyncIterator[trio.SocketStream]:
    async with await trio.open_unix_socket(str(path)) as stream:
        yield stream


async def commit(abuse: Abuse, path: Path, source: random.Random) -> None:
    async with connection(path) as stream:
        try:
            await stream.send_all(abuse.sends if isinstance(abuse.sends, bytes) else abuse.sends(source))
            await abuse.waits_for(stream)
        except trio.BrokenResourceError:
            pass  # the server hung up before it had read everything, which resets the connection


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
@real
async def test_a_bad_peer_leaves_nothing_behind(abuse: Abuse, tmp_path: Path, log: Log) -> None:
    """Have the same tasks, descriptors and memory after hundreds of its connections, and answer calls."""
    source = random.Random(SEED)
    methods = Methods()
    async with serving(methods.routes(), tmp_path / "s"):
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(WARM_UP):
            await commit(abuse, tmp_path / "s", source)
        before = await settled(tasks)
        log.messages.clear()
        for _ in range(TIMES):
            await commit(abuse, tmp_path / "s", source)
        logged = Counter(log.messages)
        log.messages.clear()
        after = await settled(tasks)
        logged += log.messages
        assert_nothing_stayed(before, after)
        assert methods.waiting == 0
        with trio.fail_after(TIMEOUT):
            assert await unary_call(tmp_path / "s", ECHO, text("next"), BytesValue) == text("next")
        if abuse.logged != "?":
            assert sum(logged.values()) == (TIMES if abuse.logged else 0)
        assert all(line.startswith("WARNING") for line in logged)
        assert all(abuse.logged in line for line in logged if abuse.logged != "?")


@pytest.mark.parametrize("sends", CALLS_ON_ONE_CONNECTION.values(), ids=CALLS_ON_ONE_CONNECTION)
@real
async def test_a_bad_call_leaves_nothing_behind(sends: Callable[[int], bytes], tmp_path: Path, log: Log) -> None:
    """Have the same tasks, descriptors and memory after hundreds on one connection that stays, and answer calls."""
    methods = Methods()
    async with serving(methods.routes(), tmp_path / "s"), connection(tmp_path / "s") as stream:
        reader = Reader(stream)
        stream_ids = itertools.count(1, 2)

        async def call(times: int) -> None:
            """Some bad calls, and a good one behind them that is answered when all have been seen."""
            for _ in range(times // SOME):
                bad = b"".join(sends(stream_id) for stream_id in itertools.islice(stream_ids, SOME))
                good = next(stream_ids)
                await stream.send_all(bad + request(good, ECHO))
                await reader.wait_end(good)

        await stream.send_all(HELLO)
        await call(WARM_UP)
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        before = await settled(tasks)
        await call(TIMES)
        assert_nothing_stayed(before, await settled(tasks))
        assert methods.waiting == 0
        assert not {line for line in log.messages if BUG not in line}
