"""The doctor's output and exit code."""

from __future__ import annotations

import json

import pytest
import trio

from sgpu.commands.doctor import doctor
from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.host import Host
from sgpu.config.load import Loaded, load


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """The findings that the doctor returns; to be filled."""
    found: list[Finding] = []

    async def examine(loaded: Loaded, host: Host) -> list[Finding]:
        await trio.lowlevel.checkpoint()
        return found

    monkeypatch.setattr("sgpu.commands.doctor.examine", examine)
    return found


def test_text(findings: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    """Each finding is one line, whatever is quoted in it, and each level is counted; one failure is a failure."""
    findings += [ok("a", "well"), warn("b", "so\nso", "rest"), fail("c", "ill", "operate"), skip("d", "because of c")]
    assert not doctor(load({}, {}), "text")
    ok_, warn_, fail_, skip_, counts = capsys.readouterr().out.splitlines()
    assert (ok_, warn_, fail_) == ("ok    a: well", r"warn  b: so\nso → rest", "FAIL  c: ill → operate")
    assert skip_.startswith("skip  d: ")
    assert skip_.endswith("because of c")
    assert counts == "1 ok, 1 warn, 1 FAIL, 1 skip"


def test_json(findings: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    """The same is there for programs; a warning is no failure."""
    findings += [ok("a", "well"), warn("b", "soso", "rest")]
    assert doctor(load({}, {}), "json")
    assert json.loads(capsys.readouterr().out) == {
        "healthy": True,
        "findings": [
            {"level": "ok", "subject": "a", "message": "well", "advice": ""},
            {"level": "warn", "subject": "b", "message": "soso", "advice": "rest"},
        ],
    }
