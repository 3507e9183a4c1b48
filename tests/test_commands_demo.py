"""The demo, as users start it."""

from __future__ import annotations

import subprocess
import sys
from typing import NoReturn

import pytest

from sgpu.commands.demo import demo, steps
from sgpu.dra.slices import DRIVER

pytestmark = [pytest.mark.process, pytest.mark.smoke]


def test_the_demo_shows_every_step() -> None:
    """Exit with 0, and print what a reader should see: devices twice, allocations, and a GPU that is down."""
    done = subprocess.run(
        [sys.executable, "-m", "sgpu", "demo"], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("30 devices") == 2
    assert done.stdout.count("SGPU_SIMULATED=1") == 3
    for seen in ("deepomatic.com/shared-gpu", "SGPU_SHARES=2", "0 of 10 healthy"):
        assert seen in done.stdout
    assert "Traceback" not in done.stderr


def test_the_demo_of_dra() -> None:
    """Slices, a claim with its CDI file, a taint that goes again, and nothing left behind."""
    done = subprocess.run(
        [sys.executable, "-m", "sgpu", "demo", "-api", "dra"], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("memory 16384Mi, shares 100") == 6
    assert done.stdout.count("unhealthy=it-has-fallen-off-the-bus:NoSchedule") == 1
    for seen in (f"DRAPlugin {DRIVER}", f"SGPU_MEMORY_BYTES={4 << 30}", "Its CDI file is gone"):
        assert seen in done.stdout
    assert "Traceback" not in done.stderr


def test_a_step_that_is_not_seen_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit with 1 and name the step; here the daemon can't start at all."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(steps, "STEP_TIMEOUT", 0.2)
    assert demo("device-plugin") == 1
    assert "30 devices" in capsys.readouterr().out.splitlines()[-1]


def test_nowhere_to_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit with 1 and one line, as on the read-only root of sgpu's pod."""

    def refuse(**_: str) -> NoReturn:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    assert demo("device-plugin") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No usable temporary directory" in line
    assert "TMPDIR" in line
