"""The log: one line a message, for people or for machines."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from sgpu import logs
from sgpu.logs import JsonFormatter, OnChange, TextFormatter

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
    made = logging.LogRecord(
        "sgpu.daemon",
        logging.WARNING,
        "daemon.py",
        1,
        message,
        arguments,
        (type(error), error, error.__traceback__) if error else None,
    )
    made.created, made.msecs = 1_767_323_045.678, 678.9
    return made


def raised() -> Exception:
    """An error with a traceback."""
    try:
        raise ValueError("bröken\ntwice")
    except ValueError as error:
        return error


class TestTextFormatter:
    def test_line(self) -> None:
        """Time in UTC to the millisecond, level, message with its arguments."""
        assert TextFormatter().format(record("GPU %s: %d shares", "GPU-a", 100)) == (
            "2026-01-02T03:04:05.678Z WARNING GPU GPU-a: 100 shares"
        )

    def test_percent(self) -> None:
        """A message without arguments is taken as it is."""
        assert TextFormatter().format(record("100 %s")).endswith("WARNING 100 %s")

    def test_error(self) -> None:
        """An error's traceback follows its message."""
        lines = TextFormatter().format(record("it went wrong", error=raised())).splitlines()
        assert lines[0] == "2026-01-02T03:04:05.678Z WARNING it went wrong"
        assert lines[1] == "Traceback (most recent call last):"
        assert lines[-2:] == ["ValueError: bröken", "twice"]


class TestJsonFormatter:
    def test_line(self) -> None:
        """One object with the time, the level, where from and what."""
        assert json.loads(JsonFormatter().format(record("GPU %s", "GPU-a"))) == {
            "time": "2026-01-02T03:04:05.678Z",
            "level": "warning",
            "logger": "sgpu.daemon",
            "message": "GPU GPU-a",
        }

    def test_error(self) -> None:
        """With an error it is still a single line, the traceback in it."""
        line = JsonFormatter().format(record('it "went"\nwrong', error=raised()))
        assert "\n" not in line
        entry = json.loads(line)
        assert entry["message"] == 'it "went"\nwrong'
        assert entry["error"].startswith("Traceback (most recent call last):\n")
        assert entry["error"].endswith("ValueError: bröken\ntwice")

    def test_readable(self) -> None:
        """Characters of other scripts stay readable."""
        assert "é…" in JsonFormatter().format(record("é…"))


class TestConfigure:
    @pytest.mark.parametrize(
        ("log_format", "pattern"),
        [
            pytest.param("text", rf"{TIME} INFO 3 shares", id="text"),
            pytest.param(
                "json",
                rf'{{"time": "{TIME}", "level": "info", "logger": "sgpu.daemon", "message": "3 shares"}}',
                id="json",
            ),
        ],
    )
    def test_format(self, capsys: pytest.CaptureFixture[str], log_format: str, pattern: str) -> None:
        """Each message is one line of that format on standard error, and nothing goes to standard output."""
        logs.configure(log_format, 0)
        logging.getLogger("sgpu.daemon").info("%d shares", 3)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(pattern + "\n", captured.err)

    def test_exception_in_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        """In JSON an exception too is one line, as collectors of container logs take lines for messages."""
        logs.configure("json", 0)
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("sgpu").exception("it went wrong")
        (line,) = capsys.readouterr().err.splitlines()
        assert json.loads(line)["error"].endswith("ValueError: broken")

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

    def test_twice(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Set up again, the log is as said last, and no message comes twice."""
        logs.configure("json", 1)
        logs.configure("text", 0)
        logger = logging.getLogger("sgpu")
        logger.debug("hidden")
        logger.info("shown")
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"{TIME} INFO shown", line)

    def test_not_encodable(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A file name that is not UTF-8 does not break the log."""
        logs.configure("json", 0)
        logging.getLogger("sgpu").info("/dev/%s", "a\udcff")
        sys.stderr.flush()
        assert json.loads(capfd.readouterr().err)["message"].startswith("/dev/a")


class TestOnChange:
    @pytest.fixture
    def on_change(self, caplog: pytest.LogCaptureFixture) -> OnChange:
        """Reports warnings of `sgpu.test`."""
        caplog.set_level(logging.DEBUG)
        return OnChange(logging.getLogger("sgpu.test"), logging.WARNING)

    @pytest.mark.parametrize(
        ("reasons", "logged"),
        [
            pytest.param("a", "a", id="the first"),
            pytest.param("aaa", "a", id="again and again"),
            pytest.param("aabb", "ab", id="another"),
            pytest.param("aba", "aba", id="an earlier one"),
        ],
    )
    def test_report(self, on_change: OnChange, caplog: pytest.LogCaptureFixture, reasons: str, logged: str) -> None:
        """A reason is logged when it is another than last time."""
        for reason in reasons:
            on_change.report(reason)
        assert caplog.messages == list(logged)

    def test_clear(self, on_change: OnChange, caplog: pytest.LogCaptureFixture) -> None:
        """A reason that comes back after it no longer held is news."""
        on_change.report("a")
        on_change.clear()
        on_change.report("a")
        on_change.report("a")
        assert caplog.messages == ["a", "a"]

    def test_level_and_text(self, on_change: OnChange, caplog: pytest.LogCaptureFixture) -> None:
        """It logs at its level, with its logger, and the reason as it is."""
        on_change.report("100 %s of it")
        assert caplog.record_tuples == [("sgpu.test", logging.WARNING, "100 %s of it")]

    def test_separate(self, on_change: OnChange, caplog: pytest.LogCaptureFixture) -> None:
        """Two of them do not know of each other."""
        on_change.report("a")
        OnChange(logging.getLogger("sgpu.test"), logging.INFO).report("a")
        assert caplog.messages == ["a", "a"]
