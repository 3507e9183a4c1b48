"""Changes that are broadcast, races, and errors found in groups, on trio's virtual clock."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing
import virtual_clock

from sgpu.lib.concurrency import Broadcast, find_error, next_beat, race, wait_until

#: Fails at once what hangs.
virtual = partial(virtual_clock.virtual, seconds=60)


@virtual
async def test_a_beat() -> None:
    """Let loops that began at different times wake at the same ones, an interval apart."""
    times = []
    for late in (0, 1, 4.5):
        await trio.sleep(late)
        await trio.sleep_until(next_beat(5))
        times.append(trio.current_time())
    assert times == [5, 10, 15]


class TestBroadcast:
    @virtual
    async def test_a_change_wakes_every_waiter(self) -> None:
        """Wake all, those too that took the event before the change and wait only after it."""
        changed = Broadcast()
        late = changed.next
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(changed.next.wait)
            await trio.testing.wait_all_tasks_blocked()
            changed.notify()
        await late.wait()

    @virtual
    async def test_a_change_wakes_once(self) -> None:
        """Make whoever waits after a change wait for the next one."""
        changed = Broadcast()
        changed.notify()
        with trio.move_on_after(1) as scope:
            await changed.next.wait()
        assert scope.cancelled_caught


class TestWaitUntil:
    @pytest.mark.parametrize("changes", [0, 1, 3])
    @virtual
    async def test_it_checks_now_and_after_each_change(self, changes: int) -> None:
        """Return as soon as the condition holds, and check it no more often than something changed."""
        checks = 0

        def condition() -> bool:
            nonlocal checks
            checks += 1
            return checks > changes

        changed = Broadcast()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_until, condition, changed)
            for number in range(changes + 2):
                await trio.testing.wait_all_tasks_blocked()
                assert checks == min(number, changes) + 1
                changed.notify()

    @virtual
    async def test_a_change_during_the_check_is_not_missed(self) -> None:
        """Check again when something changes while the condition is being checked."""
        results = iter([False, True])
        changed = Broadcast()

        def condition() -> bool:
            changed.notify()
            return next(results)

        await wait_until(condition, changed)

    @virtual
    async def test_it_can_be_cancelled(self) -> None:
        """Let Cancelled through."""
        with trio.move_on_after(1) as scope:
            await wait_until(lambda: False, Broadcast())
        assert scope.cancelled_caught


class Runner:
    """A task that ends after some seconds, with a result or an error, and records how it ended."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}

    async def __call__(self, name: str, seconds: float, result: object = None) -> object:
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.ends[name] = "cancelled"
            raise
        self.ends[name] = "finished"
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def runner() -> Runner:
    """Tasks whose ends are recorded."""
    return Runner()


class TestRace:
    @pytest.mark.parametrize("result", ["a result", None])
    @pytest.mark.parametrize("order", [("fast", "slow", "never"), ("never", "slow", "fast"), ("fast",)], ids=str)
    @virtual
    async def test_the_first_to_finish_wins(self, runner: Runner, order: tuple[str, ...], result: object) -> None:
        """Return its result at once, whichever was named first, and cancel the others."""
        seconds = {"fast": 1.0, "slow": 2.0, "never": float("inf")}
        functions = [partial(runner, name, seconds[name], result if name == "fast" else "lost") for name in order]
        assert await race(*functions) == result
        assert trio.current_time() == pytest.approx(1)
        assert runner.ends == {name: "finished" if name == "fast" else "cancelled" for name in order}

    @virtual
    async def test_it_can_be_cancelled(self, runner: Runner) -> None:
        """Cancel all that run in it, and return nothing."""
        with trio.move_on_after(1) as scope:
            await race(partial(runner, "one", 2), partial(runner, "two", 3))
            pytest.fail("a race without a winner returned")
        assert scope.cancelled_caught
        assert runner.ends == {"one": "cancelled", "two": "cancelled"}

    @virtual
    async def test_an_error_ends_it(self, runner: Runner) -> None:
        """Raise the error in a group, and cancel the others."""
        error = OSError("broken")
        with pytest.raises(ExceptionGroup) as raised:
            await race(partial(runner, "bad", 1, error), partial(runner, "good", 2))
        assert raised.value.exceptions == (error,)
        assert runner.ends == {"bad": "finished", "good": "cancelled"}

    @virtual
    async def test_an_error_in_a_loser_s_clean_up(self) -> None:
        """Raise it rather than return the winner's result."""

        async def loser() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("broken")

        with pytest.raises(ExceptionGroup) as raised:
            await race(partial(trio.sleep, 1), loser)
        assert find_error(raised.value, OSError)


class TestFindError:
    FIRST = OSError("first")
    SECOND = FileNotFoundError("second")
    CAUSED = ValueError()
    CAUSED.__cause__ = FIRST

    @pytest.mark.parametrize(
        ("error", "found"),
        [
            *((FIRST, FIRST), (SECOND, SECOND), (ValueError(), None), (CAUSED, None)),
            pytest.param(
                ExceptionGroup("g", [ExceptionGroup("g", [ValueError(), ExceptionGroup("g", [SECOND])]), FIRST]),
                SECOND,
                id="the first of two, however deep",
            ),
            (ExceptionGroup("g", [ValueError(), KeyError()]), None),
            (BaseExceptionGroup("g", [KeyboardInterrupt(), FIRST]), FIRST),
        ],
    )
    def test_find(self, error: BaseException, found: OSError | None) -> None:
        """Return the first error of the kind, or None."""
        assert find_error(error, OSError) is found
