"""The driver's process, supervised: started, listened to, and replaced when it hangs, crashes or has had its time.

Knows processes and deadlines; not what a GPU is, nor what becomes of the messages (`monitor`).
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final

import attrs
import trio

from sgpu.logs import OnChange
from sgpu.monitor import Monitor
from sgpu.report import Asking, DriverEvent, Message, NotReady, Orders, Report, decode, encode_orders

logger = logging.getLogger(__name__)

#: Seconds between starts of a process that fails each time, growing.
FIRST_RESTART: Final = 0.1
LAST_RESTART: Final = 5.0
#: A GPU about which a call did not return is left alone for so many polls, so that the others are watched meanwhile;
#: twice as many for each process that is stuck in the kernel, so that there are never many.
SUSPECT_POLLS: Final = 6
#: Processes that are stuck in the kernel. If the driver hangs as a whole, one more would only be stuck too.
MOST_LEFT_BEHIND: Final = 4
#: Bytes taken off the pipe at a time.
RECEIVE_BYTES: Final = 64 * 1024
#: Seconds that a process may take to say its first word: it is not the driver's time yet.
START_TIMEOUT: Final = 10.0
#: Seconds that a process which closed its pipe may take to be gone.
EXIT_TIMEOUT: Final = 1.0


@attrs.frozen
class Outcome:
    """How a process ended. `about` is the GPU it was asking about (empty: the driver), `trouble` empty if planned."""

    trouble: str = ""
    about: str = ""


async def watch_driver(orders: Orders, monitor: Monitor, deadline: float) -> None:
    """Keep a process asking the driver, for ever, and hand what it says to the monitor.

    `deadline`: seconds after which a call of the driver counts as one that does not return. Raises what the monitor
    raises.
    """
    suspects: tuple[str, ...] = ()
    delay = FIRST_RESTART
    left_behind: list[trio.Process] = []
    trouble = OnChange(logger, logging.WARNING)
    while True:
        _reap(left_behind)
        suspect_delay = SUSPECT_POLLS * orders.interval * 2 ** len(left_behind)
        current = attrs.evolve(orders, suspects=suspects, suspect_delay=suspect_delay)
        listener = _Listener(monitor, orders.interval, deadline)
        try:
            async with _running(current, left_behind) as process:
                outcome = await listener.listen(process)
        except OSError as error:  # for want of processes or memory
            outcome = Outcome(f"the driver's process can't be started: {error}")
        suspects = tuple(uuid for uuid in suspects if uuid not in listener.answered)
        if not outcome.trouble:
            continue
        if listener.answered:
            trouble.clear()
        trouble.report(f"{outcome.trouble}; starting it again")
        monitor.unanswered(outcome.about, outcome.trouble)
        if outcome.about:
            suspects = tuple(dict.fromkeys((*suspects, outcome.about)))
        delay = FIRST_RESTART if listener.answered else min(2 * delay, LAST_RESTART)
        await trio.sleep(delay)
        while len(left_behind) >= MOST_LEFT_BEHIND and not outcome.about:
            await trio.sleep(LAST_RESTART)
            _reap(left_behind)


class _Listener:
    """Follows one process. `answered` has the GPUs that it got answers about."""

    def __init__(self, monitor: Monitor, interval: float, deadline: float) -> None:
        self._monitor = monitor
        self._interval = interval
        self._deadline = deadline
        self._started = False
        self._asking: Asking | None = None
        self.answered: set[str] = set()

    async def listen(self, process: trio.Process) -> Outcome:
        """Until the process ends or is silent for too long."""
        assert process.stdout is not None
        async with aclosing(_lines(process.stdout)) as lines:
            while True:
                # While it asks, silence is the driver's; between polls, it may take its time.
                patience = self._deadline if self._asking else self._interval + self._deadline
                if not self._started:
                    patience = max(patience, START_TIMEOUT)
                with trio.move_on_after(patience):
                    line = await anext(lines, None)
                    if line is None:
                        return await self._ended(process)
                    try:
                        message = decode(line)
                    except ValueError as error:
                        return Outcome(str(error), self._about)
                    self._take(message)
                    continue
                return Outcome(f"the driver has not answered for {self._deadline:g} s", self._about)

    @property
    def _about(self) -> str:
        return self._asking.uuid if self._asking else ""

    def _take(self, message: Message) -> None:
        self._started = True
        self._asking = message if isinstance(message, Asking) else None
        if isinstance(message, Report):
            self.answered.update(gpu.uuid for gpu in message.gpus)
            self._monitor.report(message)
        elif isinstance(message, NotReady):
            self._monitor.not_ready(message)
        elif isinstance(message, DriverEvent):
            self._monitor.event(message)

    async def _ended(self, process: trio.Process) -> Outcome:
        with trio.move_on_after(EXIT_TIMEOUT):
            await process.wait()
        if process.returncode == 0 and self._started and not self._asking:
            return Outcome()  # it ends by itself only between polls; a library that exits does so when it is asked
        return Outcome(f"the driver's library took its process down ({_words(process.returncode)})", self._about)


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    buffer = b""
    while data := await stream.receive_some(RECEIVE_BYTES):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield line


@asynccontextmanager
async def _running(orders: Orders, left_behind: list[trio.Process]) -> AsyncIterator[trio.Process]:
    """A process that follows the orders. At the end it is killed, and nobody waits for it.

    One that is stuck in the kernel does not even die. It is kept in `left_behind` until it has.
    """
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


def _reap(left_behind: list[trio.Process]) -> None:
    """Forget those that have died; asking is what takes them off the process table."""
    left_behind[:] = [process for process in left_behind if process.returncode is None]


def _words(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
