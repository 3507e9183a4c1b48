"""One worker from its start to its end: its messages, and whether it hangs or crashes.

Knows processes and deadlines; not what a GPU is, nor what becomes of the messages.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final

import attrs
import trio

from sgpu.driver.messages import (
    CallStarted,
    DriverEvent,
    Failure,
    LimitReport,
    LimitStarted,
    Message,
    WorkerConfig,
    decode,
    encode_config,
)
from sgpu.lib.limits import explain
from sgpu.lib.threads import refusals

#: Bytes taken off the pipe at a time.
RECEIVE_BYTES: Final = 64 * 1024
#: Bytes of a line: 64 GPUs with a thousand processes each take half of it.
LONGEST_LINE: Final = 8 * 1024 * 1024
#: Seconds that a process may take until its first message: it is not the driver's time yet.
START_TIMEOUT: Final = 10.0
#: Seconds that a process which closed its pipe may take to be gone.
EXIT_TIMEOUT: Final = 1.0


Feed = Callable[[trio.abc.SendStream], Awaitable[None]]


async def no_input(_: trio.abc.SendStream) -> None:
    """Write nothing to a worker. The end of its input would be the end of its parent."""
    await trio.sleep_forever()


@attrs.frozen
class Outcome:
    """The end of a process. `problem` is empty if it ended by itself.

    `in_call` is the UUID that its last call was about, empty for the driver as a whole, None when it was in no call.
    """

    problem: str = ""
    in_call: str | None = None


async def run_worker(
    config: WorkerConfig,
    deadline: float,
    left_behind: list[trio.Process],
    handle: Callable[[Message], None],
    feed: Feed = no_input,
) -> Outcome:
    """Run a worker and handle its messages, until it ends or a call does not return.

    `deadline`: seconds after which a call of the driver counts as one that does not return. `feed` writes to its
    standard input until it is cancelled. In the end the process is killed; it is appended to `left_behind`, because one
    that is stuck in the kernel does not even die then. Raises, in a group, what `handle` and `feed` raise.
    """
    try:
        process = await _start(config)
    except OSError as error:  # for want of processes or memory
        return Outcome(f"the driver's process can't be started: {explain(error)}", "")
    async with _killed_at_the_end(process, left_behind), trio.open_nursery() as nursery:
        assert process.stdin is not None
        nursery.start_soon(_feed, feed, process.stdin)
        outcome = await _Reader(config.interval, deadline, handle).read(process)
        nursery.cancel_scope.cancel()
    return outcome


async def _feed(feed: Feed, stream: trio.abc.SendStream) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it has ended, which its output says, too
        await feed(stream)


class _Reader:
    """Reads the messages of one process."""

    def __init__(self, interval: float, deadline: float, handle: Callable[[Message], None]) -> None:
        self._interval = interval
        self._deadline = deadline
        self._handle = handle
        self._started = False
        self._in_call: str | None = None
        self._limits_of: str | None = None  # the GPU that a call about limits is about
        self._limits_due = float("inf")

    async def read(self, process: trio.Process) -> Outcome:
        """Read until the process ends or is silent for too long."""
        assert process.stdout is not None
        due = trio.current_time() + max(self._patience, START_TIMEOUT)
        async with aclosing(_lines(process.stdout)) as lines:
            while True:
                with trio.move_on_at(min(due, self._limits_due)):
                    line = await anext(lines, None)
                    if line is None:
                        return await self._ended(process)
                    try:
                        message = decode(line)
                    except ValueError as error:
                        return Outcome(str(error), self._in_call)
                    self._started = True
                    if isinstance(message, (LimitStarted, LimitReport)):
                        self._take_limits(message)
                    elif not isinstance(message, (DriverEvent, Failure)):  # those come while a call goes on
                        self._in_call = message.uuid if isinstance(message, CallStarted) else None
                        due = trio.current_time() + self._patience
                    self._handle(message)
                    continue
                in_call = self._in_call if self._limits_due > due else self._limits_of
                return Outcome(f"the driver has not answered for {self._deadline:g} s", in_call)

    def _take_limits(self, message: LimitStarted | LimitReport) -> None:
        """Note whether a call about limits goes on: it is made beside the others, and has a deadline of its own."""
        begins = isinstance(message, LimitStarted)
        self._limits_of = message.uuid if isinstance(message, LimitStarted) else None
        self._limits_due = trio.current_time() + self._deadline if begins else float("inf")

    @property
    def _patience(self) -> float:
        """Return how many seconds the process may be silent: the deadline; between polls, the interval as well."""
        return self._deadline if self._in_call is not None else self._interval + self._deadline

    async def _ended(self, process: trio.Process) -> Outcome:
        with trio.move_on_after(EXIT_TIMEOUT):
            await process.wait()
        if process.returncode == 0 and self._started and self._in_call is None:
            return Outcome()  # it ends by itself only between polls; a library that exits does so in a call
        status = _exit_status(process.returncode)
        if not self._started:
            return Outcome(f"the driver's process ended before it asked the driver anything ({status})")
        return Outcome(f"the driver's library took its process down ({status})", self._in_call)


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    buffer = b""
    while data := await stream.receive_some(RECEIVE_BYTES):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield line
        if len(buffer) > LONGEST_LINE:
            yield buffer  # which is no message: it has no end
            return


async def _start(config: WorkerConfig) -> trio.Process:
    """Start a worker. Raises OSError."""
    # -P: `-m` alone would import from the working directory, which may be anybody's.
    command = [sys.executable, "-P", "-m", "sgpu.driver", encode_config(config)]
    # A session of its own, so that a terminal's Ctrl-C is ours alone to answer.
    with refusals():  # trio starts it in a thread
        return await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )


@asynccontextmanager
async def _killed_at_the_end(process: trio.Process, left_behind: list[trio.Process]) -> AsyncIterator[None]:
    """Kill the process at the end; nobody waits for it."""
    try:
        yield
    finally:
        process.kill()
        left_behind.append(process)
        with trio.move_on_after(EXIT_TIMEOUT) as scope:
            scope.shield = True
            for stream in filter(None, (process.stdin, process.stdout)):
                await stream.aclose()


def _exit_status(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
