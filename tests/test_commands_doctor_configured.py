"""The doctor on settings that contradict each other, the node's GPUs, or the daemon that runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from findings import expect

from sgpu.commands.doctor.configured import LONG_INTERVAL, check_daemon_settings, check_rules, check_settings
from sgpu.commands.doctor.finding import Finding, Level
from sgpu.commands.doctor.host import Host
from sgpu.config.load import Loaded, load
from sgpu.driver.simulated import simulated_gpus
from sgpu.node.gpu import Gpu

SHARED, WHOLE = "deepomatic.com/shared-gpu", "example.com/whole"


def checked(tmp_path: Path, flags: Mapping[str, str]) -> list[Finding]:
    """Check settings, with a state file that can be written unless the flags say otherwise."""
    given = {"state-file": str(tmp_path / "state.json"), **flags}
    return list(check_settings(load(given, {}), Host(proc=tmp_path, sysfs=tmp_path)))


CONTRADICTIONS = {
    "over the image's files": ({"container-path": "/usr/lib/"}, "FAIL", "/usr/lib"),
    "over the image's root directories": ({"container-path": "/lib64"}, "FAIL", "/lib64"),
    "simulation on a node with a driver": ({"simulate": "2"}, "warn", "-simulate 2"),
    "faults of nothing": ({"simulate-faults": "/f"}, "warn", "-simulate-faults"),
    "faults that are no file": ({"simulate": "1", "simulate-faults": "/dev/zero"}, "warn", "/dev/zero"),
    "strict": ({"multi-share": "strict-distinct"}, "warn", "UnexpectedAdmissionError"),
    "interval too long for the watermark": ({"sample-interval": "61"}, "warn", "-memory-watermark"),
    "guard's settings without it": ({"memory-guard-grace": "5"}, "warn", "-memory-guard is off"),
    "guard that never acts": ({"memory-guard": "warn", "memory-guard-threshold": "1"}, "warn", "never"),
    "guard of nothing": ({"memory-guard": "warn", "simulate": "1"}, "warn", "-simulate 1"),
    "interval too long for the guard": ({"sample-interval": "61", "memory-guard": "warn"}, "warn", "-memory-guard"),
    "state file": ({"state-file": "/dev/null/a/state"}, "warn", "/dev/null/a/state"),
}


@pytest.mark.parametrize(("flags", "level", "fact"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(tmp_path: Path, flags: Mapping[str, str], level: str, fact: str) -> None:
    """Each contradiction is a line that names the setting."""
    if not {"memory-guard", "simulate-faults"} & set(flags):
        (tmp_path / "module/nvidia").mkdir(parents=True)
        (tmp_path / "module/nvidia/version").write_text("550.54.15\n")
    (finding,) = checked(tmp_path, flags)
    expect(finding, level, fact, *(f"-{name}" for name in flags))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"sample-interval": str(LONG_INTERVAL)},
        {"sample-interval": "600", "memory-watermark": "0"},
        {"state-file": ""},
        {"state-file": "{tmp}/directory/that/is/made"},
        {"simulate": "1", "simulate-faults": "/f"},
    ],
    ids=str,
)
def test_no_contradiction(tmp_path: Path, flags: Mapping[str, str]) -> None:
    """Settings that get along are one line."""
    (finding,) = checked(tmp_path, {name: value.replace("{tmp}", str(tmp_path)) for name, value in flags.items()})
    expect(finding, "ok")


def test_warnings_of_loading(tmp_path: Path) -> None:
    """A warning about the settings is a finding, too."""
    findings = checked(tmp_path, {"sample-interval": "2", "health-interval": "3"})
    (warning,) = [finding for finding in findings if finding.level is not Level.OK]
    expect(warning, "warn", "-sample-interval 2", "-health-interval 3", advice="leave one out")


# Rules

GPUS = simulated_gpus(2)


def with_rules(tmp_path: Path, rules: str) -> Loaded:
    """Load a file with this text for `gpus`."""
    path = tmp_path / "config.yaml"
    path.write_text(f"gpus: [{rules}]\n")
    return load({"config": str(path)}, {})


RULES = {
    "none": ("", "ok", ["2 GPU", f"200 x {SHARED}"]),
    "two resources": (f"{{name: '*1', resource: {WHOLE}, shares: 1}}", "ok", [f"100 x {SHARED}", f"1 x {WHOLE}"]),
    "all excluded": ("{name: '*', exclude: true}", "FAIL", []),
    "conflict": ("{name: '*1', shares: 1}, {name: 'sim*', shares: 2}", "FAIL", ["*1", "sim*"]),
    "too many shares": ("{name: '*', shares: 100000}", "FAIL", ["200000"]),
}


@pytest.mark.parametrize(("rules", "level", "facts"), RULES.values(), ids=RULES)
def test_rules(tmp_path: Path, rules: str, level: str, facts: list[str]) -> None:
    """The GPUs are offered as this, or the daemon does not start."""
    (finding,) = check_rules(with_rules(tmp_path, rules), GPUS)
    expect(finding, level, *facts)


def test_rule_that_matches_nothing(tmp_path: Path) -> None:
    """A rule for GPUs that are not here is named with its place; one that matches is not."""
    rules = with_rules(tmp_path, "{name: '*H100*', shares: 1}, {name: '*1', shares: 2}")
    unmatched, offered = check_rules(rules, GPUS)
    expect(unmatched, "warn", "*H100*", f"{tmp_path}/config.yaml:1")
    expect(offered, "ok")


@pytest.mark.parametrize(("gpus", "level"), [(None, "skip"), ((), "FAIL")], ids=["unknown", "none"])
def test_no_gpus(gpus: tuple[Gpu, ...] | None, level: str) -> None:
    """GPUs that are not known can't be offered; a node without any offers nothing."""
    (finding,) = check_rules(load({}, {}), gpus)
    expect(finding, level)


