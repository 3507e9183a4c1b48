"""The command `status`: what it prints where, once or again and again, and its exit codes."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
from daemon_process import TIMEOUT, short_directory
from fake_status import GPU, SNAPSHOT, answering, http

from sgpu.cli import FAILED, OK, USAGE, main
from sgpu.observe.snapshot import decode, encode

#: How a terminal is told to show another screen, and to go back.
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"
RED = "\x1b[1;31m"


@pytest.fixture
def path() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory / "status.sock"


@pytest.fixture
def daemon(path: Path) -> Iterator[Path]:
    """A daemon that answers."""
    with answering(path, lambda _: http(encode(SNAPSHOT))):
        yield path


class TestPlain:
    """Standard output is no terminal."""

    def test_table(self, daemon: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Print a table without anything that only a terminal understands, as it is asked for by default."""
        assert main(["status"], {"SGPU_STATUS_SOCKET": str(daemon)}) == OK
        captured = capsys.readouterr()
        assert f"\n{GPU.uuid}  ███████░░░░░░░░" in captured.out
        assert re.search(r"[^\n -~█░]| \n", captured.out) is None
        assert captured.err == ""

    def test_json(self, daemon: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Print all of it for programs."""
        assert main(["status", "-o=json", f"--status-socket={daemon}"], {}) == OK
        assert decode(capsys.readouterr().out.encode()) == SNAPSHOT

    @pytest.mark.parametrize("interval", [5, 60], ids=["old", "recent"])
    def test_old_figures(self, path: Path, capsys: pytest.CaptureFixture[str], interval: int) -> None:
        """Note figures that are old for the daemon's interval and patience."""
        snapshot = attrs.evolve(SNAPSHOT, sampled_at=time.time() - 60, stale_after=3 * interval + 10)
        with answering(path, lambda _: http(encode(snapshot))):
            assert main(["status", f"-status-socket={path}"], {}) == OK
        assert ("\n! " in capsys.readouterr().out) is (interval == 5)

    @pytest.mark.parametrize("output", ["text", "json"])
    def test_no_daemon(self, path: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
        """Print one line on standard error, nothing on standard output, and exit with 1."""
        assert main(["status", "-o", output, f"-status-socket={path}"], {}) == FAILED
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("sgpu: ")
        assert str(path) in captured.err
        assert captured.err.count("\n") == 1

    @pytest.mark.parametrize("flags", [["-o=yaml"], ["-interval=0"], ["-watch=maybe"], ["-o"], ["pods"]], ids=" ".join)
    def test_usage(self, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
        """Refuse what it does not take."""
        assert main(["status", *flags], {}) == USAGE
        assert capsys.readouterr().out == ""

    def test_encoding(self, daemon: Path) -> None:
        """Draw bars in ASCII where there is nothing else."""
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command(daemon), env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (OK, "")
        assert "#######........" in done.stdout

    def test_reader_is_gone(self, daemon: Path) -> None:
        """End without a traceback, as with `| head -1`."""
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run(command(daemon), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        finally:
            os.close(writing)
        assert done.stderr == ""

    @pytest.mark.soak
    def test_watch(self, daemon: Path) -> None:
        """Print it again and again, as JSON a line each, until Ctrl-C."""
        with subprocess.Popen(
            command(daemon, "-watch", "-interval=0.1", "-o=json"), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            for _ in range(3):
                assert decode(process.stdout.readline().encode()) == SNAPSHOT
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT) == OK


@pytest.mark.soak
class TestTerminal:
    """Standard output is a terminal."""

    def test_color(self, path: Path) -> None:
        """Print in red what is wrong."""
        down = encode(attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(GPU, healthy=False, reason="XID 79"),)))
        with answering(path, lambda _: http(down)), terminal(80, command(path)) as screen:
            screen.wait_exit(OK)
        assert f"{RED}unhealthy\x1b[0m" in screen.text

    @pytest.mark.parametrize(
        ("flags", "environment"),
        [
            pytest.param(["--no-color"], {}, id="flag"),
            pytest.param([], {"NO_COLOR": "1"}, id="NO_COLOR"),
            pytest.param([], {"TERM": "dumb"}, id="dumb terminal"),
        ],
    )
    def test_no_color(self, daemon: Path, flags: list[str], environment: dict[str, str]) -> None:
        """Print without color where that is asked for."""
        with terminal(80, command(daemon, *flags), **environment) as screen:
            screen.wait_exit(OK)
        assert GPU.uuid in screen.text
        assert re.search(r"\x1b\[[0-9;]*[34][0-9]", screen.text) is None

    def test_width(self, daemon: Path) -> None:
        """Fit the terminal."""
        with terminal(40, command(daemon)) as screen:
            screen.wait_exit(OK)
        lines = screen.plain.splitlines()
        assert GPU.uuid in lines
        assert max(map(len, lines)) == 40

    def test_watch(self, path: Path) -> None:
        """Draw it on a screen of its own, through restarts of the daemon, until Ctrl-C."""
        with terminal(80, command(path, "--watch", "-interval=0.1")) as screen:
            for _ in range(2):
                screen.wait_text(str(path))  # nobody answers there
                with answering(path, lambda _: http(encode(SNAPSHOT))):
                    screen.wait_text(GPU.uuid)
            screen.process.send_signal(signal.SIGINT)
            screen.wait_exit(OK)
        assert screen.text.startswith(ENTER)
        assert screen.text.count(LEAVE) == 1
        assert "Traceback" not in screen.text

    def test_resize(self, daemon: Path) -> None:
        """Draw it anew at once when the terminal changes its size."""
        with terminal(80, command(daemon, "-watch", "-interval=3600")) as screen:
            screen.wait_text("GPU, pod and container")
            screen.resize(40)
            screen.wait_text("memory  ")

    def test_more_than_fits(self, path: Path) -> None:
        """Say how many lines are not shown."""
        many = encode(attrs.evolve(SNAPSHOT, gpus=(GPU,) * 16))
        with answering(path, lambda _: http(many)), terminal(80, command(path, "-watch")) as screen:
            screen.wait_text(" 46 more")


def command(path: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "sgpu", "status", f"-status-socket={path}", *flags]


class Screen:
    """A process that has a terminal for its output, and what it has written."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int) -> None:
        self.process = process
        self.text = ""
        self._seen = 0
        self._ours = ours
        self._changed = threading.Condition()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    @property
    def plain(self) -> str:
        """Without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)

    def wait_text(self, text: str) -> None:
        """Wait for it to be written after what was waited for last."""

        def found() -> bool:
            return text in self.text[self._seen :]

        with self._changed:
            assert self._changed.wait_for(found, TIMEOUT), f"no {text!r} in {self.text[self._seen :]!r}"
            self._seen = self.text.index(text, self._seen) + len(text)

    def wait_exit(self, code: int) -> None:
        assert self.process.wait(TIMEOUT) == code
        self.reader.join()

    def resize(self, columns: int) -> None:
        set_size(self._ours, columns)
        self.process.send_signal(signal.SIGWINCH)

    def _read(self) -> None:
        while True:
            try:
                said = os.read(self._ours, 65536).decode()
            except OSError:  # the other end is closed
                return
            with self._changed:
                self.text += said
                self._changed.notify_all()


def set_size(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


@contextmanager
def terminal(columns: int, arguments: list[str], **environment: str) -> Iterator[Screen]:
    """Run it with a terminal of 24 lines."""
    ours, theirs = os.openpty()
    set_size(ours, columns)
    dropped = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    process = subprocess.Popen(
        arguments,
        env={**inherited, "TERM": "xterm-256color", "PYTHONUTF8": "1", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    screen = Screen(process, ours)
    try:
        yield screen
    finally:
        process.kill()
        process.wait()
        screen.reader.join()
        os.close(ours)
