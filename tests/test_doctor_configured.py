"""The doctor on settings: those that fight each other, the node's GPUs, or the daemon that runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, short_directory
from findings import told

from sgpu.device import Device
from sgpu.doctor.configured import check_daemon_settings, check_rules, check_settings
from sgpu.doctor.host import Host
from sgpu.load import Loaded, load
from sgpu.simulation import simulated_devices


def loaded(tmp_path: Path, **flags: str) -> Loaded:
    """With a state file that can be written, unless told otherwise."""
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    return load({"state-file": str(tmp_path / "state.json"), **given}, {})


def test_settings(tmp_path: Path) -> None:
    """The defaults get along."""
    (finding,) = check_settings(loaded(tmp_path), Host(proc=tmp_path, sysfs=tmp_path))
    assert told(finding, "ok", "none contradicts another")


@pytest.mark.parametrize(
    ("flags", "level", "words"),
    [
        pytest.param({"container_path": "/usr/lib/"}, "FAIL", "is mounted over what images have", id="over the image"),
        pytest.param({"simulate": "2"}, "warn", "on a node with a driver", id="simulation on a GPU node"),
        pytest.param({"simulate_faults": "/f"}, "warn", "does nothing without -simulate", id="faults of nothing"),
        pytest.param({"multi_share": "strict-distinct"}, "warn", "UnexpectedAdmissionError", id="strict"),
        pytest.param({"sample_interval": "600"}, "warn", "is long for -memory-watermark", id="late samples"),
        pytest.param({"state_file": "/dev/null/a/state"}, "warn", "(/dev/null: it is not a", id="state file"),
    ],
)
def test_contradictions(tmp_path: Path, flags: Mapping[str, str], level: str, words: str) -> None:
    """Each is a line, with what to do."""
    (tmp_path / "module/nvidia").mkdir(parents=True)
    (tmp_path / "module/nvidia/version").write_text("550.54.15\n")
    (finding,) = check_settings(loaded(tmp_path, **flags), Host(proc=tmp_path, sysfs=tmp_path))
    assert told(finding, level, words)


def test_no_contradiction(tmp_path: Path) -> None:
    """What is switched off can't contradict."""
    flags = {"sample_interval": "600", "memory_watermark": "0", "state_file": "", "simulate": "1"}
    (finding,) = check_settings(loaded(tmp_path, **flags), Host(proc=tmp_path, sysfs=tmp_path))
    assert told(finding, "ok", "none")


# Rules


def with_rules(tmp_path: Path, rules: str) -> Loaded:
    """With this text for `gpus`."""
    path = tmp_path / "config.yaml"
    path.write_text(f"gpus: {rules}\n")
    return load({"config": str(path)}, {})


GPUS = simulated_devices(2, 100)


@pytest.mark.parametrize(
    ("rules", "level", "words"),
    [
        pytest.param("[]", "ok", "2 GPU(s) are offered as 200 x deepomatic.com/shared-gpu", id="none"),
        pytest.param(
            "[{name: '*1', resource: example.com/whole, shares: 1}]",
            "ok",
            "100 x deepomatic.com/shared-gpu, 1 x example.com/whole",
            id="two resources",
        ),
        pytest.param("[{name: '*', exclude: true}]", "FAIL", "every GPU is excluded", id="all excluded"),
        pytest.param("[{name: '*1', shares: 1}, {name: 'sim*', shares: 2}]", "FAIL", "claimed twice", id="twice"),
        pytest.param("[{name: '*', shares: 100000}]", "FAIL", "do not fit the kubelet's message", id="too many"),
    ],
)
def test_rules(tmp_path: Path, rules: str, level: str, words: str) -> None:
    """What the GPUs are offered as, or why the daemon will not start."""
    (finding,) = check_rules(with_rules(tmp_path, rules), GPUS)
    assert told(finding, level, words)


def test_rule_about_nothing(tmp_path: Path) -> None:
    """A rule for cards that are not here is named with its place."""
    unmatched, _ = check_rules(with_rules(tmp_path, "[{name: '*H100*', shares: 1}]"), GPUS)
    assert told(unmatched, "warn", f"`name: *H100*` ({tmp_path}/config.yaml:1) is about no GPU")


@pytest.mark.parametrize(("devices", "level"), [(None, "skip"), ((), "FAIL")])
def test_no_gpus(tmp_path: Path, devices: tuple[Device, ...] | None, level: str) -> None:
    """GPUs that are not known can't be divided."""
    (finding,) = check_rules(loaded(tmp_path), devices)
    assert told(finding, level, "")


# The daemon that runs


def test_daemon_settings() -> None:
    """The flags and the environment of a running daemon, held against those given here."""
    with (
        short_directory() as root,
        DaemonProcess(root, root, ["-simulate", "2"], env={"SGPU_PLACEMENT": "pack"}) as daemon,
    ):
        daemon.wait_log("SIMULATED")
        flags = {"plugin-directory": str(root), "host-path": str(root), "simulate": "2"}
        finding = check_daemon_settings(load({**flags, "placement": "pack"}, {}), Path("/proc"), daemon.pid)
        assert told(finding, "ok", "settings that were checked here")
        finding = check_daemon_settings(load(flags, {}), Path("/proc"), daemon.pid)
        assert told(finding, "warn", "it runs with -placement pack (here spread)", "give the doctor the daemon's flags")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        pytest.param(b"/usr/bin/sgpu\0-placement=pack\0", "-placement pack (here spread)", id="console script"),
        pytest.param(b"python\0-m\0sgpu\0-state-file=\0", "-state-file empty (here /run/", id="emptied"),
        pytest.param(b"python\0-m\0sgpu\0-config\0{config}\0", "-v 1 (here 0)", id="quiet"),
        pytest.param(b"python\0-m\0sgpu\0-config\0{config}\0", "other rules per GPU", id="rules"),
    ],
)
def test_other_settings(tmp_path: Path, command: bytes, words: str) -> None:
    """What differs is named; how much is logged makes no difference."""
    (tmp_path / "config").write_text("v: 1\ngpus: [{name: x, shares: 1}]\n")
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cmdline").write_bytes(command.replace(b"{config}", bytes(tmp_path / "config")))
    (tmp_path / "7/environ").write_bytes(b"A=B\0nonsense\0")
    finding = check_daemon_settings(load({}, {}), tmp_path, 7)
    if words.startswith("-v"):
        assert words not in finding.words
    else:
        assert told(finding, "warn", words)


@pytest.mark.parametrize(
    "command", [None, b"", b"/bin/sh\0", b"python\0-m\0sgpu\0demo\0", b"sgpu\0-unknown\0"], ids=repr
)
def test_no_daemon(tmp_path: Path, command: bytes | None) -> None:
    """A process that is not visible, or no daemon."""
    (tmp_path / "7").mkdir()
    if command is not None:
        (tmp_path / "7/cmdline").write_bytes(command)
        (tmp_path / "7/environ").touch()
    assert told(check_daemon_settings(load({}, {}), tmp_path, 7), "skip", "can't be read")
