"""Threads, and doing without."""

from __future__ import annotations

import logging
import threading

import pytest
import trio
from virtual_clock import real

from sgpu.lib.threads import REFUSED, run_in_thread


@real
async def test_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Run the function in the event loop while no thread can be started, and say so once each time that begins."""
    allowed = False
    start = trio.to_thread.run_sync

    async def run_sync(*args: object, **options: object) -> object:
        if not allowed:
            raise RuntimeError(REFUSED)
        return await start(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    for allowed in (True, False, False, True, False):
        thread = await run_in_thread(threading.current_thread)
        assert (thread is threading.current_thread()) is not allowed
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "pids.max" in caplog.text


def test_error() -> None:
    """Raise what the function raises."""

    def fail() -> None:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        trio.run(run_in_thread, fail)
