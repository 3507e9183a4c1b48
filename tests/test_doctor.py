"""The doctor as a whole: on nodes that are well and ill, in time, and without a trace."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
import real_driver
import trio
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from findings import about, told
from node import RESOURCE, Node
from stub_driver import StubGpu
from trio.testing import MockClock

from sgpu.cli import FAILED, OK, USAGE, main
from sgpu.doctor import examination
from sgpu.doctor.examination import examine
from sgpu.doctor.finding import Finding, Level, fail, ok, skip, warn
from sgpu.doctor.host import Host
from sgpu.load import Loaded, load
from sgpu.nurseries import find_error

#: Seconds that all of it may take, whatever hangs.
LIMIT = 10.0


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
        "logs/a_default_b.log": "",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return Host(root / "proc", root / "sys")


def flags(node: Node, **others: str) -> dict[str, str]:
    """Those of the node's daemon."""
    places = {"plugin-directory": node.plugins, "host-path": node.host, "state-file": node.state}
    places |= {"pod-resources-socket": node.pods, "dev-directory": node.dev, "sysfs-directory": node.sys}
    root = node.plugins.parent
    places |= {"proc-directory": root / "proc", "container-log-directory": root / "logs"}
    return {
        **{name: str(path) for name, path in places.items()},
        "metrics-address": "",
        "status-socket": "",
        "health-interval": "0.3",
        **others,
    }


def run(node: Node, *arguments: str, **others: str) -> subprocess.CompletedProcess[str]:
    """The command as an operator runs it. Raises subprocess.TimeoutExpired."""
    given = [f"-{name}={value}" for name, value in flags(node, **others).items()]
    command = [sys.executable, "-m", "sgpu", "doctor", *given, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT)


