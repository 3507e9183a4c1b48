"""Settings that change while the daemon runs: what is noticed, what takes effect, and what is said."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from rewriting import WAYS, config_map

from sgpu import reload
from sgpu.catalog import Catalog
from sgpu.device import Device
from sgpu.load import Loaded, load
from sgpu.policy import Policy
from sgpu.reload import keep_configured

SHARED = "deepomatic.com/shared-gpu"
WHOLE = "example.com/whole-gpu"
#: Seconds after which something that is due is taken not to come.
TIMEOUT = 10
A = Device(uuid="GPU-a", name="Tesla T4", pci_bus_id="00000000:3B:00.0", shares=100, device_nodes=())
B = Device(uuid="GPU-b", name="Tesla T4", pci_bus_id="00000000:AF:00.0", shares=100, device_nodes=())


def factor(shares: int) -> str:
    return f"gpu-duplication-factor: {shares}\n"


class World:
    """A file for the settings, two GPUs that are offered by them, and what was logged."""

    def __init__(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.file = directory / "config.yaml"
        self.file.write_text(factor(1))
        self.reloads = 0
        self.reloaded: list[bool] = []
        self.policies: list[Policy] = []
        self._caplog = caplog

    def load(self) -> Loaded:
        self.reloads += 1
        return load({"config": str(self.file)}, {})

    @asynccontextmanager
    async def running(self, reload: Callable[[], Loaded] | None = None) -> AsyncIterator[None]:
        """Settings that were loaded already are kept configured; the file was read once more when this is entered."""
        loaded = self.load()
        self.catalog = Catalog(loaded.policy)
        self.catalog.replace((A, B))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_configured, loaded, reload or self.load, self.catalog, self.reloaded.append)
            if reload is None:
                await self.wait_until(lambda: self.reloads == 2)
            await trio.testing.wait_all_tasks_blocked(0.01)
            yield
            nursery.cancel_scope.cancel()

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """For what nobody tells of."""
        with trio.fail_after(TIMEOUT):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.002)

    async def wait_shares(self, shares: int) -> None:
        """Until each GPU is offered as so many."""
        await self.wait_until(lambda: self.shares == shares)

    async def wait_log(self, words: str, times: int = 1) -> None:
        await self.wait_until(lambda: sum(words in message for message in self.messages) >= times)

    @property
    def shares(self) -> int:
        return self.catalog.inventories[SHARED].devices[0].shares

    @property
    def messages(self) -> list[str]:
        return [f"{record.levelname} {record.getMessage()}" for record in self._caplog.records]


@pytest.fixture
def world(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> World:
    caplog.set_level(logging.DEBUG, "sgpu")
    return World(tmp_path, caplog)


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


class TestNoticed:
    @pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__.replace("_", " "))
    def test_a_file_that_changes(self, world: World, write: Callable[[Path, str], None]) -> None:
        """However it is written, time after time. Each is counted, the one at the start is not."""

        async def test() -> None:
            write(world.file, factor(1))
            async with world.running():
                assert not world.reloaded
                for shares in (2, 3, 4):
                    write(world.file, factor(shares))
                    await world.wait_shares(shares)

        run(test)
        assert len(world.reloaded) >= 3  # a file that is written bit by bit can be read in between
        assert set(world.reloaded) == {True}
        assert not [message for message in world.messages if "ERROR" in message]

    def test_through_the_link_that_is_swapped(self, world: World) -> None:
        """Also when the setting names the file by way of a ConfigMap's `..data`."""

        async def test() -> None:
            visible = world.file
            config_map(visible, factor(1))
            world.file = visible.parent / "..data" / visible.name
            async with world.running():
                for shares in (2, 3):
                    config_map(visible, factor(shares))
                    await world.wait_shares(shares)

        run(test)

    def test_between_start_and_watch(self, world: World) -> None:
        """A change while the process was starting, after it had read the file."""

        async def test() -> None:
            def reload() -> Loaded:
                return load({"config": str(world.file)}, {})

            before = world.load

            def load_and_change() -> Loaded:
                loaded = before()
                world.file.write_text(factor(2))
                return loaded

            world.load = load_and_change  # type: ignore[method-assign]
            async with world.running(reload):
                await world.wait_shares(2)

        run(test)

    def test_a_hang_up(self, world: World) -> None:
        """SIGHUP has the settings read again, though nothing else tells of a change."""

        async def test() -> None:
            async with world.running():
                for count in (3, 4):
                    hang_up()
                    await world.wait_until(lambda count=count: world.reloads == count)  # type: ignore[misc]
                    await trio.testing.wait_all_tasks_blocked(0.01)

        run(test)

    def test_a_hang_up_without_a_file(self, world: World) -> None:
        """It is no reason to end, and changes nothing."""

        async def test() -> None:
            reloads: list[Loaded] = []

            def reload() -> Loaded:
                reloads.append(load({}, {}))
                return reloads[-1]

            catalog = Catalog(Policy(SHARED, 1))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_configured, load({}, {}), reload, catalog)
                await world.wait_until(lambda: len(reloads) == 1)
                await trio.testing.wait_all_tasks_blocked(0.01)
                hang_up()
                await world.wait_until(lambda: len(reloads) == 2)
                nursery.cancel_scope.cancel()

        run(test)
        assert world.messages == []

    @pytest.mark.parametrize("change", ["hang-up", "file"])
    def test_a_change_while_it_is_read(self, world: World, change: str) -> None:
        """It is one more: neither is lost while the settings are being read."""
        reading, go_on = threading.Event(), threading.Event()
        reads: list[int] = []

        def reload() -> Loaded:
            loaded = load({"config": str(world.file)}, {})
            reads.append(loaded.policy.shares)
            reading.set()
            go_on.wait(TIMEOUT)
            return loaded

        async def test() -> None:
            async with world.running(reload):
                await world.wait_until(reading.is_set)
                if change == "file":
                    world.file.write_text(factor(7))
                else:
                    hang_up()
                    await trio.testing.wait_all_tasks_blocked(0.01)
                go_on.set()
                await world.wait_until(lambda: len(reads) == 2)

        run(test)
        assert reads == [1, 7 if change == "file" else 1]

    def test_the_directory_made_anew(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is waited for, and watched again when it is back."""
        monkeypatch.setattr(reload, "RETRY", 0.02)
        world.file = world.file.parent / "etc" / "config.yaml"
        world.file.parent.mkdir()
        world.file.write_text(factor(1))

        async def test() -> None:
            async with world.running():
                for shares in (2, 3):
                    world.file.unlink()
                    world.file.parent.rmdir()
                    await trio.sleep(0.1)
                    world.file.parent.mkdir()
                    world.file.write_text(factor(shares))
                    await world.wait_shares(shares)

        run(test)

    def test_the_directory_replaced(self, world: World) -> None:
        """Another one in its place is another file."""
        world.file = world.file.parent / "etc" / "config.yaml"
        world.file.parent.mkdir()
        world.file.write_text(factor(1))

        async def test() -> None:
            async with world.running():
                world.file.parent.rename(world.file.parent.with_name("old"))
                await trio.testing.wait_all_tasks_blocked(0.01)
                other = world.file.parent.with_name("new")
                other.mkdir()
                (other / world.file.name).write_text(factor(2))
                other.rename(world.file.parent)
                await world.wait_shares(2)

        run(test)

    def test_a_file_that_is_gone(self, world: World) -> None:
        """As long as there is none, nothing changes, and nothing is said: it may be about to be written."""

        async def test() -> None:
            async with world.running():
                world.file.unlink()
                (world.file.parent / "other").touch()
                await trio.sleep(0.2)
                assert world.shares == 1
                assert world.messages == []
                world.file.write_text(factor(2))
                await world.wait_shares(2)

        run(test)

    def test_a_file_that_is_being_written(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is read when it has stayed as it is for a moment: an empty one would be valid, and take all rules away."""
        monkeypatch.setattr(reload, "SETTLING_TIME", 0.5)
        world.file.write_text(factor(7))

        async def test() -> None:
            async with world.running():
                shares = {world.shares}
                changed = world.catalog.inventories[SHARED].changed
                with world.file.open("w") as writing:
                    (world.file.parent / "unrelated").touch()
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    writing.write("# nothing yet\n")
                    writing.flush()
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    writing.write(factor(9))
                with trio.fail_after(TIMEOUT):
                    await changed.wait()
                assert shares | {world.shares} == {7, 9}

        run(test)

    def test_other_files(self, world: World) -> None:
        """What happens beside the file is no reason to read it."""

        async def test() -> None:
            async with world.running():
                for _ in range(5):
                    other = world.file.with_name("other")
                    other.write_text(factor(9))
                    other.unlink()
                await trio.sleep(0.3)
                assert world.reloads == 2

        run(test)


class TestApplied:
    def test_what_gpus_are_offered_as(self, world: World) -> None:
        """Shares, resources and rules take effect at once; the log says which resources there are."""

        async def test() -> None:
            async with world.running():
                shared = world.catalog.inventories[SHARED]
                world.file.write_text(f"gpus:\n- uuid: GPU-b\n  shares: 1\n  resource: {WHOLE}\n")
                await world.wait_until(lambda: WHOLE in world.catalog.inventories)
                assert world.catalog.inventories[SHARED] is shared
                assert [(each.uuid, each.shares) for each in shared.devices] == [("GPU-a", 100)]
                assert [each.uuid for each in world.catalog.inventories[WHOLE].devices] == ["GPU-b"]
                await world.wait_log("what GPUs are offered as has changed")
                world.file.write_text("resource-name: example.com/other\n")
                await world.wait_until(lambda: "example.com/other" in world.catalog.inventories)
                assert shared.devices == ()
                await world.wait_log("what GPUs are offered as has changed", times=2)

        run(test)
        assert world.messages == [
            f"INFO what GPUs are offered as has changed: now 100 x {SHARED}, 1 x {WHOLE}",
            "INFO what GPUs are offered as has changed: now 200 x example.com/other",
        ]

    def test_a_comment(self, world: World) -> None:
        """It changes nothing, though every rule moves to another line."""
        rules = "gpus:\n- {name: '*', shares: 3}\n"
        world.file.write_text(rules)

        async def test() -> None:
            async with world.running():
                world.file.write_text(f"# a comment\n{rules}")
                await world.wait_until(lambda: world.reloads == 3)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert world.catalog.policy.rules[0].place == f"{world.file}:3"

        run(test)
        assert world.messages == []

    def test_what_takes_a_restart(self, world: World) -> None:
        """It is named in a warning once, as long as it differs from what the daemon runs with, and not the rest."""

        async def test() -> None:
            async with world.running():
                for content in (
                    factor(2) + "v: 1\n",
                    factor(3) + "v: 1\n",
                    factor(4) + "v: 1\nlog-format: json\n",
                    factor(5),
                    factor(6) + "v: 2\n",
                ):
                    world.file.write_text(content)
                    await world.wait_shares(int(content.split()[1]))
                    await trio.testing.wait_all_tasks_blocked(0.01)

        run(test)
        assert [message for message in world.messages if "WARNING" in message] == [
            "WARNING takes effect at the next start: -v",
            "WARNING takes effect at the next start: -log-format, -v",
            "WARNING takes effect at the next start: -v",
        ]


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            pytest.param("v: [1", "-config {} (command line) is not YAML: ", id="not YAML"),
            pytest.param("v: 1\nnope: 1\n", "unknown key 'nope' ({}:2); the file takes: ", id="unknown key"),
            pytest.param(
                "v: 1\nv: 2\n", "-config {} (command line) has 'v' twice, the second time in line 2", id="twice"
            ),
            pytest.param("v: 99", "-v: 99 ({}:1) is not a whole number from 0 to 10", id="wrong value"),
            pytest.param("gpus:\n- uuid: x\n", "gpus: uuid: 'x' ({}:2) is not a GPU's UUID", id="wrong rule"),
            pytest.param(
                "gpus:\n- {uuid: GPU-a, shares: 2}\n- {name: '*T4', exclude: true}\n",
                "GPU GPU-a (Tesla T4 at 00000000:3B:00.0) is claimed twice: "
                "by `uuid: GPU-a` ({0}:2) and by `name: *T4` ({0}:3)",
                id="two rules for a GPU",
            ),
            pytest.param(factor(100_000), "200000 shares on 2 GPU(s) do not fit", id="too many shares"),
            pytest.param("\0", "-config {} (command line) is not YAML: ", id="NUL"),
        ],
    )
    def test_the_old_ones_stay(self, world: World, content: str, words: str) -> None:
        """What can't be used changes nothing and is told in one line, with the place; once it is mended, it applies."""

        async def test() -> None:
            async with world.running():
                before = world.catalog.policy
                world.file.write_text(content)
                await world.wait_log("the settings stay as they were")
                assert world.catalog.policy is before or world.catalog.policy == before
                assert world.shares == 1
                world.file.write_text(factor(3))
                await world.wait_shares(3)

        run(test)
        (error,) = (message for message in world.messages if message.startswith("ERROR"))
        assert error.startswith(f"ERROR the settings stay as they were: {words.format(world.file)}")
        assert error.splitlines() == [error]

    def test_a_hang_up_without_the_file(self, world: World) -> None:
        """Who asks for settings that are not there is told."""

        async def test() -> None:
            async with world.running():
                world.file.unlink()
                hang_up()
                await world.wait_log("ERROR the settings stay as they were: -config")
                assert world.reloaded == [False]
                assert world.shares == 1
                world.file.write_text(factor(3))
                await world.wait_shares(3)

        run(test)


