"""The doctor with settings that use the API server."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from fake_api_server import Answer, FakeApiServer, serving

from sgpu import kubeapi
from sgpu.commands.doctor import rights
from sgpu.commands.doctor.checks import checks
from sgpu.commands.doctor.finding import Finding, Level
from sgpu.commands.doctor.rights import EVENTS, NODE_LABELS
from sgpu.config.load import load
from sgpu.observe import event_writer, node_labels


def check(needs: rights.Needs = NODE_LABELS) -> Finding:
    return trio.run(rights.check_rights, needs, "", {})


def reviewed(*allowed: bool) -> list[Answer]:
    return [Answer(201, {"status": {"allowed": each}}) for each in allowed]


@pytest.mark.parametrize(
    ("answers", "level", "fact"),
    [
        pytest.param(reviewed(True), Level.OK, "get and patch nodes", id="all"),
        pytest.param(reviewed(True, False), Level.FAIL, "may not patch nodes", id="not all"),
        pytest.param([Answer(201, {})], Level.FAIL, "may not get and patch nodes", id="no verdict"),
        pytest.param([Answer(403, {"message": "no"})], Level.FAIL, "403 no", id="not even to ask"),
    ],
)
def test_rights(
    answers: list[Answer], level: Level, fact: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the API server says of this account decides."""
    server = FakeApiServer()
    server.instead[f"POST {rights.PATH}"] = answers
    with serving(server, tmp_path) as access:
        monkeypatch.setattr(kubeapi, "find_access", lambda *_: access)
        finding = check()
        assert finding.level is level
        assert fact in finding.message
        monkeypatch.setattr(rights, "TIMEOUT", 0)
        assert "no answer" in check().message


def test_not_in_a_pod() -> None:
    """There is nobody to ask."""
    finding = check(EVENTS)
    assert finding.level is Level.FAIL
    assert "-events needs sgpu to run in a pod" in finding.message


def test_only_where_it_is_used() -> None:
    """The API server is asked for the settings that need it, and what the daemon names is named here, too."""
    flags = {"events": "true", "node-labels": "api"}
    assert {"-events", "-node-labels api"} <= {each.subject for each in checks(load(flags, {}))}
    assert not {"-events", "-node-labels api"} & {each.subject for each in checks(load({}, {}))}
    assert (EVENTS.manifest, NODE_LABELS.manifest) == (event_writer.MANIFEST, node_labels.MANIFEST)
