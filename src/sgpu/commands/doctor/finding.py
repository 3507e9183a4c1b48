"""The result of a check, as a value: one line for a person, one object for a machine. Imports nothing of sgpu."""

from __future__ import annotations

import enum

import attrs


class Level(enum.Enum):
    """Severity. `skip` is no result: the check depends on another that failed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"
    SKIP = "skip"


@attrs.frozen
class Finding:
    """One check: what it was about, what was seen, and what to do about it (empty where nothing is)."""

    level: Level
    subject: str
    message: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f" → {self.advice}" if self.advice else ""
        return f"{self.level.value:<4}  {self.subject}: {self.message}{advice}"


def ok(subject: str, message: str) -> Finding:
    """Report that the subject is as it should be."""
    return Finding(Level.OK, subject, message)


def warn(subject: str, message: str, advice: str) -> Finding:
    """Report that the node can offer shares, but fewer than it could, or not for long."""
    return Finding(Level.WARN, subject, message, advice)


def fail(subject: str, message: str, advice: str) -> Finding:
    """Report that the node can't offer shares, or pods can't use them, until this is fixed."""
    return Finding(Level.FAIL, subject, message, advice)


def skip(subject: str, why: str) -> Finding:
    """Report that the subject was not checked, because of something that another line says."""
    return Finding(Level.SKIP, subject, f"not checked, {why}")
