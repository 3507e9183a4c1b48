"""The cordoned GPUs on disk: what outlives a restart and a reboot, and files that can't be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import attrs
import pytest

from sgpu.driver.cordon_file import ASIDE, load, save
from sgpu.node.gpu import Cordon, Gpu

CORDON = Cordon("bad row", 7.5, released=True)
GPU = Gpu(
    "GPU-a", "A100", "00000000:3B:00.0", ("nvidia0",), 900, 1000, 1, mig_mode=True, mig_pending=True, cordon=CORDON
)
OTHER = Gpu("GPU-b", "T4", "00000000:5E:00.0", (), cordon=Cordon("", 8.0))
BOTH = {GPU.uuid: GPU, OTHER.uuid: OTHER}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lib" / "cordon.json"


def test_round_trip(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that can be shown of a GPU while nobody may open it outlives a restart; the file is its owner's alone."""
    assert load(path, "boot") == {}
    save(path, "boot", BOTH)
    assert load(path, "boot") == BOTH
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert caplog.messages == []


def test_reboot(path: Path) -> None:
    """A cordon outlives it, and each card is looked at once before it is released again."""
    save(path, "boot", BOTH)
    again = load(path, "another boot")
    assert again == {**BOTH, GPU.uuid: attrs.evolve(GPU, cordon=attrs.evolve(CORDON, released=False))}


ENTRY: dict[str, object] = {
    "uuid": "GPU-a", "name": "T4", "pci_bus_id": "", "memory_bytes": None, "memory_total": 5, "numa_node": None,
    "mig_mode": False, "mig_pending": False, "device_nodes": [],
    "cordon": {"reason": "", "since": 1, "released": False},
}  # fmt: skip


def content(**changes: object) -> str:
    return json.dumps({"version": 1, "boot_id": "boot", "cordons": [{**ENTRY, **changes}]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2}',
        '{"version": 1, "boot_id": "boot"}',
        content(cordon=None),
        content(uuid=5),
        content(memory_total="5"),
        content(device_nodes=[5]),
        content(cordon={"reason": "", "since": "NaN", "released": False}),
        content(cordon={"reason": "", "since": 10**400, "released": False}),
        "[" * 100_000,
    ],
    ids=["empty", "list", "newer", "short", "no cordon", "uuid", "memory", "nodes", "NaN", "overflow", "deep"],
)
def test_unusable(path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Set a file aside that can't be used, with a warning, for whoever wants to know; then start anew."""
    save(path, "boot", {})
    path.write_text(text)
    assert load(path, "boot") == {}
    assert path.with_name(path.name + ASIDE).read_text() == text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    save(path, "boot", BOTH)
    assert load(path, "boot") == BOTH


def test_usable() -> None:
    """The entry that the cases above spoil is none of them."""
    assert json.loads(content())["cordons"] == [ENTRY]


def test_not_even_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Say so where the file can't even be set aside, and go on."""
    (tmp_path / f"file{ASIDE}").mkdir()
    (tmp_path / "file").write_text("")
    assert load(tmp_path / "file", "boot") == {}
    assert len(caplog.records) == 2
