"""Fetching from the daemon: the answer, and one clear line for each way not to get one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from daemon_process import short_directory
from fake_status import SNAPSHOT, answering, http

from sgpu import __version__
from sgpu.observe.client import LOG, POD, NoAnswerError, fetch
from sgpu.observe.snapshot import encode


@pytest.fixture
def path() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory / "status.sock"


def problem(path: Path | str, timeout: float = 60) -> str:
    """The message of the error: one line, with the path."""
    with pytest.raises(NoAnswerError) as caught:
        fetch(str(path), timeout)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_answer(path: Path) -> None:
    """Return what the daemon encoded, of any length."""
    snapshot = attrs.evolve(SNAPSHOT, waiting="x" * 5_000_000)
    with answering(path, lambda _: http(encode(snapshot))) as requests:
        assert fetch(str(path)) == snapshot
    assert requests[0].startswith(b"GET /status HTTP/1.1\r\n")


def test_no_daemon(path: Path) -> None:
    """Say where to look when no daemon has run since the node started, or when it was killed."""
    never = problem(path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(path))
    killed = problem(path)
    assert never != killed
    assert POD in never
    assert POD in killed


def test_switched_off() -> None:
    """Name the setting where the path is empty."""
    assert "-status-socket" in problem("")


def test_not_allowed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that root may. (These tests are often run by root, whom no file mode stops.)"""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sgpu.observe.client._UnixConnection.connect", refuse)
    assert "root" in problem(path)


def test_other_errors(tmp_path: Path) -> None:
    """Give the reason and the log where the socket can't be connected to for another reason."""
    long = tmp_path / ("x" * 200)
    message = problem(long)
    assert "too long" in message
    assert LOG in message


def test_hangs(path: Path) -> None:
    """Give up a daemon that takes the request and says nothing, and name its log."""
    with answering(path, lambda _: None):
        message = problem(path, 0.05)
    assert "0.05 s" in message
    assert LOG in message


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        *((b"", "restart"), (http(b"x" * 9)[:-3], "restart"), (b"SSH-2.0\r\n", "BadStatusLine")),
        *((http(b"", "404 Not Found"), "404"), (http(b"", "503 x"), "503"), (http(b"hello"), f"sgpu {__version__}")),
        *((http(b"[]"), f"sgpu {__version__}"), (http(b'{"version": "9.0"}'), "sgpu 9.0")),
    ],
)
def test_odd_answers(path: Path, answer: bytes, fact: str) -> None:
    """Say what is odd about an answer."""
    with answering(path, lambda _: answer):
        assert fact in problem(path)
