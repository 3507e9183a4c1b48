"""Asking the daemon: the answer, and one clear line for each way not to get one."""

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
from sgpu.asking import LOG, POD, NoAnswerError, ask
from sgpu.snapshot import encode

RUNNING = f"is the DaemonSet's pod running on this node? {POD}"


@pytest.fixture
def path() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory / "status.sock"


def test_answer(path: Path) -> None:
    """What the daemon encodes is what is known here."""
    with answering(path, lambda _: http(encode(SNAPSHOT))) as requests:
        assert ask(str(path)) == SNAPSHOT
    assert requests[0].startswith(b"GET /status HTTP/1.1\r\n")


def test_large_answer(path: Path) -> None:
    """Of any length."""
    snapshot = attrs.evolve(SNAPSHOT, waiting="x" * 5_000_000)
    with answering(path, lambda _: http(encode(snapshot))):
        assert ask(str(path)) == snapshot


def test_no_socket(path: Path) -> None:
    """As when no daemon has run since the node started."""
    with pytest.raises(NoAnswerError) as caught:
        ask(str(path))
    assert str(caught.value) == f"no daemon answers on {path} (there is no such socket): {RUNNING}"


def test_nobody_listens(path: Path) -> None:
    """As after the daemon was killed."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(path))
    with pytest.raises(NoAnswerError) as caught:
        ask(str(path))
    assert str(caught.value) == f"no daemon answers on {path} (connection refused): {RUNNING}"


def test_switched_off() -> None:
    """There is no socket to ask on."""
    with pytest.raises(NoAnswerError, match=r"^-status-socket is empty, .*: set it to the daemon's$"):
        ask("")


def test_not_allowed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for who is not root. (These tests are often run by root, whom no file mode stops.)"""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sgpu.asking._UnixConnection.connect", refuse)
    with pytest.raises(NoAnswerError, match=r"^only root may ask the daemon on .*: run this as root"):
        ask(str(path))


def test_hangs(path: Path) -> None:
    """One that takes the question and says nothing is not waited for."""
    with answering(path, lambda _: None), pytest.raises(NoAnswerError) as caught:
        ask(str(path), 0.05)
    assert f"{path} does not answer within 0.05 s" in str(caught.value)
    assert str(caught.value).endswith(LOG)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(b"", "hung up before it had answered", id="hangs up"),
        pytest.param(b"SSH-2.0\r\n", "does not speak as sgpu does (BadStatusLine", id="not HTTP"),
        pytest.param(http(b"x" * 9)[:-3], "hung up before it had answered", id="half an answer"),
        pytest.param(http(b"", "404 Not Found"), "has no answer (HTTP status 404)", id="another path"),
        pytest.param(http(b"", "503 x"), "has no answer (HTTP status 503)", id="not now"),
        pytest.param(http(b"hello"), "another program or version, and this is", id="not JSON"),
        pytest.param(http(b"[]"), "another program or version, and this is", id="other JSON"),
        pytest.param(
            http(b'{"version": "9.0"}'), f"is sgpu 9.0, and this is sgpu {__version__}, which", id="another version"
        ),
    ],
)
def test_odd_answers(path: Path, answer: bytes, words: str) -> None:
    """Each says what is wrong, on one line."""
    with answering(path, lambda _: answer), pytest.raises(NoAnswerError) as caught:
        ask(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
