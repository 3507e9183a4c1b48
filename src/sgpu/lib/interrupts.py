"""Wait for SIGINT and SIGTERM in a program without an event loop. Not on Windows."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

INTERRUPTS: Final = frozenset({signal.SIGINT, signal.SIGTERM})


@contextmanager
def interrupts_held() -> Iterator[Callable[[float], signal.Signals | None]]:
    """Hold these signals back, except while the function that is yielded waits.

    It takes the longest time to wait, in seconds, and returns the signal that came by then, if one did. `time.sleep`
    would go on after a signal that comes just before it: its handler runs only when the sleep is over.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield _wait
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(seconds: float) -> signal.Signals | None:
    received = signal.sigtimedwait(INTERRUPTS, seconds)
    return signal.Signals(received.si_signo) if received else None
