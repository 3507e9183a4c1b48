"""The prepared claims on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgpu.dra.checkpoint import load, save
from sgpu.node.claims import ClaimedUnit, Pod, PreparedClaim
from sgpu.node.shares import Share

UNIT = ClaimedUnit("s-1", "GPU-a", "r", (Share("GPU-a", 0), Share("GPU-a", 7)), 5, limited=False)
CLAIM = PreparedClaim("u-1", "team", "c", (Pod("p-1", "p"),), (UNIT,))


@pytest.mark.parametrize(("boot", "found"), [("boot", {"u-1": CLAIM}), ("another", {})], ids=["restart", "reboot"])
def test_loaded(tmp_path: Path, boot: str, found: object) -> None:
    """Claims outlive a restart, and not a reboot."""
    assert load(tmp_path, "boot") == {}
    save(tmp_path / "new", "boot", [CLAIM])
    assert load(tmp_path / "new", boot) == found


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="cut off"),
        pytest.param(json.dumps({"version": 2, "boot_id": "boot", "claims": []}), id="newer"),
        pytest.param(json.dumps({"version": 1, "boot_id": "boot", "claims": [{"uid": "u", "new": 1}]}), id="fields"),
        pytest.param("[]", id="no object"),
    ],
)
def test_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    """What can't be used is kept for a look, and the log says what that means."""
    (tmp_path / "claims.json").write_text(content)
    assert load(tmp_path, "boot") is None
    assert (tmp_path / "claims.json.unusable").read_text() == content
    assert load(tmp_path, "boot") == {}
    (record,) = caplog.records
    assert "are not counted until their pods start again" in record.message


def test_not_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is also said where that fails."""
    (tmp_path / "claims.json").mkdir()
    (tmp_path / "claims.json.unusable").touch()
    assert load(tmp_path, "boot") is None
    assert "can't be set aside" in caplog.text
