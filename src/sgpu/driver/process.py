"""One worker from its start to its end: its messages, and whether it hangs or crashes.

Knows processes and deadlines; not what a GPU is, nor what becomes of the messages.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Final

import attrs
import trio

from sgpu.driver.calls import Calls, Part, create
from sgpu.driver.messages import Message, NotReady, Report, WorkerConfig, decode, encode_config
from sgpu.lib.concurrency import race
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


@attrs.frozen
class Worker:
    """A process that was started, and what it writes down of its calls."""

    process: trio.Process
    calls: Calls


async def run_worker(
    config: WorkerConfig,
    deadline: float,
    left_behind: list[trio.Process],
    handle: Callable[[Message], None],
    feed: Feed = no_input,
    going_on: Callable[[], None] = lambda: None,
    started: Worker | None = None,
) -> Outcome:
    """Run a worker and handle its messages, until it ends or a call does not return.

    `deadline`: seconds after which a call of the driver counts as one that does not return. `feed` writes to its
    standard input until it is cancelled. `going_on` is called each time that it turns out that it still may. `started`:
    a worker with this configuration that runs already. In the end the process is killed; it is appended to
    `left_behind`, because one that is stuck in the kernel does not even die then. Raises, in a group, what `handle` and
    `feed` raise.
    """
    try:
        worker = started or await open_worker(config)
    except OSError as error:  # for want of processes or memory
        return Outcome(f"the driver's process can't be started: {explain(error)}", "")
    async with _killed_at_the_end(worker, left_behind), trio.open_nursery() as nursery:
        assert worker.process.stdin is not None
        nursery.start_soon(_feed, feed, worker.process.stdin)
        listener = _Listener(worker, config.interval, deadline)
        outcome = await race(partial(listener.read, handle), partial(listener.wait_for_hang, going_on))
        nursery.cancel_scope.cancel()
    return outcome


async def _feed(feed: Feed, stream: trio.abc.SendStream) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it has ended, which its output says, too
        await feed(stream)


class _Listener:
    """Reads the messages of one process, and notices when they do not come."""

    def __init__(self, worker: Worker, interval: float, deadline: float) -> None:
        self._process = worker.process
        self._calls = worker.calls
        self._interval = interval
        self._deadline = deadline
        self._started = False
        self._answered_at = trio.current_time()

    async def read(self, handle: Callable[[Message], None]) -> Outcome:
        """Read until the process ends."""
        assert self._process.stdout is not None
        async with aclosing(_lines(self._process.stdout)) as lines:
            async for line in lines:
                try:
                    message = decode(line)
                except ValueError as error:
                    return Outcome(str(error), self._in_call)
                self._started = True
                if isinstance(message, (Report, NotReady)):  # others come while a call goes on
                    self._answered_at = trio.current_time()
                handle(message)
        return await self._ended()

    async def wait_for_hang(self, going_on: Callable[[], None]) -> Outcome:
        """Look as often as a call may begin and not return in time, until one has not, or nothing is heard."""
        while (pause := self._pause()) > 0:
            going_on()
            await trio.sleep(pause)
        calls = filter(None, map(self._calls.current, Part))
        hanging = next((call.uuid for call in calls if call.seconds >= self._deadline), None)
        return Outcome(f"the driver has not answered for {self._deadline:g} s", hanging)

    def _pause(self) -> float:
        """Return the seconds after which it may have been silent for too long; not positive: it has."""
        pause = self._deadline
        for call in filter(None, map(self._calls.current, Part)):
            pause = min(pause, self._deadline - call.seconds)
        if self._in_call is None:
            silent = trio.current_time() - self._answered_at
            patience = self._interval + self._deadline
            pause = min(pause, (patience if self._has_begun else max(patience, START_TIMEOUT)) - silent)
        return pause

    @property
    def _in_call(self) -> str | None:
        call = self._calls.current(Part.POLL)
        return call.uuid if call else None

    @property
    def _has_begun(self) -> bool:
        return self._started or self._calls.any

    async def _ended(self) -> Outcome:
        process = self._process
        with trio.move_on_after(EXIT_TIMEOUT):
            await process.wait()
        if process.returncode == 0 and self._has_begun and self._in_call is None:
            return Outcome()  # it ends by itself only between polls; a library that exits does so in a call
        status = _exit_status(process.returncode)
        if not self._has_begun:
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


async def open_worker(config: WorkerConfig) -> Worker:
    """Start a worker. Raises OSError."""
    calls = create()
    # -P: `-m` alone would import from the working directory, which may be anybody's.
    options = ["-P", *(["-S"] if sys.flags.no_site else [])]  # as it was started itself
    command = [sys.executable, *options, "-m", "sgpu.driver", encode_config(config), str(calls.descriptor)]
    try:
        with refusals():  # trio starts it in a thread
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[calls.descriptor],
                start_new_session=True,  # so that a terminal's Ctrl-C is ours alone to answer
            )
    except BaseException:
        calls.close()
        raise
    return Worker(process, calls)


@asynccontextmanager
async def _killed_at_the_end(worker: Worker, left_behind: list[trio.Process]) -> AsyncIterator[None]:
    """Kill the process at the end; nobody waits for it."""
    process = worker.process
    try:
        yield
    finally:
        process.kill()
        left_behind.append(process)
        worker.calls.close()
        with trio.move_on_after(EXIT_TIMEOUT) as scope:
            scope.shield = True
            for stream in filter(None, (process.stdin, process.stdout)):
                await stream.aclose()


def _exit_status(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
