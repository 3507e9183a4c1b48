"""Asynchronous tests, on a clock that jumps or on the real one."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

Test = Callable[..., Awaitable[None]]


def virtual(test: Test, *, seconds: float = math.inf, threshold: float = 0.0) -> Callable[..., None]:
    """Run an asynchronous test on a clock that jumps to what is waited for next, and for so many seconds at most.

    A bound fails at once what hangs; without one, threads can be waited for. `threshold`: real seconds for the kernel.
    """
    return _on(test, seconds, lambda: trio.testing.MockClock(autojump_threshold=threshold))


def real(test: Test, *, seconds: float = 120.0) -> Callable[..., None]:
    """Run an asynchronous test on the real clock, for so many seconds at most."""
    return _on(test, seconds, lambda: None)


async def until(condition: Callable[[], object], *, seconds: float = 30.0) -> None:
    """Wait, in real time, for what no event tells of; on any clock."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await trio.to_thread.run_sync(time.sleep, 0.002)


@asynccontextmanager
async def beside(run: Callable[..., Awaitable[object]], *arguments: object) -> AsyncIterator[None]:
    """Run this meanwhile, and cancel it at the end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, *arguments)
        yield
        nursery.cancel_scope.cancel()


def _on(test: Test, seconds: float, clock: Callable[[], trio.abc.Clock | None]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        async def bounded() -> None:
            with trio.fail_after(seconds):
                await test(*args, **kwargs)

        trio.run(bounded, clock=clock())

    return run
