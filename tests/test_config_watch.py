"""Settings that change while the daemon runs: what is noticed, what takes effect, and what is logged."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from rewriting import WAYS, config_map
from virtual_clock import beside, until, virtual

from sgpu.config import watch
from sgpu.config.load import Loaded, load
from sgpu.config.watch import watch_settings
from sgpu.node.policy import OffersRefusedError, Policy

#: Seconds after which something that is due is taken not to come.
TIMEOUT = 30
#: From here on, the node refuses to offer as many.
TOO_MANY = 1000


def factor(shares: int) -> str:
    return f"gpu-duplication-factor: {shares}\n"


class World:
    """A file for the settings, a node that takes their policy, and what was logged."""

    def __init__(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.file = directory / "config.yaml"
        self.file.write_text(factor(1))
        self.reads: list[int] = []  # the shares that were read each time, but for the start of the daemon
        self.reloaded: list[bool] = []
        self.policies: list[Policy] = []  # the applied ones
        self._caplog = caplog

    def move_to_directory(self) -> None:
        self.file = self.file.parent / "etc" / "config.yaml"
        self.file.parent.mkdir()
        self.file.write_text(factor(1))

    def load(self) -> Loaded:
        return load({"config": str(self.file)} if self.file.name else {}, {})

    def reload(self) -> Loaded:
        loaded = self.load()
        self.reads.append(loaded.policy.shares)
        return loaded

    def apply(self, policy: Policy) -> str:
        if policy.shares >= TOO_MANY:
            raise OffersRefusedError(f"{policy.shares} shares are too many")
        self.policies.append(policy)
        return f"offers of {policy.shares}"

    @asynccontextmanager
    async def watching(
        self, loaded: Loaded | None = None, reload: Callable[[], Loaded] | None = None
    ) -> AsyncIterator[None]:
        """Settings that were loaded already are watched. When this is entered, they were read once more."""
        loaded = loaded or self.load()
        async with beside(watch_settings, loaded, reload or self.reload, self.apply, self.reloaded.append):
            if reload is None:
                await until(lambda: self.policies)
            await trio.testing.wait_all_tasks_blocked()
            yield

    async def applied(self, shares: int) -> None:
        """Wait until each GPU is offered as so many."""
        await until(lambda: self.policies[-1].shares == shares)
        await trio.testing.wait_all_tasks_blocked()

    def logged(self, level: int) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.levelno == level]


@pytest.fixture
def world(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> World:
    caplog.set_level(logging.DEBUG, "sgpu")
    return World(tmp_path, caplog)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


class TestNoticed:
    @pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__.replace("_", " "))
    @virtual
    async def test_a_file_that_changes(self, world: World, write: Callable[[Path, str], None]) -> None:
        """However it is written, time after time. Each read is counted, the one at the start is not."""
        write(world.file, factor(1))
        async with world.watching():
            assert world.reloaded == []
            for shares in (2, 3, 4):
                write(world.file, factor(shares))
                await world.applied(shares)
        assert len(world.reloaded) >= 3  # a file that is written bit by bit can be read in between
        assert set(world.reloaded) == {True}
        assert world.logged(logging.ERROR) == []

    @virtual
    async def test_through_the_link_that_is_swapped(self, world: World) -> None:
        """Also when the setting names the file by way of a ConfigMap's `..data`."""
        visible = world.file
        config_map(visible, factor(1))
        world.file = visible.parent / "..data" / visible.name
        async with world.watching():
            for shares in (2, 3):
                config_map(visible, factor(shares))
                await world.applied(shares)

    @virtual
    async def test_between_start_and_watch(self, world: World) -> None:
        """A change while the process was starting, after it had read the file."""
        loaded = world.load()
        world.file.write_text(factor(2))
        async with world.watching(loaded):
            assert world.policies[-1].shares == 2

    @pytest.mark.parametrize("file", [True, False], ids=["with a file", "without one"])
    @virtual
    async def test_a_hang_up(self, world: World, file: bool) -> None:
        """SIGHUP has the settings read again, though nothing else tells of a change."""
        if not file:
            world.file = Path()
        async with world.watching():
            for count in (1, 2):
                hang_up()
                await until(lambda count=count: len(world.reloaded) == count)  # type: ignore[misc]
                await trio.testing.wait_all_tasks_blocked()
        assert world.logged(logging.INFO) == world.logged(logging.WARNING) == []

    @pytest.mark.parametrize("change", ["hang-up", "file"])
    @virtual
    async def test_a_change_while_it_is_read(self, world: World, change: str) -> None:
        """It is one more: neither is lost while the settings are being read."""
        reading, go_on = threading.Event(), threading.Event()

        def reload() -> Loaded:
            loaded = world.reload()
            reading.set()
            go_on.wait(TIMEOUT)
            return loaded

        async with world.watching(reload=reload):
            await until(reading.is_set)
            if change == "file":
                world.file.write_text(factor(7))
            else:
                hang_up()
                await trio.testing.wait_all_tasks_blocked()
            go_on.set()
            await until(lambda: len(world.reads) == 2)
        assert world.reads == [1, 7 if change == "file" else 1]

    @virtual
    async def test_the_directory_made_anew(self, world: World) -> None:
        """It is waited for, and watched again when it is back."""
        world.move_to_directory()
        async with world.watching():
            for shares in (2, 3):
                world.file.unlink()
                world.file.parent.rmdir()
                await trio.sleep(10 * watch.RETRY)
                world.file.parent.mkdir()
                world.file.write_text(factor(shares))
                await world.applied(shares)

    @virtual
    async def test_the_directory_replaced(self, world: World) -> None:
        """Another one in its place is another file."""
        world.move_to_directory()
        async with world.watching():
            world.file.parent.rename(world.file.parent.with_name("old"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            other = world.file.parent.with_name("new")
            other.mkdir()
            (other / world.file.name).write_text(factor(2))
            other.rename(world.file.parent)
            await world.applied(2)

    @virtual
    async def test_what_is_no_change(self, world: World) -> None:
        """Neither other files, nor one that is gone: it may be about to be written."""
        async with world.watching():
            other = world.file.with_name("other")
            other.write_text(factor(9))
            other.unlink()
            await trio.testing.wait_all_tasks_blocked(0.01)
            world.file.unlink()
            other.touch()
            await trio.sleep(10 * watch.RETRY)
            assert world.reads == [1]
            world.file.write_text(factor(2))
            await world.applied(2)
        assert world.logged(logging.ERROR) == []

    def test_a_file_that_is_being_written(self, world: World) -> None:
        """It is read when it has stayed as it is for a moment: an empty one would be valid, and take all rules away."""
        clock = trio.testing.MockClock()

        async def test() -> None:
            async with world.watching():
                with world.file.open("w") as writing:
                    (world.file.parent / "unrelated").touch()
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    for line in ("# nothing yet\n", factor(9)):
                        writing.write(line)
                        writing.flush()
                        clock.jump(watch.SETTLING_TIME)
                        await trio.testing.wait_all_tasks_blocked(0.01)
                        assert world.reads == [1]
                clock.jump(watch.SETTLING_TIME)
                await world.applied(9)

        trio.run(test, clock=clock)
        assert world.reads == [1, 9]


class TestApplied:
    @virtual
    async def test_the_policy(self, world: World) -> None:
        """It is applied, and logged with what is offered now. A comment changes nothing, though rules move."""
        rules = "gpus:\n- {name: '*', shares: 3}\n"
        async with world.watching():
            for count, content in enumerate((rules, f"# a comment\n{rules}", factor(2)), start=1):
                world.file.write_text(content)
                await until(lambda count=count: len(world.reloaded) == count)  # type: ignore[misc]
                await trio.testing.wait_all_tasks_blocked()
        places = [policy.rules[0].place for policy in world.policies if policy.rules]
        assert places == [f"{world.file}:2", f"{world.file}:3"]
        (first, second) = world.logged(logging.INFO)
        assert "offers of 100" in first
        assert "offers of 2" in second

    @virtual
    async def test_what_takes_a_restart(self, world: World) -> None:
        """It is named in a warning once, as long as it differs from what the daemon runs with, and not the rest."""
        async with world.watching():
            for content in (
                factor(2) + "v: 1\nresource-name: example.com/other\n",
                factor(3) + "v: 1\n",
                factor(4) + "v: 1\nlog-format: json\n",
                factor(5),
                factor(6) + "v: 2\n",
            ):
                world.file.write_text(content)
                await world.applied(int(content.split()[1]))
        named = [re.findall(r"(?<!\S)-[a-z-]+", message) for message in world.logged(logging.WARNING)]
        assert named == [["-v"], ["-log-format", "-v"], ["-v"]]

    @virtual
    async def test_warnings(self, world: World) -> None:
        """A warning is logged once, also at the start, and again when it comes back."""
        doubtful = "sample-interval: 2\nhealth-interval: 3\n"
        world.file.write_text(factor(1) + doubtful)
        async with world.watching():
            for shares, more in ((2, doubtful), (3, "sample-interval: 2\n"), (4, doubtful)):
                world.file.write_text(factor(shares) + more)
                await world.applied(shares)
        (first, second) = world.logged(logging.WARNING)
        assert first == second
        assert "-health-interval" in first


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "facts"),
        [
            pytest.param("v: 1\nnope: 1\n", ["'nope'", "{}:2"], id="settings"),
            pytest.param(factor(TOO_MANY), [str(TOO_MANY)], id="offers"),
            pytest.param(None, ["{}"], id="hang-up without the file"),
        ],
    )
    @virtual
    async def test_the_old_ones_stay(self, world: World, content: str | None, facts: list[str]) -> None:
        """A bad file changes nothing and is logged with the place; once corrected, it applies."""
        async with world.watching():
            if content is None:
                world.file.unlink()
                hang_up()
            else:
                world.file.write_text(content)
            await until(lambda: world.reloaded)
            assert [policy.shares for policy in world.policies] == [1]
            world.file.write_text(factor(3))
            await world.applied(3)
        assert world.reloaded == [False, True]
        (error,) = world.logged(logging.ERROR)
        assert [fact for fact in facts if fact.format(world.file) not in error] == []


