"""The doctor's list of checks: what runs, in which order, in time, and without a trace."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from findings import expect, find
from node import RESOURCE, Node
from stub_driver import StubGpu
from trio.testing import MockClock

from sgpu.commands.doctor import checks, driver, kubelet, peer, served, surroundings
from sgpu.commands.doctor.checks import Check, Facts, examine
from sgpu.commands.doctor.finding import Finding, Level, ok
from sgpu.commands.doctor.host import Host
from sgpu.config.load import load
from sgpu.lib.concurrency import find_error


def flags(node: Node, **others: str) -> dict[str, str]:
    """Those of the node's daemon."""
    places = {"plugin-directory": node.plugins, "host-path": node.host, "state-file": node.state}
    places |= {"pod-resources-socket": node.pods, "dev-directory": node.dev, "sysfs-directory": node.sys}
    places |= {"proc-directory": node.proc, "container-log-directory": node.logs}
    places["cordon-file"] = node.state.with_name("cordon.json")
    texts = {name: str(path) for name, path in places.items()}
    return {**texts, "metrics-address": "", "status-socket": "", "health-interval": "0.3", **others}


# How checks run


def check_all(monkeypatch: pytest.MonkeyPatch, *todo: Check) -> list[Finding]:
    """Run these checks on a virtual clock, in place of the real ones."""
    monkeypatch.setattr(checks, "checks", lambda loaded, chosen: todo)
    return trio.run(examine, load({}, {}), Host(), clock=MockClock(autojump_threshold=0))


def after(
    seconds: float, subject: str = "", error: Exception | None = None
) -> Callable[[Facts], Awaitable[list[Finding]]]:
    """Return a check that takes some time, then finds when it ended, or raises an error."""

    async def run(facts: Facts) -> list[Finding]:
        await trio.sleep(seconds)
        if error:
            raise error
        return [ok(subject, f"at {trio.current_time():g}")]

    return run


def test_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings come in the order of the list, and a check begins when those that it needs have ended."""
    first, second, third, fourth = check_all(
        monkeypatch,
        Check("a", after(3, "a")),
        Check("b", after(1, "b"), needs=("a", "c")),
        Check("c", after(2, "c")),
        Check("d", after(1, "d")),
    )
    for finding, end in ((first, 3), (second, 4), (third, 2), (fourth, 1)):
        expect(finding, "ok", f"at {end}")


def test_hanging_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that does not end in time fails; the others, and those that need it, have their say."""
    monkeypatch.setattr(checks, "DEADLINE", 5.0)
    quick, hung, needing, late = check_all(
        monkeypatch,
        Check("quick", after(0, "quick")),
        Check("hung", after(1000)),
        Check("needing", after(0), needs=("hung",)),
        Check("late", after(4.9, "late")),
    )
    expect(quick, "ok")
    expect(late, "ok")
    assert hung.subject == "hung"
    expect(hung, "FAIL", "5 s", advice="dmesg")
    assert needing.subject == "needing"
    assert needing.level is not Level.OK