def levels(findings: Iterable[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


def tree(root: Path) -> dict[str, tuple[int, ...]]:
    """Every file below a directory, and what would show that it was written to."""
    paths = [path for path in (root, *root.rglob("*")) if "proc" not in path.parts[3:4]]
    statuses = {str(path): path.lstat() for path in paths if path.name != "calls"}
    return {path: (status.st_ino, status.st_mtime_ns, status.st_size) for path, status in statuses.items()}


@pytest.mark.soak
def test_well(node: Node, host: Host) -> None:
    """Beside a daemon that serves, on a node where all is well, every line is ok, and nobody has noticed."""
    same = [f"-{name}={value}" for name, value in flags(node).items()]
    with socket.create_server(("127.0.0.1", 0)) as listener:  # a port that is free, most likely later as well
        here = {
            "metrics-address": f"127.0.0.1:{listener.getsockname()[1]}",
            "status-socket": str(node.plugins.parent / "status"),
        }
    same += [f"-{name}={value}" for name, value in here.items()]
    with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods), node.daemon(*same) as daemon:
        share_ids = list(kubelet.wait_devices(100))
        record = node.plugins / "kubelet_internal_checkpoint"
        record.write_text(json.dumps({"Data": {"RegisteredDevices": {RESOURCE: share_ids}}}))
        (host.proc / str(daemon.pid)).symlink_to(f"/proc/{daemon.pid}")
        before = tree(node.plugins.parent), len(daemon.lines), len(kubelet.attempts), len(kubelet.lists[RESOURCE])
        findings = trio.run(examine, load(flags(node, **here), {}), host)
        after = tree(node.plugins.parent), len(daemon.lines), len(kubelet.attempts), len(kubelet.lists[RESOURCE])
        assert not [str(finding) for finding in findings if finding.level is not Level.OK]
        assert after == before
        assert kubelet.registrations[-1].connection.streaming
    assert told(about(findings, "GPU GPU-"), "ok", "nvidia3")
    assert told(about(findings, "registration"), "ok", "100 healthy")
    assert told(about(findings, "daemon's settings"), "ok", "")
    assert told(about(findings, "metrics and probes"), "ok", "and is ready")
    assert told(about(findings, "daemon's GPUs"), "ok", "all 1 for healthy")


@pytest.mark.soak
def test_after_an_event(node: Node, host: Host) -> None:
    """A GPU that an XID took down, and of which the driver says afterwards that it is well."""
    same = flags(node, **{"status-socket": str(node.plugins.parent / "status")})
    with FakeKubelet(node.plugins) as kubelet, node.daemon(*(f"-{name}={value}" for name, value in same.items())):
        kubelet.wait_devices(100)
        (gpu,) = node.driver.state.gpus
        node.driver.xid(gpu, 79)
        kubelet.wait_for(lambda: "Healthy" not in kubelet.devices().values())
        findings = trio.run(examine, load(same, {}), host)
    assert told(about(findings, "GPU GPU-"), "ok", "nvidia3")
    assert told(about(findings, "daemon's GPU GPU-"), "FAIL", "XID 79: GPU has fallen off the bus", "sgpu status")


def test_simulated(node: Node) -> None:
    """Simulated GPUs: one line in place of all that the driver would have."""
    findings = trio.run(examine, load(flags(node, simulate="3"), {}), Host(sysfs=node.sys))
    assert told(findings[0], "ok", "-simulate 3: the GPUs are not there")
    assert told(findings[1], "ok", "3 GPU(s) are offered as 300 x")
    assert findings[2].subject == "plugin directory"
    assert not {"host's processes", "container logs"} & {finding.subject for finding in findings}
    assert not node.driver.call_log()


def test_several_resources(node: Node, tmp_path: Path) -> None:
    """Each resource of the rules has its daemon and its registration."""
    config = tmp_path / "c.yaml"
    config.write_text("gpus: [{name: '*', resource: example.com/whole, shares: 1}]")
    findings = trio.run(examine, load({**flags(node), "config": str(config)}, {}), Host())
    assert told(about(findings, "daemon for example.com/whole"), "warn", "none serves here")
    assert told(about(findings, f"daemon for {RESOURCE}"), "warn", "none serves here")


@pytest.mark.soak
def test_no_driver_in_the_kernel(node: Node) -> None:
    """NVIDIA's own library, where there is no driver in the kernel: what it says, and what to do."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    driver = real_driver.real_driver()
    done = run(node, "-host-path", str(driver))
    assert done.returncode == FAILED
    assert not done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "NVML: " in line]
    assert line.startswith(
        "FAIL  NVML: the NVIDIA driver is not ready: nvmlInit_v2: Driver Not Loaded (NVML error 9) → "
    )
    assert "`modprobe nvidia` on the host" in line
    assert "ok    library: " in done.stdout


# In time


@pytest.mark.soak
def test_everything_hangs(node: Node) -> None:
    """The driver, the kubelet, the daemon, another plugin and PodResources: it is over in time all the same."""
    node.driver.hang("nvmlInit")
    paths = [node.plugins / name for name in ("kubelet.sock", node.socket.name, "other.sock")] + [node.pods]
    with ExitStack() as stack:
        for path in paths:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()
        done = run(node)
    assert done.returncode == FAILED
    assert "FAIL  NVML: NVML has not answered for 7 s" in done.stdout
    assert "FAIL  kubelet.sock: " in done.stdout
    assert "FAIL  daemon for " in done.stdout
    assert "warn  PodResources: the kubelet did not answer on" in done.stdout
    assert not node_processes(node)


def node_processes(node: Node) -> list[str]:
    """Processes that still have the node's directory in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(node.host) in words:
            found.append(words.decode())
    return found


def test_file_system_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be looked at is given up, and the lines before it are shown."""

    async def hang(loaded: Loaded, host: Host, tell: Callable[[Iterable[Finding]], None]) -> None:
        tell([ok("first", "seen")])
        await trio.sleep_forever()

    async def quick(loaded: Loaded, host: Host, tell: Callable[[Iterable[Finding]], None]) -> None:
        await trio.lowlevel.checkpoint()
        tell([ok("last", "seen")])

    monkeypatch.setattr(examination, "_driver", hang)
    monkeypatch.setattr(examination, "_kubelet", quick)
    monkeypatch.setattr(examination, "_node", quick)
    first, hung, *rest = trio.run(examine, load({}, {}), Host(), clock=MockClock(autojump_threshold=0))
    assert first.subject == "first"
    assert told(hung, "FAIL", "did not end within 8.5 s", "a file system hangs")
    assert [finding.subject for finding in rest] == ["last", "last"]


def test_file_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by someone who is not root: it is one line, and what else there is to say is said."""

    async def refused(loaded: Loaded, host: Host, tell: Callable[[Iterable[Finding]], None]) -> None:
        tell([ok("first", "seen")])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, refuse)

    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/private")

    async def quick(loaded: Loaded, host: Host, tell: Callable[[Iterable[Finding]], None]) -> None:
        await trio.lowlevel.checkpoint()
        tell([ok("last", "seen")])

    monkeypatch.setattr(examination, "_driver", quick)
    monkeypatch.setattr(examination, "_kubelet", refused)
    monkeypatch.setattr(examination, "_node", quick)
    _, first, flaw, last = trio.run(examine, load({}, {}), Host())
    assert (first.subject, last.subject) == ("first", "last")
    assert told(flaw, "FAIL", "ended here: Permission denied: /private", "run it as root")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no trouble of the node's ends the command as it is."""

    async def bug(loaded: Loaded, host: Host, tell: Callable[[Iterable[Finding]], None]) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    monkeypatch.setattr(examination, "_driver", bug)
    with pytest.raises(Exception, match="Trio nursery") as caught:
        trio.run(examine, load({}, {}), Host())
    assert find_error(caught.value, ZeroDivisionError)


# What is printed


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the doctor finds from now on."""
    found: list[Finding] = []

    async def examine(loaded: Loaded, host: Host) -> list[Finding]:
        await trio.lowlevel.checkpoint()
        return found

    monkeypatch.setattr("sgpu.doctor.examine", examine)
    return found


def test_text(findings: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, whatever is quoted in it, and a count."""
    findings += [ok("a", "well"), warn("b", "so\nso", "rest"), fail("c", "ill", "operate"), skip("d", "because of c")]
    assert main(["doctor"], {}) == FAILED
    assert capsys.readouterr().out.splitlines() == [
        "ok    a: well",
        r"warn  b: so\nso → rest",
        "FAIL  c: ill → operate",
        "skip  d: not checked, because of c",
        "1 ok, 1 warn, 1 FAIL, 1 skip",
    ]


def test_json(findings: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    """The same for machines."""
    findings += [ok("a", "well"), warn("b", "soso", "rest")]
    assert main(["doctor", "-o", "json"], {}) == OK
    assert json.loads(capsys.readouterr().out) == {
        "healthy": True,
        "findings": [
            {"level": "ok", "subject": "a", "words": "well", "advice": ""},
            {"level": "warn", "subject": "b", "words": "soso", "advice": "rest"},
        ],
    }


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Its option is checked, and in its help."""
    assert main(["doctor", "-o", "xml"], {}) == USAGE
    assert "is not text or json" in capsys.readouterr().err
    assert main(["doctor", "-help"], {}) == OK
    assert "-o text|json" in capsys.readouterr().out
