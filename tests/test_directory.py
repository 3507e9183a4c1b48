"""Waiting for changes in a directory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from daemon_process import short_directory

from sgpu.directory import open_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


class TestDirectory:
    def test_a_change_is_noticed(self, directory: Path) -> None:
        """Made, renamed, removed, and the directory itself gone."""

        async def check() -> None:
            path, other = directory / "a", directory / "b"
            with open_directory(directory) as watched:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watched.watch)
                    for change, condition in (
                        (path.touch, path.exists),
                        (partial(path.rename, other), other.exists),
                        (other.unlink, lambda: not other.exists()),
                        (directory.rmdir, lambda: not directory.exists()),
                    ):
                        with trio.fail_after(5):
                            async with trio.open_nursery() as inner:
                                inner.start_soon(watched.wait_until, condition)
                                await trio.testing.wait_all_tasks_blocked()
                                change()
                    nursery.cancel_scope.cancel()

        trio.run(check)

    def test_a_change_before_the_watch_task_runs_is_not_missed(self, directory: Path) -> None:
        """The kernel queues from when the directory was opened."""

        async def check() -> None:
            with open_directory(directory) as watched:
                (directory / "a").touch()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watched.watch)
                    with trio.fail_after(5):
                        await watched.wait_until((directory / "a").exists)
                    nursery.cancel_scope.cancel()

        trio.run(check)

    def test_waiting_can_be_cancelled(self, directory: Path) -> None:
        """Both the watch and a wait."""

        async def check() -> None:
            with open_directory(directory) as watched:
                for wait in (watched.watch, partial(watched.wait_until, lambda: False)):
                    with trio.move_on_after(0.01) as scope:
                        await wait()
                    assert scope.cancelled_caught

        trio.run(check)

    def test_no_directory_is_an_os_error(self, directory: Path) -> None:
        """A file in its place too."""
        (directory / "file").touch()
        for path in (directory / "none", directory / "file"):
            with pytest.raises(OSError, match=r"No such file|Not a directory"), open_directory(path):
                pass
