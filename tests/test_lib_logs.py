"""The log: one line a message, for people or for machines."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from sgpu.lib import logs
from sgpu.lib.logs import JsonFormatter, OnChange, TextFormatter, printable

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Put the process's log back as it was."""
    root, ours = logging.getLogger(), logging.getLogger("sgpu")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    """A record of `sgpu.daemon`, 678 ms into a second of 2026."""
    info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("sgpu.daemon", logging.WARNING, "daemon.py", 1, message, arguments, info)
    made.created, made.msecs = 1_767_323_045.678, 678.9
    return made


def raised() -> Exception:
    """An error with a traceback."""
    try:
        raise ValueError("bröken\ntwice")
    except ValueError as error:
        return error


class TestTextFormatter:
    @pytest.mark.parametrize(
        ("made", "message"),
        [
            pytest.param(record("GPU %s: %d shares", "GPU-a", 100), "GPU GPU-a: 100 shares", id="arguments"),
            pytest.param(record("100 %s"), "100 %s", id="no arguments"),
            pytest.param(record("a\nb: é"), r"a\nb: é", id="newline"),
        ],
    )
    def test_line(self, made: logging.LogRecord, message: str) -> None:
        """A message is one line with the time in UTC to the millisecond and the level."""
        assert TextFormatter().format(made) == f"2026-01-02T03:04:05.678Z WARNING {message}"

    def test_error(self) -> None:
        """An error's traceback follows its message."""
        lines = TextFormatter().format(record("it went wrong", error=raised())).splitlines()
        assert lines[0] == "2026-01-02T03:04:05.678Z WARNING it went wrong"
        assert lines[1].startswith("Traceback ")
        assert lines[-2:] == ["ValueError: bröken", "twice"]


class TestJsonFormatter:
    def test_line(self) -> None:
        """A message is one object with the time, the level, the logger and the text."""
        assert json.loads(JsonFormatter().format(record("GPU %s", "GPU-a"))) == {
            "time": "2026-01-02T03:04:05.678Z",
            "level": "warning",
            "logger": "sgpu.daemon",
            "message": "GPU GPU-a",
        }

    def test_error(self) -> None:
        """With an error it is still a single line, the traceback in it. Other scripts stay readable."""
        line = JsonFormatter().format(record('it "went"\nwrong', error=raised()))
        assert "\n" not in line
        entry = json.loads(line)
        assert entry["message"] == 'it "went"\nwrong'
        assert entry["error"].startswith("Traceback ")
        assert entry["error"].endswith("ValueError: bröken\ntwice")
        assert "ö" in line


class TestConfigure:
    @pytest.mark.parametrize(
        ("log_format", "pattern"),
        [
            pytest.param("text", rf"{TIME} INFO 3 shares\n", id="text"),
            pytest.param("json", rf'{{"time": "{TIME}", .*"message": "3 shares"}}\n', id="json"),
        ],
    )
    def test_format(self, capsys: pytest.CaptureFixture[str], log_format: str, pattern: str) -> None:
        """The log is in the format that was set last, on standard error alone, and no message comes twice."""
        logs.configure("json" if log_format == "text" else "text", 1)
        logs.configure(log_format, 0)
        logging.getLogger("sgpu.daemon").debug("hidden")
        logging.getLogger("sgpu.daemon").info("%d shares", 3)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(pattern, captured.err)

    @pytest.mark.parametrize(
        ("verbosity", "shown"),
        [
            pytest.param(0, ["ours info", "ours warning", "theirs warning"], id="0"),
            pytest.param(1, ["ours debug", "ours info", "ours warning", "theirs warning"], id="1"),
            pytest.param(10, ["ours debug", "ours info", "ours warning", "theirs warning"], id="10"),
        ],
    )
    def test_verbosity(self, capsys: pytest.CaptureFixture[str], verbosity: int, shown: list[str]) -> None:
        """Debugging messages are shown from 1 on, and only ours; of libraries only warnings."""
        logs.configure("text", verbosity)
        for name, words in (("sgpu.rpc.server", "ours"), ("hpack", "theirs")):
            for level in (logging.DEBUG, logging.INFO, logging.WARNING):
                logging.getLogger(name).log(level, "%s %s", words, logging.getLevelName(level).lower())
        lines = capsys.readouterr().err.splitlines()
        assert [" ".join(line.split()[2:]) for line in lines] == shown

    @pytest.mark.parametrize("log_format", ["text", "json"])
    def test_not_encodable(self, capfd: pytest.CaptureFixture[str], log_format: str) -> None:
        """A file name that is not UTF-8 does not break the log."""
        logs.configure(log_format, 0)
        logging.getLogger("sgpu").info("/dev/%s", "a\udcff")
        sys.stderr.flush()
        (line,) = capfd.readouterr().err.splitlines()
        assert "/dev/a" in line


def test_printable() -> None:
    """A quoted text has neither line breaks nor bytes that are not UTF-8."""
    assert printable("é a\r\n\udcff") == r"é a\r\n\udcff"


class TestOnChange:
    @pytest.fixture
    def on_change(self, caplog: pytest.LogCaptureFixture) -> OnChange:
        """Reports warnings of `sgpu.test`."""
        caplog.set_level(logging.DEBUG)
        return OnChange(logging.getLogger("sgpu.test"), logging.WARNING)

    @pytest.mark.parametrize(
        ("reasons", "logged"),
        [
            pytest.param("aabb", "ab", id="another"),
            pytest.param("aba", "aba", id="an earlier one"),
            pytest.param("aa-aa", "aa", id="after it no longer held"),
        ],
    )
    def test_report(self, on_change: OnChange, caplog: pytest.LogCaptureFixture, reasons: str, logged: str) -> None:
        """A reason is logged when it is another than last time, or was cleared since."""
        for reason in reasons:
            on_change.clear() if reason == "-" else on_change.report(reason)
        assert caplog.messages == list(logged)

    def test_level_and_text(self, on_change: OnChange, caplog: pytest.LogCaptureFixture) -> None:
        """It logs at its level, with its logger, and the reason as it is."""
        on_change.report("100 %s of it")
        assert caplog.record_tuples == [("sgpu.test", logging.WARNING, "100 %s of it")]
