"""Run what blocks in a thread; where no thread can be started, in the event loop. Trio only."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import trio

from sgpu.lib.limits import PROCESSES

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: All that Python says where the kernel refuses a thread, for want of processes or of memory.
REFUSED: Final = "can't start new thread"
_refused: Final = trio.lowlevel.RunVar("whether the last thread was refused", False)


class ThreadRefusedError(OSError):
    """The kernel refuses a thread. Its number is the one with which it refuses a process."""


@contextmanager
def refusals() -> Iterator[None]:
    """Raise ThreadRefusedError where Python raises an error without a number."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != REFUSED:
            raise
        raise ThreadRefusedError(errno.EAGAIN, REFUSED) from error


async def run_in_thread(function: Callable[..., Result], *args: object, abandon_on_cancel: bool = False) -> Result:
    """Run a function that blocks for as long as files do, as `trio.to_thread.run_sync` does.

    Where no thread can be started, the event loop runs it, and waits for it: late is better than not at all.
    """
    try:
        with refusals():
            result = await trio.to_thread.run_sync(function, *args, abandon_on_cancel=abandon_on_cancel)
    except ThreadRefusedError:
        pass
    else:
        _refused.set(False)
        return result
    if not _refused.get():
        logger.warning("cannot start a thread, so that the kubelet's calls may have to wait: %s", PROCESSES)
    _refused.set(True)
    return function(*args)
