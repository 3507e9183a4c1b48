"""Looking at what the doctor found."""

from __future__ import annotations

from collections.abc import Iterable

from sgpu.doctor.finding import Finding, Level


def about(findings: Iterable[Finding], subject: str) -> Finding:
    """The one finding whose subject begins like that."""
    (found,) = [finding for finding in findings if finding.subject.startswith(subject)]
    return found


def told(finding: Finding, level: str, words: str, advice: str = "") -> bool:
    """Whether it is of that level and has those words and that advice in it; fails with what it has."""
    assert finding.level is Level(level), finding
    assert words in finding.words, finding
    assert advice in finding.advice, finding
    assert bool(finding.advice) == (finding.level in (Level.WARN, Level.FAIL)), finding
    return True
