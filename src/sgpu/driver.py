"""The driver's process, supervised: replaced when it hangs, crashes or has had its time; and GPUs tried out apart.

A GPU whose calls do not return is left alone by the process that watches the others, and asked by a process of its own
(a trial) until one returns. Knows processes and reports; not what becomes of them (`monitor`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import attrs
import trio

from sgpu.logs import OnChange
from sgpu.monitor import Monitor
from sgpu.probing import EXIT_TIMEOUT, START_TIMEOUT, Outcome, run_probe
from sgpu.report import DriverEvent, Failure, Message, NotReady, Orders, Report

logger = logging.getLogger(__name__)

#: Seconds between starts of a process that fails each time, growing.
FIRST_RESTART: Final = 0.1
LAST_RESTART: Final = 5.0
#: Processes that are stuck in the kernel. If the driver hangs as a whole, one more would only be stuck too.
MOST_LEFT_BEHIND: Final = 4
#: Trials at the same time, stuck ones among them: each takes some 11 MB.
MOST_TRIALS: Final = 4


async def watch_driver(
    orders: Orders, monitor: Monitor, deadline: float, expect: Callable[[float], None] = lambda seconds: None
) -> None:
    """Keep a process asking the driver, for ever, and hand what it says to the monitor.

    `deadline`: seconds after which a call of the driver counts as one that does not return. `expect` is told, each
    time, within how many seconds it is told again. Raises, in a group, what the monitor raises.
    """
    async with trio.open_nursery() as nursery:
        watch = _Watch(orders, monitor, deadline, expect, nursery)
        nursery.start_soon(watch.look_again)
        await watch.keep_asking()


class _Watch:
    """What is known from one process to the next."""

    def __init__(
        self,
        orders: Orders,
        monitor: Monitor,
        deadline: float,
        expect: Callable[[float], None],
        nursery: trio.Nursery,
    ) -> None:
        self._orders = orders
        self._monitor = monitor
        self._deadline = deadline
        self._expect = expect
        # Between two messages, or the last one and the start of another process.
        self._longest = max(START_TIMEOUT, orders.interval + deadline) + EXIT_TIMEOUT + LAST_RESTART
        self._nursery = nursery
        self._suspects: dict[str, None] = {}  # in the order in which they were found
        self._known: tuple[str, ...] = ()
        self._troubles: frozenset[object] = frozenset()
        self._answered = False
        self._asking = trio.CancelScope()  # around the process that watches; cancelled, another follows at once
        self._trials = trio.Semaphore(MOST_TRIALS)

    async def keep_asking(self) -> None:
        """One process after the other, for ever."""
        delay = FIRST_RESTART
        left_behind: list[trio.Process] = []
        trouble = OnChange(logger, logging.WARNING)
        while True:
            self._expect(self._longest)
            _reap(left_behind)
            self._answered = False
            outcome = Outcome()
            with trio.CancelScope() as self._asking:
                outcome = await run_probe(self._current(), self._deadline, left_behind, self._take)
            if not outcome.trouble:
                continue
            if self._answered:
                trouble.clear()
            trouble.report(f"{outcome.trouble}; starting it again")
            self._give_up(outcome)
            delay = FIRST_RESTART if self._answered else min(2 * delay, LAST_RESTART)
            await trio.sleep(delay)
            while len(left_behind) >= MOST_LEFT_BEHIND and not outcome.asking:
                self._expect(2 * LAST_RESTART)
                await trio.sleep(LAST_RESTART)
                _reap(left_behind)

    async def look_again(self) -> None:
        """While a GPU is in trouble: does it answer to whoever opens the library anew, as one that was reset does?

        The process that watches does not find out by itself, because it would miss events of the others.
        """
        while True:
            await trio.sleep(self._orders.interval)
            if not self._troubles:
                continue
            seen: list[Message] = []
            asking = self._asking
            await self._try(self._current(), seen)
            reports = [message for message in seen if isinstance(message, Report)]
            if reports and _troubles(reports[-1]) != self._troubles:
                asking.cancel()  # if it is still that one

    async def _try_suspect(self, uuid: str) -> None:
        """Until a call about this GPU returns: then it is watched again like the others."""
        outcome = Outcome("not tried yet")
        while outcome.trouble:
            await trio.sleep(self._orders.interval)
            others = tuple(other for other in self._known if other != uuid)
            outcome = await self._try(attrs.evolve(self._current(), suspects=others), [])
        del self._suspects[uuid]
        self._asking.cancel()

    async def _try(self, orders: Orders, seen: list[Message]) -> Outcome:
        """One more process, which asks once."""
        async with self._trials:
            ended: list[trio.Process] = []
            outcome = await run_probe(
                attrs.evolve(orders, once=True, look_only=True), self._deadline, ended, seen.append
            )
            for message in seen:
                if isinstance(message, Failure):
                    self._monitor.failed(message)
            for process in ended:
                await process.wait()  # as long as it is stuck in the kernel, another would be too
            return outcome

    def _current(self) -> Orders:
        return attrs.evolve(self._orders, suspects=tuple(self._suspects), known=self._known)

    def _give_up(self, outcome: Outcome) -> None:
        if outcome.asking is None and self._answered:
            return  # it came to grief between two polls: what the last one said may well still hold
        self._monitor.unanswered(outcome.asking or "", outcome.trouble)
        if outcome.asking and outcome.asking not in self._suspects:
            self._suspects[outcome.asking] = None
            self._nursery.start_soon(self._try_suspect, outcome.asking)

    def _take(self, message: Message) -> None:
        self._expect(self._longest)
        if isinstance(message, Report):
            self._answered = True
            self._known, self._troubles = message.order, _troubles(message)
            self._monitor.report(message)
        elif isinstance(message, NotReady):
            self._monitor.not_ready(message)
        elif isinstance(message, DriverEvent):
            self._monitor.event(message)
        elif isinstance(message, Failure):
            self._monitor.failed(message)


def _troubles(report: Report) -> frozenset[object]:
    return frozenset((*report.problems, *((gpu.uuid, gpu.error) for gpu in report.gpus if gpu.error)))


def _reap(left_behind: list[trio.Process]) -> None:
    """Forget those that have died; asking is what takes them off the process table."""
    left_behind[:] = [process for process in left_behind if process.returncode is None]
