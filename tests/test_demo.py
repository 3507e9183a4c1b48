"""The demo, as users start it."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import NoReturn

import pytest

from sgpu import demo

pytestmark = pytest.mark.process


def test_the_demo_shows_every_step() -> None:
    """Exit code 0, in about ten seconds, with what a reader should see."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sgpu", "demo"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for seen in (
        "It is told of 30 devices of deepomatic.com/shared-gpu",
        "SGPU_SIMULATED=1",
        "Pod 3 asks for 2 share(s)",
        "30 devices listed again after",
        "0 of 10 healthy",
        "GPU 1 is back.",
        "stopped with exit code 0",
    ):
        assert seen in done.stdout
    assert time.monotonic() - started < 30
    assert "Traceback" not in done.stderr


def test_a_step_that_is_not_seen_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the daemon can't start at all."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(demo, "STEP_TIMEOUT", 0.2)
    assert demo.demo() == 1
    assert "FAILED: not seen within 0.2 s: 30 devices" in capsys.readouterr().out


def test_nowhere_to_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As on the read-only root of sgpu's pod: one line."""
    nowhere = FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    def refuse(**_: str) -> NoReturn:
        raise nowhere

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    assert demo.demo() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No usable temporary directory" in line
    assert "set TMPDIR" in line
