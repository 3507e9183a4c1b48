"""Accepting connections where the kernel may refuse one."""

from __future__ import annotations

import errno
import logging

import pytest
import trio
import trio.testing

from sgpu.lib.limits import CONNECTIONS
from sgpu.lib.listeners import serve


class Listener:
    """Gives each of these connections, or raises each of these errors, then nothing more."""

    def __init__(self, *outcomes: int | str) -> None:
        self._outcomes = list(outcomes)
        self.closed = False

    async def accept(self) -> str:
        if not self._outcomes:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, int):
            raise OSError(outcome, "refused")
        return outcome

    async def aclose(self) -> None:
        self.closed = True

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def served(*outcomes: int | str) -> list[str]:
    handled: list[str] = []

    async def handler(connection: object) -> None:
        handled.append(str(connection))

    async def main() -> None:
        listener = Listener(*outcomes)
        with trio.move_on_after(10):
            await serve([listener], handler)  # type: ignore[list-item]
        assert listener.closed

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return handled


@pytest.mark.parametrize("number", CONNECTIONS)
def test_out_of_something(number: int, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, however often it happens, and once more when it is over; nothing is lost."""
    caplog.set_level(logging.WARNING)
    assert served("a", *[number] * 50, "b", number, "c") == ["a", "b", "c"]
    assert len(caplog.messages) == 4


def test_another_error() -> None:
    """A listener that is broken is no want of anything."""
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="refused")):
        served(errno.EBADF)