class TestCancellation:
    @virtual
    async def test_while_it_is_read(self, world: World) -> None:
        """A file system that does not answer is left behind."""
        reading, go_on = threading.Event(), threading.Event()

        def reload() -> Loaded:
            reading.set()
            go_on.wait(2 * TIMEOUT)
            return load({}, {})

        started = time.monotonic()
        async with world.watching(reload=reload):
            await until(reading.is_set)
        assert time.monotonic() - started < TIMEOUT
        go_on.set()

    @pytest.mark.parametrize("phase", ["watching", "settling", "without a file", "without its directory"])
    def test_while_it_waits(self, world: World, phase: str) -> None:
        """For a change, for the end of one, or for the directory. The signal's handler is then that of before."""
        before = signal.getsignal(signal.SIGHUP)

        async def test() -> None:
            if phase == "without a file":
                world.file = Path()
            async with world.watching():
                if phase == "settling":
                    world.file.write_text(factor(2))
                elif phase == "without its directory":
                    world.file.unlink()
                    world.file.parent.rmdir()
                await trio.testing.wait_all_tasks_blocked(0.01)

        trio.run(test, clock=trio.testing.MockClock())  # which stands still
        assert signal.getsignal(signal.SIGHUP) is before

    def test_a_signal_at_the_very_end(self) -> None:
        """One that comes when trio has stopped already is nobody's any more."""
        handlers = []

        async def test() -> None:
            with watch._hangups():
                handlers.append(signal.getsignal(signal.SIGHUP))

        trio.run(test)
        (handler,) = handlers
        assert callable(handler)
        handler(signal.SIGHUP, None)