# The daemon that runs


def checked_daemon(tmp_path: Path, command: str | None, environment: str = "") -> Finding:
    """Check the settings of process 7, which has this command line and environment."""
    (tmp_path / "7").mkdir()
    if command is not None:
        (tmp_path / "7/cmdline").write_text("".join(f"{argument}\0" for argument in command.split()))
        (tmp_path / "7/environ").write_text(environment)
    return check_daemon_settings(load({"placement": "spread"}, {}), tmp_path, 7)


DAEMONS = {
    "same": ("python -m sgpu", "A=B\0nonsense\0", "ok", []),
    "another log": ("python -m sgpu -v 3 -log-format=json", "", "ok", []),
    "console script": ("/usr/bin/sgpu -placement=pack", "", "warn", ["-placement pack", "spread"]),
    "environment": ("sgpu", "SGPU_PLACEMENT=pack\0", "warn", ["-placement pack", "spread"]),
    "emptied": ("python -m sgpu -state-file=", "", "warn", ["-state-file empty", "/run/"]),
    "rules": ("python -m sgpu -config {config}", "", "warn", ["rules"]),
}


@pytest.mark.parametrize(("command", "environment", "level", "facts"), DAEMONS.values(), ids=DAEMONS)
def test_daemon_settings(tmp_path: Path, command: str, environment: str, level: str, facts: list[str]) -> None:
    """Settings of the daemon that differ are named with both values; how much it logs makes no difference."""
    (tmp_path / "config").write_text("gpus: [{name: x, shares: 1}]\n")
    expect(checked_daemon(tmp_path, command.format(config=tmp_path / "config"), environment), level, *facts)


@pytest.mark.parametrize("command", [None, "", "/bin/sh", "python -m sgpu demo", "sgpu -unknown", "a b c d sgpu"])
def test_no_daemon(tmp_path: Path, command: str | None) -> None:
    """A process that is not visible, or no daemon, has no settings to compare."""
    expect(checked_daemon(tmp_path, command), "skip")
