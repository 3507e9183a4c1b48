"""Notices what is stuck: a loop of the daemon, which the liveness probe reports, or the event loop, which ends it."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import trio

from sgpu.lib.concurrency import next_beat

#: Seconds without a turn of the event loop after which the process ends. While it is stuck, the kubelet waits in a call
#: without a deadline, and starts no pod of the node.
STUCK_AFTER: Final = 25.0
#: Seconds between two signs of life.
INTERVAL: Final = 5.0
#: Seconds by which a loop may be later than it said. A node can be busy, and a pod whose probe fails is killed.
GRACE: Final = 60.0


async def exit_when_stuck(
    stuck_after: float = STUCK_AFTER, interval: float = INTERVAL, *, alive: Callable[[], object] = lambda: None
) -> NoReturn:
    """End by SIGALRM, with the stack of each thread on standard error, once the event loop is stuck for so long.

    `alive` is called now and then as long as it is not. Standard error is file descriptor 2. The handler is the
    interpreter's own, which needs no lock of Python's; its `dump_traceback_later` would start a thread each time.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, file=2, chain=True)  # and then what the signal does by default
    try:
        while True:
            alive()
            signal.setitimer(signal.ITIMER_REAL, stuck_after)
            await trio.sleep_until(next_beat(interval))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Watchdog:
    """Notices loops that got stuck in one of their waits: each says when it will be heard of again."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._deadlines: dict[str, float] = {}

    def arm(self, loop: str, seconds: float) -> None:
        """Expect this loop to arm or disarm again within so many seconds."""
        self._deadlines[loop] = self._clock() + seconds + GRACE

    def disarm(self, loop: str) -> None:
        """Expect nothing of this loop: it waits for something that may never come."""
        self._deadlines.pop(loop, None)

    def expired(self) -> Mapping[str, float]:
        """Return the loops that are stuck, and for how many seconds longer than they said."""
        now = self._clock()
        return {loop: now - deadline + GRACE for loop, deadline in self._deadlines.items() if deadline < now}