def test_hanging_file_system(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a file that does not return is left behind."""
    returns = threading.Event()
    monkeypatch.setattr(surroundings, "check_memory", lambda host: returns.wait(60))
    monkeypatch.setattr(checks, "DEADLINE", 1.0)
    try:
        findings = trio.run(examine, load(flags(node, simulate="1"), {}), Host(sysfs=node.sys))
    finally:
        returns.set()
    expect(find(findings, "memory limit"), "FAIL", "1 s", advice="dmesg")


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in a group"])
def test_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    """A system error, as for someone who is not root, fails that check alone."""
    error: Exception = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/private")
    error = ExceptionGroup("", [error]) if grouped else error
    refused, needing = check_all(
        monkeypatch, Check("refused", after(0, error=error)), Check("needing", after(0, "needing"), needs=("refused",))
    )
    assert refused.subject == "refused"
    expect(refused, "FAIL", os.strerror(errno.EACCES), "/private", advice="root")
    expect(needing, "ok")


def test_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is no problem of the node ends the command as it is."""
    with pytest.raises(ExceptionGroup) as caught:
        check_all(monkeypatch, Check("bug", after(0, error=ZeroDivisionError())))
    assert find_error(caught.value, ZeroDivisionError)


def test_deadlines() -> None:
    """Calls time out before their check does, so that their own finding is shown."""
    waits = {"NVML": driver.DEADLINE + driver.REAP_TIMEOUT, "socket": peer.TIMEOUT, "PodResources": kubelet.TIMEOUT}
    waits["metrics, after the daemon's socket, and status"] = peer.TIMEOUT + 2 * served.TIMEOUT
    assert max(waits.values()) < checks.DEADLINE


# Which checks there are


def test_simulated_gpus(node: Node) -> None:
    """With simulated GPUs, neither the driver nor processes are looked at."""
    findings = trio.run(examine, load(flags(node, simulate="3"), {}), Host(sysfs=node.sys), clock=MockClock())
    gpus, rules, _, directory, *rest = findings
    expect(gpus, "ok", "-simulate 3")
    expect(rules, "ok", f"300 x {RESOURCE}")
    assert directory.subject == "plugin directory"
    assert not {"host's processes", "container logs"} & {finding.subject for finding in rest}
    assert not node.driver.call_log()


def test_resources(node: Node, tmp_path: Path) -> None:
    """Each resource of the rules has its daemon and its registration, if a GPU is offered as it."""
    config = tmp_path / "c.yaml"
    config.write_text("gpus: [{name: '*', resource: example.com/whole, shares: 1}]")
    findings = trio.run(examine, load({**flags(node), "config": str(config)}, {}), Host(), clock=MockClock())
    expect(find(findings, "daemon for example.com/whole"), "warn")
    expect(find(findings, "registration of example.com/whole"), "skip")
    expect(find(findings, f"daemon for {RESOURCE}"), "skip", "no GPU")


def test_library_that_is_missing(node: Node) -> None:
    """Without a library the driver is not asked, and what needs its answer says so."""
    node.driver.path.unlink()
    findings = trio.run(examine, load(flags(node), {}), Host(sysfs=node.sys), clock=MockClock())
    for subject in ("NVML", "GPUs", "rules per GPU"):
        expect(find(findings, subject), "skip")


def test_wsl(node: Node) -> None:
    """Its first line says that it is not supported."""
    for path in node.dev.iterdir():
        path.unlink()
    (node.dev / "dxg").touch()
    first, *_ = trio.run(examine, load(flags(node), {}), Host(sysfs=node.sys), clock=MockClock())
    expect(first, "FAIL", "WSL", "/dev/dxg", advice="-simulate")


# On a node


@pytest.fixture
def host(node: Node) -> Host:
    """A node where all is well: a GPU with minor number 3, and everything around it."""
    root = node.plugins.parent
    node.driver.set(gpus=(StubGpu(minor=3),))
    shutil.copy(node.driver.path, node.driver.path.with_name("libcuda.so.1"))
    for name in os.listdir(node.dev):
        (node.dev / name).unlink()
    (node.dev / "char").mkdir()
    nodes = {"nvidia3": ("/dev/null", "1:3"), "nvidiactl": ("/dev/zero", "1:5"), "nvidia-uvm": ("/dev/full", "1:7")}
    for name, (target, number) in nodes.items():
        (node.dev / name).symlink_to(target)
        (node.dev / "char" / number).symlink_to(f"../{name}")
    files = {
        "sys/module/nvidia/version": "550.54.15\n",
        "sys/bus/pci/devices/0000:3b:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:3b:00.0/class": "0x030200\n",
        "proc/devices": "Character devices:\n  1 nvidia-uvm\n",
        "containers/a_default_b.log": "",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return Host(root / "proc", root / "sys")


def tree(root: Path) -> dict[str, tuple[int, ...]]:
    """Return every file below a directory, and what would show that it was written to."""
    paths = [path for path in (root, *root.rglob("*")) if "proc" not in path.parts[3:4] and path.name != "calls"]
    statuses = {str(path): path.lstat() for path in paths}
    return {path: (status.st_ino, status.st_mtime_ns, status.st_size) for path, status in statuses.items()}


@pytest.mark.soak
def test_well(node: Node, host: Host) -> None:
    """Beside a daemon that serves, on a node where all is well, every line is ok, and nobody has noticed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # a port that is free, most likely later as well
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    same = flags(node, **{"metrics-address": address, "status-socket": str(node.plugins.parent / "status")})
    given = (f"-{name}={value}" for name, value in same.items())
    with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods), node.daemon(*given) as daemon:
        share_ids = list(kubelet.wait_devices(100))
        daemon.wait_log("registered")  # the kubelet lists them before it answers the registration
        record = node.plugins / "kubelet_internal_checkpoint"
        record.write_text(json.dumps({"Data": {"RegisteredDevices": {RESOURCE: share_ids}}}))
        (host.proc / str(daemon.pid)).symlink_to(f"/proc/{daemon.pid}")

        def traces() -> tuple[object, ...]:
            return tree(node.plugins.parent), daemon.lines, len(kubelet.attempts), len(kubelet.lists[RESOURCE])

        before = traces()
        findings = trio.run(examine, load(same, {}), host, clock=MockClock())
        assert not [str(finding) for finding in findings if finding.level is not Level.OK]
        assert traces() == before
        assert kubelet.registrations[-1].connection.streaming
    for subject in ("library", "NVML", "GPU GPU-", "registration", "daemon's settings", "metrics and", "daemon's GPUs"):
        assert find(findings, subject)