class TestCancellation:
    def test_while_it_is_read(self, world: World) -> None:
        """A file system that does not answer is left behind."""
        go_on = threading.Event()

        def reload() -> Loaded:
            go_on.wait(TIMEOUT)
            return load({}, {})

        async def test() -> None:
            with trio.fail_after(1):
                async with world.running(reload):
                    pass

        run(test)
        go_on.set()

    @pytest.mark.parametrize("phase", ["watching", "settling", "without a file", "without its directory"])
    def test_while_it_waits(self, world: World, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """For a change, for the end of one, or for the directory. The signal's handler is then that of before."""
        monkeypatch.setattr(reload, "SETTLING_TIME", 60)
        monkeypatch.setattr(reload, "RETRY", 60)
        before = signal.getsignal(signal.SIGHUP)

        async def test() -> None:
            with trio.fail_after(TIMEOUT):
                async with world.running():
                    if phase == "settling":
                        world.file.write_text(factor(2))
                    elif phase == "without its directory":
                        world.file.unlink()
                        world.file.parent.rmdir()
                    await trio.testing.wait_all_tasks_blocked(0.05)

        if phase == "without a file":
            world.load = partial(load, {}, {})  # type: ignore[method-assign]
            world.reloads = 2
        run(test)
        assert signal.getsignal(signal.SIGHUP) is before

    def test_a_signal_at_the_very_end(self) -> None:
        """One that comes when trio has stopped already is nobody's any more."""
        handlers = []

        async def test() -> None:
            with reload._hangups():
                handlers.append(signal.getsignal(signal.SIGHUP))

        trio.run(test)
        (handler,) = handlers
        assert callable(handler)
        handler(signal.SIGHUP, None)
