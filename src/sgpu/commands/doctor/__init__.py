"""`sgpu doctor`: why does this node offer no shares, or pods not get along with them? One line a check.

It only looks: it writes nothing, registers nowhere and listens on nothing, so that it can run beside the daemon. The
driver is asked by a process of its own, as the daemon does it; whatever may hang has a deadline.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio

from sgpu.commands.doctor.checks import examine
from sgpu.commands.doctor.finding import Finding, Level
from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.surroundings import memory_warning
from sgpu.config.load import Loaded
from sgpu.lib.logs import printable
from sgpu.lib.output import checked_output


def doctor(loaded: Loaded, output: str, host: Host | None = None) -> bool:
    """Print all findings as `text` or `json`. Returns whether nothing has failed."""
    host = host or Host(sysfs=Path(loaded.settings.sysfs_directory))
    if warning := memory_warning(host):
        print(f"sgpu: {warning}", file=sys.stderr, flush=True)
    findings = trio.run(examine, loaded, host)
    with checked_output():
        print(as_json(findings) if output == "json" else as_text(findings))
    return healthy(findings)


def healthy(findings: list[Finding]) -> bool:
    """Return whether no check failed; a warning is no failure."""
    return not any(finding.level is Level.FAIL for finding in findings)


def as_text(findings: list[Finding]) -> str:
    """Return a line for each finding, and a count of each level."""
    counts = [f"{sum(finding.level is level for finding in findings)} {level.value}" for level in Level]
    return "\n".join([*(printable(str(finding)) for finding in findings), ", ".join(counts)])


def as_json(findings: list[Finding]) -> str:
    """Return one JSON object: whether no check failed, and the findings in the same order."""
    fields = [
        {"level": finding.level.value, "subject": finding.subject, "message": finding.message, "advice": finding.advice}
        for finding in findings
    ]
    return json.dumps({"healthy": healthy(findings), "findings": fields}, indent=2, ensure_ascii=False)
