"""Helpers that trio lacks: wake all who wait for a change, take the first result, find an error in a group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

Result = TypeVar("Result")
Error = TypeVar("Error", bound=BaseException)


class Broadcast:
    """Wakes every task that waits for a change.

    Take `next` before you read what may change, then await it: no change is missed, and each reader sees the latest. A
    memory channel would not do: its receivers compete for each value.
    """

    def __init__(self) -> None:
        #: Set at the next change, and replaced by a new event then.
        self.next = trio.Event()

    def notify(self) -> None:
        """Wake all who wait."""
        self.next.set()
        self.next = trio.Event()


async def wait_until(condition: Callable[[], bool], changed: Broadcast) -> None:
    """Return once `condition` holds. It is checked now and after each change, and must not block."""
    while True:
        change = changed.next
        if condition():
            return
        await change.wait()


def next_beat(interval: float) -> float:
    """Return the next time that is a multiple of `interval`: loops that go by it wake the process once for all."""
    return (trio.current_time() // interval + 1) * interval


async def race(*functions: Callable[[], Awaitable[Result]]) -> Result:
    """Run all at once, return what the first to finish returns, and cancel the others. Errors come in a group."""
    results: list[Result] = []

    async def run(function: Callable[[], Awaitable[Result]]) -> None:
        results.append(await function())
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(run, function)
    return results[0]


def find_error(error: BaseException, kind: type[Error]) -> Error | None:
    """Return the first error of that kind in an exception group, however deep, or the error itself if it is one."""
    if isinstance(error, kind):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := find_error(inner, kind))), None)
    return None
