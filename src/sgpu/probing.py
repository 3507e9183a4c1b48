"""One process that asks the driver, from its start to its end: what it says, and whether it hangs or crashes.

Knows processes and deadlines; not what a GPU is, nor what becomes of the messages.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final

import attrs
import trio

from sgpu.report import Asking, DriverEvent, Failure, Message, Orders, decode, encode_orders

#: Bytes taken off the pipe at a time.
RECEIVE_BYTES: Final = 64 * 1024
#: Seconds that a process may take to say its first word: it is not the driver's time yet.
START_TIMEOUT: Final = 10.0
#: Seconds that a process which closed its pipe may take to be gone.
EXIT_TIMEOUT: Final = 1.0


@attrs.frozen
class Outcome:
    """How a process ended. `trouble` is empty if it was by itself; `asking` whom it was asking then, None: nobody.

    To ask the driver as a whole is to ask the empty UUID.
    """

    trouble: str = ""
    asking: str | None = None


async def run_probe(
    orders: Orders, deadline: float, left_behind: list[trio.Process], take: Callable[[Message], None]
) -> Outcome:
    """Have a process follow the orders, and take what it says, until it ends or a call does not return.

    `deadline`: seconds after which a call of the driver counts as one that does not return. In the end the process
    is killed; it is appended to `left_behind`, because one that is stuck in the kernel does not even die then.
    """
    try:
        async with _running(orders, left_behind) as process:
            return await _Listener(orders.interval, deadline, take).listen(process)
    except OSError as error:  # for want of processes or memory
        return Outcome(f"the driver's process can't be started: {error}", "")


class _Listener:
    """Follows one process."""

    def __init__(self, interval: float, deadline: float, take: Callable[[Message], None]) -> None:
        self._interval = interval
        self._deadline = deadline
        self._take = take
        self._started = False
        self._asking: str | None = None

    async def listen(self, process: trio.Process) -> Outcome:
        """Until the process ends or is silent for too long."""
        assert process.stdout is not None
        due = trio.current_time() + max(self._patience, START_TIMEOUT)
        async with aclosing(_lines(process.stdout)) as lines:
            while True:
                with trio.move_on_at(due):
                    line = await anext(lines, None)
                    if line is None:
                        return await self._ended(process)
                    try:
                        message = decode(line)
                    except ValueError as error:
                        return Outcome(str(error), self._asking)
                    self._started = True
                    if not isinstance(message, (DriverEvent, Failure)):  # those come while a call goes on
                        self._asking = message.uuid if isinstance(message, Asking) else None
                        due = trio.current_time() + self._patience
                    self._take(message)
                    continue
                return Outcome(f"the driver has not answered for {self._deadline:g} s", self._asking)

    @property
    def _patience(self) -> float:
        """While it asks, silence is the driver's; between polls, it may take its time."""
        return self._deadline if self._asking is not None else self._interval + self._deadline

    async def _ended(self, process: trio.Process) -> Outcome:
        with trio.move_on_after(EXIT_TIMEOUT):
            await process.wait()
        if process.returncode == 0 and self._started and self._asking is None:
            return Outcome()  # it ends by itself only between polls; a library that exits does so when it is asked
        return Outcome(f"the driver's library took its process down ({_words(process.returncode)})", self._asking)


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    buffer = b""
    while data := await stream.receive_some(RECEIVE_BYTES):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield line


@asynccontextmanager
async def _running(orders: Orders, left_behind: list[trio.Process]) -> AsyncIterator[trio.Process]:
    """A process that follows the orders. At the end it is killed, and nobody waits for it."""
    command = [sys.executable, "-m", "sgpu.probe", encode_orders(orders)]
    # A session of its own, so that a terminal's Ctrl-C is ours alone to answer.
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        left_behind.append(process)
        with trio.move_on_after(EXIT_TIMEOUT) as scope:
            scope.shield = True
            if process.stdout:
                await process.stdout.aclose()


def _words(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
