"""End the process when its event loop is stuck: what nobody can do from inside a loop that no longer runs."""

from __future__ import annotations

import faulthandler
from typing import Final, NoReturn

import trio

#: Seconds without a turn of the event loop after which the process ends. While it is stuck, the kubelet waits in a call
#: without a deadline, and starts no pod of the node.
STUCK_AFTER: Final = 25.0
#: Seconds between two signs of life.
INTERVAL: Final = 5.0


async def exit_when_stuck(stuck_after: float = STUCK_AFTER, interval: float = INTERVAL) -> NoReturn:
    """Exit with code 1, and the stack of each thread on standard error, once the event loop is stuck for so long.

    Standard error is file descriptor 2. A thread of the interpreter's own does it, which needs no lock of Python's.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(stuck_after, exit=True, file=2)
            await trio.sleep(interval)
    finally:
        faulthandler.cancel_dump_traceback_later()
