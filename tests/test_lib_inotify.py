"""Waiting for changes in a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import inotify_simple
import pytest
import trio
import trio.testing
from daemon_process import short_directory
from virtual_clock import beside, real

from sgpu.lib.inotify import open_directory

#: Seconds that a change may take to be noticed; only a failing test gets there.
TIMEOUT = 30


@pytest.fixture
def root() -> Iterator[Path]:
    """A file, a directory `d` with a file `old`, and one that is empty."""
    with short_directory() as path:
        (path / "file").touch()
        (path / "d").mkdir()
        (path / "d/old").touch()
        (path / "empty").mkdir()
        yield path


def make_anew(directory: Path) -> None:
    """Put another directory in its place."""
    directory.rename(directory.parent / "x")
    directory.mkdir()


@pytest.mark.parametrize(
    ("name", "change", "condition"),
    [
        pytest.param("d", lambda d: (d / "new").symlink_to("x"), lambda d: (d / "new").is_symlink(), id="made"),
        pytest.param("d", lambda d: (d / "old").unlink(), lambda d: not (d / "old").exists(), id="removed"),
        pytest.param(
            "d", lambda d: (d / "old").write_text("-"), lambda d: (d / "old").read_text() == "-", id="written"
        ),
        pytest.param("d", lambda d: (d / "old").rename(d.parent / "x"), lambda d: not (d / "old").exists(), id="out"),
        pytest.param("d", lambda d: (d.parent / "file").rename(d / "new"), lambda d: (d / "new").exists(), id="in"),
        pytest.param("empty", lambda d: d.rename(d.parent / "x"), lambda d: not d.exists(), id="directory moved"),
        pytest.param("empty", Path.rmdir, lambda d: not d.exists(), id="directory removed"),
    ],
)
@real
async def test_each_kind_of_change_is_noticed(
    name: str, change: Callable[[Path], object], condition: Callable[[Path], bool], root: Path
) -> None:
    """Wake whoever waits for it."""
    directory = root / name
    with open_directory(directory) as watched, trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.watch)
            async with trio.open_nursery() as inner:
                inner.start_soon(watched.wait_until, partial(condition, directory))
                await trio.testing.wait_all_tasks_blocked()
                change(directory)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("renewed", [False, True], ids=["opened", "made anew and renewed"])
@real
async def test_a_change_before_the_watch_task_runs_is_not_missed(root: Path, *, renewed: bool) -> None:
    """Queue changes from when the directory was opened, or renewed after it was made anew."""
    directory = root / "empty"
    with open_directory(directory) as watched, trio.fail_after(TIMEOUT):
        if renewed:
            make_anew(directory)
            watched.renew()
            async with trio.open_nursery() as nursery:  # takes what was queued for the old one
                nursery.start_soon(watched.watch)
                await watched.changed.next.wait()
                nursery.cancel_scope.cancel()
        change = watched.changed.next
        (directory / "new").touch()
        async with beside(watched.watch):
            await change.wait()


@real
async def test_it_can_be_cancelled(root: Path) -> None:
    """Let Cancelled through, in the watch and in a wait."""
    with open_directory(root) as watched:
        for wait in (watched.watch, partial(watched.wait_until, lambda: False)):
            with trio.move_on_after(0.01) as scope:
                await wait()
            assert scope.cancelled_caught


@pytest.mark.parametrize(("name", "error"), [("none", FileNotFoundError), ("file", NotADirectoryError)])
def test_what_is_no_directory_is_an_os_error(root: Path, name: str, error: type[OSError]) -> None:
    """Raise it on opening."""
    with pytest.raises(error), open_directory(root / name):
        pass


@pytest.mark.parametrize(
    ("refused", "number"), [("INotify", errno.EMFILE), ("add_watch", errno.ENOSPC)], ids=["no instance", "no watch"]
)
@real
async def test_the_kernel_has_none_left(
    root: Path, refused: str, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Poll instead, and name the limit."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(inotify_simple if refused == "INotify" else inotify_simple.INotify, refused, refuse)
    with open_directory(root / "d") as watched, trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.watch)
            nursery.start_soon(partial(trio.to_thread.run_sync, (root / "d/new").touch))
            await watched.wait_until((root / "d/new").exists)
            nursery.cancel_scope.cancel()
    with pytest.raises(NotADirectoryError), open_directory(root / "nowhere"):
        pass
    assert "fs.inotify.max_user_" in caplog.text
