"""What nurseries leave to be done by hand: the first of several results, and one error out of a group."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

Result = TypeVar("Result")
Error = TypeVar("Error", bound=BaseException)


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
    """The first error of that kind in an exception group, however deep, or the error itself if it is one."""
    if isinstance(error, kind):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := find_error(inner, kind))), None)
    return None
