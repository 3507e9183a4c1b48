"""Keeps the driver's process running: a worker that hangs, crashes or has had its time is replaced.

A GPU whose calls do not return is left alone by the worker and tried by a process of its own until a call returns.
Knows processes and messages; not what becomes of them (`monitor`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import attrs
import trio

from sgpu.driver.messages import (
    DriverEvent,
    Failure,
    LimitReport,
    Message,
    NotReady,
    ReleasedGpu,
    Report,
    WorkerConfig,
)
from sgpu.driver.monitor import Monitor
from sgpu.driver.process import EXIT_TIMEOUT, START_TIMEOUT, Feed, Outcome, Worker, no_input, run_worker
from sgpu.lib.concurrency import Broadcast
from sgpu.lib.logs import OnChange

logger = logging.getLogger(__name__)

#: Seconds between starts of a worker that fails each time, growing.
FIRST_RESTART: Final = 0.1
LAST_RESTART: Final = 5.0
#: Seconds that a killed process gets to die: it takes milliseconds, unless it is stuck in the kernel.
KILL_TIMEOUT: Final = 0.2
#: Processes that are stuck in the kernel. If the driver hangs as a whole, one more would only be stuck too.
MOST_LEFT_BEHIND: Final = 4
#: Single polls at the same time, stuck ones among them: each process takes some 11 MB.
MOST_TRIALS: Final = 4


async def supervise(
    config: WorkerConfig,
    monitor: Monitor,
    deadline: float,
    expect: Callable[[float], None] = lambda seconds: None,
    feed: Feed = no_input,
    to_release: Callable[[], tuple[ReleasedGpu, ...]] = lambda: (),
    changed: Broadcast | None = None,
    first: Worker | None = None,
) -> None:
    """Keep a worker running, and hand its messages to the monitor. `first`: one that was started already.

    `deadline`: seconds after which a call of the driver counts as one that does not return. `expect` is called each
    time with the seconds until it is called again at the latest. `feed` writes to the worker. `to_release` returns the
    GPUs to leave alone, and `changed` says when it may return others. Raises, in a group, what the monitor raises.
    """
    async with trio.open_nursery() as nursery:
        supervisor = _Supervisor(config, monitor, deadline, expect, feed, to_release, nursery)
        nursery.start_soon(supervisor.retry_faulty)
        nursery.start_soon(supervisor.follow_releases, changed or Broadcast())
        await supervisor.keep_running(first)


class _Supervisor:
    """State that is kept from one worker to the next."""

    def __init__(
        self,
        config: WorkerConfig,
        monitor: Monitor,
        deadline: float,
        expect: Callable[[float], None],
        feed: Feed,
        to_release: Callable[[], tuple[ReleasedGpu, ...]],
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._monitor = monitor
        self._deadline = deadline
        self._expect = expect
        self._feed = feed
        self._to_release = to_release
        self._released = to_release()
        # Between two messages, or between the last one and the start of another worker.
        self._longest_silence = max(START_TIMEOUT, config.interval + deadline) + EXIT_TIMEOUT + LAST_RESTART
        self._nursery = nursery
        self._suspects: dict[str, None] = {}  # in the order in which they were found
        self._known: tuple[str, ...] = ()
        self._problems: frozenset[object] = frozenset()
        self._faulty = trio.Event()  # set once there are problems
        self._answered = False
        self._running = trio.CancelScope()  # around the worker; when cancelled, another follows at once
        self._trials = trio.Semaphore(MOST_TRIALS)
        #: Workers of before that have not died.
        self._left_behind: list[trio.Process] = []
        self._trying: list[WorkerConfig] = []  # of the single polls, until their processes have died

    async def keep_running(self, started: Worker | None) -> None:
        """Run one worker after the other."""
        delay = FIRST_RESTART
        left_behind = self._left_behind
        problem = OnChange(logger, logging.WARNING)
        while True:
            self._expect(self._longest_silence)
            _reap(left_behind)
            self._answered = False
            outcome = Outcome()
            with trio.CancelScope() as self._running:
                outcome = await run_worker(
                    self._current(), self._deadline, left_behind, self._handle, self._feed, self._going_on, started
                )
            started = None
            if not outcome.problem:
                await _wait_for_last(left_behind)  # the others die while the next one is delayed
                continue
            if self._answered:
                problem.clear()
            problem.report(f"{outcome.problem}; starting it again")
            self._give_up(outcome)
            delay = FIRST_RESTART if self._answered else min(2 * delay, LAST_RESTART)
            await trio.sleep(delay)
            while len(left_behind) >= MOST_LEFT_BEHIND and not outcome.in_call:
                self._expect(2 * LAST_RESTART)
                await trio.sleep(LAST_RESTART)
                _reap(left_behind)

    async def follow_releases(self, changed: Broadcast) -> None:
        """Start another worker whenever other GPUs are to be left alone: only its end closes what a process opened."""
        while True:
            change = changed.next
            if (released := self._to_release()) != self._released:
                self._released, self._known = released, ()  # their places change
                self._monitor.replaced()
                self._running.cancel()
            await change.wait()

    async def retry_faulty(self) -> None:
        """While a GPU fails to answer, check whether it answers a new process, as one that was reset does.

        The worker does not find out by itself: it would have to reopen the library and miss events of the others.
        """
        while True:
            await self._faulty.wait()
            await trio.sleep(self._config.interval)
            if not self._problems:
                self._faulty = trio.Event()
                continue
            messages: list[Message] = []
            running, problems = self._running, self._problems
            await self._try(self._current(), messages)
            reports = [message for message in messages if isinstance(message, Report)]
            # If it is still that one, and has not found out by itself after all.
            if reports and self._problems == problems != _problems(reports[-1]):
                running.cancel()

    async def _try_suspect(self, uuid: str) -> None:
        """Try until a call about this GPU returns: then the worker takes it back."""
        outcome = Outcome("not tried yet")
        while outcome.problem:
            await trio.sleep(self._config.interval)
            others = tuple(other for other in self._known if other != uuid)
            outcome = await self._try(attrs.evolve(self._current(), suspects=others), [])
        del self._suspects[uuid]
        self._running.cancel()

    async def _try(self, config: WorkerConfig, messages: list[Message]) -> Outcome:
        """Run one more worker, for a single poll."""
        async with self._trials:
            ended: list[trio.Process] = []
            once = attrs.evolve(config, once=True, look_only=True)
            self._trying.append(once)
            outcome = await run_worker(once, self._deadline, ended, messages.append)
            for message in messages:
                if isinstance(message, Failure):
                    self._monitor.call_failed(message)
            for process in ended:
                await process.wait()  # as long as it is stuck in the kernel, another would be too
            self._trying.remove(once)
            return outcome

    def _current(self) -> WorkerConfig:
        return attrs.evolve(self._config, suspects=tuple(self._suspects), known=self._known, released=self._released)

    def _give_up(self, outcome: Outcome) -> None:
        if outcome.in_call is None and self._answered:
            return  # it ended between two polls: what the last one said may well still hold
        self._monitor.unanswered(outcome.in_call or "", outcome.problem)
        if outcome.in_call and outcome.in_call not in self._suspects:
            self._suspects[outcome.in_call] = None
            self._nursery.start_soon(self._try_suspect, outcome.in_call)

    def _going_on(self) -> None:
        self._expect(self._longest_silence)

    def _handle(self, message: Message) -> None:
        self._going_on()
        if isinstance(message, Report):
            self._answered = True
            self._known, self._problems = message.order, _problems(message)
            if self._problems:
                self._faulty.set()
            self._monitor.report(self._with_others(message))
        elif isinstance(message, NotReady):
            self._monitor.not_ready(message)
        elif isinstance(message, DriverEvent):
            self._monitor.event(message)
        elif isinstance(message, Failure):
            self._monitor.call_failed(message)
        elif isinstance(message, LimitReport):
            self._monitor.limits(message)

    def _with_others(self, report: Report) -> Report:
        """Return the report; where GPUs were released, with the processes from before that may have them open."""
        _reap(self._left_behind)
        older = any(config.released != self._released for config in self._trying)
        if not report.released or report.held or not (older or self._left_behind):
            return report
        return attrs.evolve(
            report, held="a process of sgpu hangs in a call of the driver and may have it open; if that lasts, reboot"
        )


def _problems(report: Report) -> frozenset[object]:
    return frozenset((*report.problems, *((gpu.uuid, gpu.error) for gpu in report.gpus if gpu.error)))


async def _wait_for_last(left_behind: list[trio.Process]) -> None:
    """Wait for the process that was just killed: else it stays a zombie until the next one ends."""
    with trio.move_on_after(KILL_TIMEOUT):
        for process in left_behind[-1:]:
            await process.wait()


def _reap(left_behind: list[trio.Process]) -> None:
    """Forget those that have died; to ask for the return code takes them off the process table."""
    left_behind[:] = [process for process in left_behind if process.returncode is None]
