"""Asynchronous tests on a clock that jumps."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing


def virtual(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test on a clock that jumps to what is waited for next."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        trio.run(functools.partial(test, *args, **kwargs), clock=trio.testing.MockClock(autojump_threshold=0))

    return run
