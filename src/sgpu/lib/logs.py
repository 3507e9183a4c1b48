"""The log: to standard error, one line a message, for people or for machines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from typing import Final

#: From this verbosity on, sgpu's own debugging messages are shown. Libraries' never are: h2 writes dozens a call.
DEBUG_VERBOSITY: Final = 1
#: Names in a line that could have hundreds.
MOST_NAMES: Final = 5


def configure(log_format: str, verbosity: int) -> None:
    """Set up the log for the whole process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("sgpu").setLevel(logging.DEBUG if verbosity >= DEBUG_VERBOSITY else logging.INFO)


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO message`."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {record.levelname} {printable(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def printable(text: str) -> str:
    """Return the text on one line: what a message quotes can have line breaks, or bytes that are not UTF-8."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def few(names: Collection[str]) -> str:
    """Return names for people, each once: the first ones, and how many more there are."""
    distinct = sorted(set(names))
    more = f" and {len(distinct) - MOST_NAMES} more" if len(distinct) > MOST_NAMES else ""
    return ", ".join(distinct[:MOST_NAMES]) + more


def cut(text: str, most: int) -> str:
    """Return the text if it has at most `most` characters; else as many of it, and an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}…"


class OnChange:
    """Logs a reason when it differs from the last one, so that retrying again and again logs one line."""

    def __init__(self, logger: logging.Logger, level: int) -> None:
        self._logger = logger
        self._level = level
        self._last = ""

    def report(self, reason: str) -> None:
        """Log `reason` unless it was the last one."""
        if reason != self._last:
            self._logger.log(self._level, "%s", reason)
        self._last = reason

    def update(self, reason: str) -> None:
        """Report `reason`, or clear the last one where it is empty."""
        if reason:
            self.report(reason)
        else:
            self.clear()

    def clear(self) -> None:
        """Forget the last reason: it no longer holds, so that it is news when it comes back."""
        self._last = ""


def _timestamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
