"""The doctor on what memory limits need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgpu.commands.doctor.finding import Finding, Level
from sgpu.commands.doctor.limits import check_limits
from sgpu.config.load import load
from sgpu.driver.messages import GpuReport, Report


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    """A tree in which all is well, with the dmem controller."""
    parent = tmp_path / "kubepods"
    (parent / "burstable").mkdir(parents=True)
    for directory in (tmp_path, parent, parent / "burstable"):
        (directory / "cgroup.controllers").write_text("cpu dmem\n")
        (directory / "cgroup.subtree_control").write_text("cpu dmem\n")
    (parent / "dmem.max").touch()
    return tmp_path


def check(cgroups: Path, driver: str | None = "615.36", limits: str = "fair") -> list[Finding]:
    report = driver and Report((), (), (), driver, "/l")
    loaded = load({"cgroup-directory": str(cgroups), "memory-limits": limits}, {})
    return list(check_limits(loaded, report or None))


def remove_kubelet(root: Path) -> None:
    (root / "kubepods").rename(root / "system")


@pytest.mark.parametrize(
    ("change", "level", "fact"),
    [
        pytest.param(lambda root: None, "ok", "dmem keeps", id="dmem"),
        pytest.param(lambda root: (root / "kubepods/dmem.max").unlink(), "ok", "the driver itself keeps", id="misc"),
        pytest.param(lambda root: (root / "cgroup.controllers").unlink(), "FAIL", "cgroup v2", id="cgroup v1"),
        pytest.param(remove_kubelet, "FAIL", "the kubelet has no cgroup", id="no kubelet"),
        pytest.param(
            lambda root: (root / "kubepods/burstable/cgroup.subtree_control").write_text("cpu\n"),
            "warn",
            "kubepods/burstable/cgroup.subtree_control lacks dmem",
            id="no dmem on the way",
        ),
        pytest.param(
            lambda root: (root / "kubepods/cgroup.controllers").unlink(), "ok", "dmem keeps", id="a file is missing"
        ),
    ],
)
def test_cgroups(cgroups: Path, change: Callable[[Path], object], level: str, fact: str) -> None:
    """Find the kubelet's cgroups, and who keeps limits in them."""
    change(cgroups)
    found = check(cgroups)[0]
    assert (found.level, bool(found.advice)) == (Level(level), level != "ok")
    assert fact in found.message


def test_read_only(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree has to be writable."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert (check(cgroups)[0].level, "read-only" in check(cgroups)[0].message) == (Level.FAIL, True)


@pytest.mark.parametrize(
    ("driver", "level"),
    [("615.36.01", "ok"), ("700.1", "ok"), ("614.99", "FAIL"), ("580.159.04", "FAIL"), ("?", "FAIL"), (None, "skip")],
)
def test_driver(cgroups: Path, driver: str | None, level: str) -> None:
    """The driver's branch has to be R615 or later."""
    assert check(cgroups, driver)[1].level is Level(level)


def test_mig(cgroups: Path) -> None:
    """Nobody is limited within a MIG instance, which the driver's version does not change."""
    gpu = GpuReport("GPU-a", "A100", "0:3B:0.0", (), mig_mode=True)
    report = Report((gpu,), (), (), "615.1", "/l")
    loaded = load({"cgroup-directory": str(cgroups), "memory-limits": "fair"}, {})
    assert "MIG instances" in list(check_limits(loaded, report))[-1].message


def test_off(tmp_path: Path) -> None:
    """Without limits nothing is needed."""
    (finding,) = check(tmp_path, "470.1", "off")
    assert finding.level is Level.OK
