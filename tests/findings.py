"""How tests look at what the doctor found."""

from __future__ import annotations

from collections.abc import Iterable

from sgpu.commands.doctor.finding import Finding, Level


def find(findings: Iterable[Finding], subject: str) -> Finding:
    """Return the one finding whose subject starts with this."""
    (found,) = [finding for finding in findings if finding.subject.startswith(subject)]
    return found


def expect(finding: Finding, level: str, *facts: object, advice: str = "") -> None:
    """Check its level, the facts in its message, one in its advice, and that it has advice only where it should."""
    assert finding.level is Level(level), finding
    for fact in facts:
        assert str(fact) in finding.message, finding
    assert advice in finding.advice, finding
    assert bool(finding.advice) == (finding.level in (Level.WARN, Level.FAIL)), finding
