"""Asking nvidia-modprobe for the node nvidia-uvm. What the poll makes of that is in test_driver_poll.py."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from sgpu.driver import uvm
from sgpu.driver.uvm import CapabilityNodes, UvmNodes


def modprobe(host_path: Path, script: str, directory: str = "bin") -> Path:
    """A program in place of nvidia-modprobe: a real one needs a driver in the kernel."""
    program = host_path / directory / uvm.NAME
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("directory", ["bin", "usr/bin"])
def test_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], directory: str) -> None:
    """Run it from where installers or a distribution put it; keep its output from standard output, and say it ran."""
    program = modprobe(tmp_path, f'echo words; echo "$*" > {tmp_path}/asked', directory)
    assert str(program) in UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask()
    assert (tmp_path / "asked").read_text() == "-u -c 0\n"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("script", "match"),
    [
        pytest.param("exit 17", r"{program}.*\b17\b", id="silent"),
        pytest.param("echo 'no\n way' >&2; exit 3", r"{program}.*\b3\b.*no way", id="with words"),
        pytest.param("exec sleep 60", r"{program}.*\b0\.2 s\b", id="hangs"),
    ],
)
def test_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, match: str) -> None:
    """Return its exit code and its words, and wait for it only so long."""
    monkeypatch.setattr(uvm, "TIMEOUT", 0.2 if "sleep" in script else 30)
    program = modprobe(tmp_path, script)
    assert re.search(match.format(program=program), UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask())


def test_no_program(tmp_path: Path) -> None:
    """Say where it should be, or that it can't be run, as where the host path is mounted noexec."""
    assert re.search(f"{uvm.NAME}.*{tmp_path}", UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask())
    program = modprobe(tmp_path, "")
    program.chmod(0o644)
    assert re.search(f"{program}.*Permission denied", UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask())


def test_elsewhere(tmp_path: Path) -> None:
    """Do not run it where nobody would look at the nodes that it makes."""
    modprobe(tmp_path, f"touch {tmp_path}/asked")
    assert str(uvm.DEV_DIRECTORY) in UvmNodes(tmp_path, tmp_path / "dev").ask().split()
    assert not (tmp_path / "asked").exists()


def test_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it at most once a minute, and say the same in between."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    modprobe(tmp_path, f"echo >> {tmp_path}/asked; exit 17")
    nodes = UvmNodes(tmp_path, uvm.DEV_DIRECTORY)
    for seconds, runs in ((0, 1), (59, 1), (1, 2)):
        now += seconds
        assert "17" in nodes.ask()
        assert len((tmp_path / "asked").read_text()) == runs


def test_capabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it for capability files, at most once a minute for the same ones."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    modprobe(tmp_path, f'echo "$@" >> {tmp_path}/asked')
    nodes = CapabilityNodes(tmp_path, uvm.DEV_DIRECTORY)
    first, second = (Path("/proc/a"), Path("/proc/b")), (Path("/proc/c"),)
    for files in (first, second, first):
        assert "did not make it" in nodes.make(files)
    now += uvm.PAUSE
    nodes.make(first)
    assert (tmp_path / "asked").read_text().splitlines() == ["-f/proc/a -f/proc/b", "-f/proc/c", "-f/proc/a -f/proc/b"]
