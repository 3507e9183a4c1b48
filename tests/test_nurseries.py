"""The first of several results, and one error out of a group; on trio's virtual clock."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from sgpu.nurseries import find_error, race

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test's tasks on a clock that does not wait, and starts at 0."""
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class Runner:
    """A task that ends after some seconds, with a result or an error, and says what became of it."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}

    async def __call__(self, name: str, seconds: float, error: Exception | None = None) -> str:
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.ends[name] = "cancelled"
            raise
        self.ends[name] = "finished"
        if error:
            raise error
        return name


@pytest.fixture
def runner() -> Runner:
    """Tasks whose ends are remembered."""
    return Runner()


class TestRace:
    @pytest.mark.parametrize("order", [("fast", "slow", "never"), ("never", "slow", "fast")])
    def test_first_wins(self, runner: Runner, order: tuple[str, ...]) -> None:
        """The first to finish, not the first named, gives the result, at once, and the others are cancelled."""
        seconds = {"fast": 1.0, "slow": 2.0, "never": float("inf")}

        async def main() -> None:
            assert await race(*(partial(runner, name, seconds[name]) for name in order)) == "fast"
            assert trio.current_time() == pytest.approx(1)

        run(main)
        assert runner.ends == {"fast": "finished", "slow": "cancelled", "never": "cancelled"}

    def test_one(self, runner: Runner) -> None:
        """A race of one is that one's result."""

        async def main() -> None:
            assert await race(partial(runner, "alone", 1)) == "alone"

        run(main)

    def test_without_waiting(self) -> None:
        """Some that finish without ever waiting: one of their results comes out."""

        async def at_once(number: int) -> int:
            return number

        async def main() -> None:
            assert await race(partial(at_once, 1), partial(at_once, 2)) in (1, 2)

        run(main)

    def test_none_is_a_result(self) -> None:
        """A function that returns nothing wins like any other."""

        async def main() -> None:
            functions: list[Callable[[], Awaitable[object]]] = [partial(trio.sleep, 1), trio.sleep_forever]
            assert await race(*functions) is None
            assert trio.current_time() == pytest.approx(1)

        run(main)

    def test_losers_clean_up(self) -> None:
        """The race is over only when the losers have cleaned up."""
        events: list[str] = []

        async def loser() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(5)
                    events.append("cleaned up")

        async def main() -> None:
            await race(partial(trio.sleep, 1), loser)
            events.append("over")

        run(main)
        assert events == ["cleaned up", "over"]

    def test_cancelled_from_outside(self, runner: Runner) -> None:
        """A race that is cancelled has no result, and cancels all that run in it."""

        async def main() -> None:
            with trio.move_on_after(1) as scope:
                await race(partial(runner, "one", 2), partial(runner, "two", 3))
                pytest.fail("a race without a winner returned")
            assert scope.cancelled_caught

        run(main)
        assert runner.ends == {"one": "cancelled", "two": "cancelled"}

    def test_error(self, runner: Runner) -> None:
        """An error of one ends the race: it comes in a group, and the others are cancelled."""
        error = OSError("broken")

        async def main() -> None:
            with pytest.raises(ExceptionGroup) as raised:
                await race(partial(runner, "bad", 1, error), partial(runner, "good", 2))
            assert raised.value.exceptions == (error,)

        run(main)
        assert runner.ends == {"bad": "finished", "good": "cancelled"}

    def test_error_of_a_loser(self) -> None:
        """An error in a loser's cleaning up is not lost to the winner's result."""

        async def loser() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("broken")

        async def main() -> None:
            with pytest.raises(ExceptionGroup) as raised:
                await race(partial(trio.sleep, 1), loser)
            assert find_error(raised.value, OSError)

        run(main)

    def test_nested(self, runner: Runner) -> None:
        """A race can run in a race: the winner inside does not end the one outside before its time."""

        async def inner() -> str:
            won = await race(partial(runner, "a", 1), partial(runner, "b", 2))
            await trio.sleep(1)
            return f"inner {won}"

        async def main() -> None:
            assert await race(inner, partial(runner, "c", 3)) == "inner a"

        run(main)
        assert runner.ends == {"a": "finished", "b": "cancelled", "c": "cancelled"}


class TestFindError:
    FIRST = OSError("first")
    SECOND = FileNotFoundError("second")

    @pytest.mark.parametrize(
        ("error", "found"),
        [
            pytest.param(FIRST, FIRST, id="itself"),
            pytest.param(SECOND, SECOND, id="a subclass"),
            pytest.param(ValueError(), None, id="another"),
            pytest.param(ExceptionGroup("g", [ValueError(), FIRST]), FIRST, id="in a group"),
            pytest.param(ExceptionGroup("g", [FIRST, SECOND]), FIRST, id="the first of two"),
            pytest.param(
                ExceptionGroup("g", [ExceptionGroup("g", [ValueError(), ExceptionGroup("g", [SECOND])]), FIRST]),
                SECOND,
                id="the first of two, however deep",
            ),
            pytest.param(ExceptionGroup("g", [ValueError(), KeyError()]), None, id="a group of others"),
            pytest.param(
                BaseExceptionGroup("g", [KeyboardInterrupt(), FIRST]), FIRST, id="beside what is no Exception"
            ),
        ],
    )
    def test_find(self, error: BaseException, found: OSError | None) -> None:
        """The first error of the kind, however deep; None when there is none."""
        assert find_error(error, OSError) is found

    def test_cause_does_not_count(self) -> None:
        """What an error was raised from is not what was raised."""
        error = ValueError()
        error.__cause__ = self.FIRST
        assert find_error(error, OSError) is None

    def test_group_itself(self) -> None:
        """A group can be what is looked for."""
        group = ExceptionGroup("g", [ValueError()])
        assert find_error(group, ExceptionGroup) is group
