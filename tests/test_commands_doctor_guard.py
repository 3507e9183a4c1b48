"""The doctor on what the memory guard needs."""

from __future__ import annotations

import errno
from pathlib import Path

import attrs
import pytest
from findings import expect

from sgpu.commands.doctor.guard import check_guard
from sgpu.commands.doctor.host import Host
from sgpu.config.load import load
from sgpu.driver.messages import GpuReport, InstanceReport
from sgpu.node.figures import Figures
from sgpu.pods.processes import HOST_NAMESPACE

KNOWN, UNKNOWN = Figures(100, 50, 0, ()), Figures(100, 50, 0, None)
ALL, NONE = "000001ffffffffff", "0000000000000000"

CASES = {
    "all there": ("terminate", KNOWN, True, HOST_NAMESPACE, ALL, "ok", ["terminate"], ""),
    "no driver": ("terminate", None, True, HOST_NAMESPACE, ALL, "skip", [], ""),
    "no PodResources": ("terminate", KNOWN, False, HOST_NAMESPACE, ALL, "warn", ["nobody"], "PodResources"),
    "no hostPID": ("warn", KNOWN, True, "pid:[4026532281]", ALL, "warn", ["4026532281"], "hostPID"),
    "no figures": ("warn", UNKNOWN, True, HOST_NAMESPACE, ALL, "warn", ["GPU-a"], "-memory-guard off"),
    "may end nobody": ("terminate", KNOWN, True, HOST_NAMESPACE, NONE, "warn", ["KILL"], "root"),
    "need not": ("warn", KNOWN, True, HOST_NAMESPACE, NONE, "ok", ["warn"], ""),
}


@pytest.mark.parametrize(
    ("mode", "figures", "listed", "namespace", "capabilities", "level", "facts", "advice"), CASES.values(), ids=CASES
)
def test_each(
    tmp_path: Path,
    mode: str,
    figures: Figures | None,
    listed: bool,
    namespace: str,
    capabilities: str,
    level: str,
    facts: list[str],
    advice: str,
) -> None:
    """Say what is missing, for what the guard is told to do."""
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to(namespace)
    (tmp_path / "self/status").write_text(f"Name:\tpython3\nCapEff:\t{capabilities}\n")
    gpus = None if figures is None else [GpuReport("GPU-a", "T4", "0:3B:0.0", (), figures=figures)]
    settings = load({"memory-guard": mode, "proc-directory": str(tmp_path)}, {}).settings
    (finding,) = check_guard(settings, Host(proc=tmp_path), gpus, listed=listed)
    expect(finding, level, *facts, advice=advice)


def test_mig(tmp_path: Path) -> None:
    """Of a card in MIG mode its instances count."""
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to(HOST_NAMESPACE)
    instances = [InstanceReport(f"MIG-{each}", "A100 MIG 1g.5gb", "1g.5gb", 1, 0, 5, ()) for each in "ab"]
    seen = attrs.evolve(instances[0], figures=KNOWN)
    card = GpuReport("GPU-a", "A100", "0:3B:0.0", (), mig_mode=True, instances=(seen, instances[1]))
    settings = load({"memory-guard": "warn", "proc-directory": str(tmp_path)}, {}).settings
    (finding,) = check_guard(settings, Host(proc=tmp_path), [card], listed=True)
    expect(finding, "warn", "MIG instance MIG-b")


def test_old_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without descriptors of processes lets nobody be ended."""

    def pidfd_open(_: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("os.pidfd_open", pidfd_open)
    findings = check_guard(load({"memory-guard": "terminate"}, {}).settings, Host(proc=tmp_path), [], listed=True)
    expect(findings[-1], "warn", "not implemented", advice="Linux 5.3")
