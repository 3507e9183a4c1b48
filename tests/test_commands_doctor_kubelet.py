"""The doctor on the kubelet: what answers in the plugin directory, and whose devices are registered."""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import trio
from daemon_process import short_directory
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from findings import expect
from node import RESOURCE
from purerpc import StatusCode
from trio.testing import MockClock

from sgpu.api import v1beta1_pb2
from sgpu.commands.doctor import kubelet, peer
from sgpu.commands.doctor.finding import Finding, ok
from sgpu.commands.doctor.kubelet import Daemon, check_directory, check_kubelet, check_registration, find_daemon
from sgpu.commands.doctor.peer import Peer
from sgpu.config.settings import Settings, endpoint
from sgpu.node.gpu import Gpu
from sgpu.pods.checkpoint import FILE
from sgpu.pods.held import Held
from sgpu.pods.processes import Places
from sgpu.pods.unlisted import Unlisted

GPU = "GPU-bf428e1d-f221-55de-a77f-a61755a4d727"
SERVED = Daemon(RESOURCE, ok("daemon", "serves"), Peer(StatusCode.OK))
PROC = Path("/proc")
NOT_SERVED = Daemon(RESOURCE, ok("daemon", "none"), Peer(absent=True))


@pytest.fixture
def plugins() -> Iterator[Path]:
    """A plugin directory with a path short enough for sockets."""
    with short_directory() as directory:
        (directory / "p").mkdir()
        yield directory / "p"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For peers that never answer."""
    monkeypatch.setattr(peer, "TIMEOUT", 0.2)
    monkeypatch.setattr(kubelet, "TIMEOUT", 0.2)


@contextmanager
def silent(path: Path) -> Iterator[None]:
    """Take connections and say nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield


@contextmanager
def abandoned(path: Path) -> Iterator[None]:
    """Leave a socket that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    yield


@contextmanager
def serving(path: Path, method: str = kubelet.OPTIONS) -> Iterator[None]:
    """Serve one method on grpcio, with an answer that has a field more than an Empty."""
    handler = grpc.unary_unary_rpc_method_handler(lambda _, __: b"\x10\x01")
    server = grpc.server(ThreadPoolExecutor(2))
    service, _, name = method[1:].rpartition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


# The directory


def test_directory(plugins: Path) -> None:
    """Nothing is made in it to find out whether it is writable."""
    before = plugins.stat().st_mtime_ns
    expect(check_directory(plugins), "ok", plugins)
    assert plugins.stat().st_mtime_ns == before


def test_unusable_directory(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason why no socket can be made is a failure with a message of its own."""
    (plugins / "file").touch()
    findings = [check_directory(plugins / "absent"), check_directory(plugins / "file")]
    for denied in (os.W_OK, os.X_OK):
        monkeypatch.setattr(os, "access", lambda _, mode, denied=denied: not mode & denied)
        findings.append(check_directory(plugins))
    expect(findings[-1], "FAIL", os.getuid())
    real = os.statvfs(plugins)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, real[9])))
    findings.append(check_directory(plugins))
    for finding in findings:
        expect(finding, "FAIL", plugins, advice="-plugin-directory")
    assert len({finding.message.replace("/absent", "").replace("/file", "") for finding in findings}) == 4


def test_removed_directory(plugins: Path) -> None:
    """One that was removed on the host below the pod's mount, and can be written to all the same."""
    descriptor = os.open(plugins, os.O_RDONLY)
    plugins.rmdir()
    plugins.mkdir()
    expect(check_directory(Path(f"/proc/self/fd/{descriptor}")), "FAIL", "removed", advice="restart")
    os.close(descriptor)


# kubelet.sock


def test_kubelet(plugins: Path) -> None:
    """A kubelet that answers has seen no attempt to register."""
    with FakeKubelet(plugins) as fake:
        expect(trio.run(check_kubelet, plugins, clock=MockClock()), "ok", plugins)
        assert not fake.attempts


@pytest.mark.usefixtures("impatient")
def test_no_kubelet(plugins: Path) -> None:
    """Without a socket the directory is wrong; with one, whoever does not answer as a kubelet does needs a restart."""
    path = plugins / "kubelet.sock"
    expect(trio.run(check_kubelet, plugins), "FAIL", plugins, advice="-plugin-directory")
    for state in (abandoned(path), silent(path), serving(path, kubelet.HARMLESS)):
        path.unlink(missing_ok=True)
        with state:
            expect(trio.run(check_kubelet, plugins), "FAIL", path, advice="systemctl restart kubelet")


# The daemon


def test_daemon(plugins: Path) -> None:
    """A daemon that serves is known by its process."""
    with serving(plugins / endpoint(RESOURCE)):
        daemon = trio.run(find_daemon, plugins, RESOURCE, PROC, clock=MockClock())
    assert daemon.serves
    assert daemon.peer.pid > 0
    expect(daemon.finding, "ok", daemon.peer.pid)


@pytest.mark.usefixtures("impatient")
def test_no_daemon(plugins: Path) -> None:
    """A daemon that is not there can still come; one that is there and does not answer is broken."""
    path = plugins / endpoint(RESOURCE)
    expect(trio.run(find_daemon, plugins, RESOURCE, PROC).finding, "warn", path)
    for state, level in ((abandoned(path), "warn"), (silent(path), "FAIL"), (serving(path, kubelet.HARMLESS), "FAIL")):
        path.unlink(missing_ok=True)
        with state:
            daemon = trio.run(find_daemon, plugins, RESOURCE, PROC)
        assert not daemon.serves
        expect(daemon.finding, level, path)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("line", "descriptors", "message", "advice"),
    [
        ("State:\tT (stopped)", 1, "stopped", "kill -CONT"),
        ("State:\tD (disk sleep)", 1, "the kernel", "dmesg"),
        ("State:\tS (sleeping)", 4, "all of its 4 file descriptors", "ulimit -n"),
        ("State:\tS (sleeping)", 3, "does not answer", "log"),
    ],
    ids=["stopped", "waits for the kernel", "no descriptor left", "unknown"],
)
def test_why_a_daemon_is_silent(
    plugins: Path, tmp_path: Path, line: str, descriptors: int, message: str, advice: str
) -> None:
    """A daemon that takes connections and never answers: the kernel may know why."""
    process = tmp_path / str(os.getpid())  # which listens
    (process / "fd").mkdir(parents=True)
    for number in range(descriptors):
        (process / "fd" / str(number)).touch()
    (process / "status").write_text(f"Name:\tpython3\n{line}\n")
    (process / "limits").write_text("Limit   Soft Limit   Hard Limit   Units\nMax open files   4   4   files\n")
    with silent(plugins / endpoint(RESOURCE)):
        finding = trio.run(find_daemon, plugins, RESOURCE, tmp_path).finding
    expect(finding, "FAIL", message, advice=advice)


# Other plugins


def others(directory: Path) -> Finding:
    finding: Finding = trio.run(kubelet.check_others, directory, kubelet.other_plugins(directory, (RESOURCE,)))
    return finding


def test_no_others(plugins: Path) -> None:
    """The kubelet's socket, our own and files are no other plugins."""
    (plugins / FILE).touch()
    with abandoned(plugins / "kubelet.sock"), abandoned(plugins / endpoint(RESOURCE)):
        finding = others(plugins)
    expect(finding, "ok", plugins)
    assert ".sock" not in finding.message
    assert kubelet.other_plugins(plugins / "absent", ()) == []


def test_others(plugins: Path) -> None:
    """Plugins of other things are named; one that is gone is no rival, whatever its name."""
    with serving(plugins / "fpga.sock"), abandoned(plugins / "nvidia-gpu.sock"):
        expect(others(plugins), "ok", "fpga.sock", "nvidia-gpu.sock")


@pytest.mark.parametrize("name", ["nvidia.sock", "someGPU-1700000000.sock", "sgpu-example.com_other.sock"])
def test_rival(plugins: Path, name: str) -> None:
    """A plugin that is named as if it offered GPUs may offer the same ones."""
    with serving(plugins / name):
        expect(others(plugins), "warn", name)


# What is registered


def checked(directory: Path, daemon: Daemon, healthy: Sequence[str] | None, held: Sequence[str] = ()) -> list[Finding]:
    """Check with these devices in a current kubelet's record."""
    entry = {"PodUID": "u", "ContainerName": "c", "ResourceName": RESOURCE, "DeviceIDs": {"-1": held}}
    data = {"PodDeviceEntries": [entry], "RegisteredDevices": {} if healthy is None else {RESOURCE: healthy}}
    (directory / FILE).write_text(json.dumps({"Data": data, "Checksum": 1, "BootID": "x"}))
    return list(check_registration(directory, daemon))


REGISTRATIONS = {
    "ours": (SERVED, [f"{GPU}::0", f"{GPU}::1"], "ok", [2]),
    "none yet": (SERVED, None, "FAIL", [0]),
    "none healthy": (SERVED, [], "FAIL", [0]),
    "another plugin's": (SERVED, ["nvidia0-_-1", "nvidia0-_-2"], "FAIL", [2, "nvidia0-_-1"]),
    "another plugin's, no daemon": (NOT_SERVED, ["nvidia0-_-1"], "warn", [1, "nvidia0-_-1"]),
    "none, no daemon": (NOT_SERVED, None, "skip", []),
    "ours from before, no daemon": (NOT_SERVED, [f"{GPU}::0"], "skip", [1]),
}


@pytest.mark.parametrize(("daemon", "healthy", "level", "facts"), REGISTRATIONS.values(), ids=REGISTRATIONS)
def test_registration(
    plugins: Path, daemon: Daemon, healthy: list[str] | None, level: str, facts: list[object]
) -> None:
    """Beside a daemon the kubelet has its devices and no others; without one, its record is from before."""
    (finding,) = checked(plugins, daemon, healthy, [f"{GPU}::1"])
    expect(finding, level, *facts)


def test_held_from_before(plugins: Path) -> None:
    """Containers may still have what another plugin gave them."""
    registered, held = checked(plugins, SERVED, [f"{GPU}::0"], ["nvidia0-_-7"])
    expect(registered, "ok", 1)
    expect(held, "warn", 1, "nvidia0-_-7")


def test_no_record(plugins: Path) -> None:
    """Without a record nothing is known; one that can't be read is a warning, for the daemon can't read it either."""
    (finding,) = check_registration(plugins, SERVED)
    expect(finding, "skip", plugins / FILE)
    (plugins / FILE).write_text("{")
    (finding,) = check_registration(plugins, SERVED)
    expect(finding, "warn", plugins / FILE, advice="restart")


# PodResources


def pods(path: Path) -> Finding:
    return listed(path)[0]


def listed(path: Path) -> tuple[Finding, Held | None]:
    settings = Settings(pod_resources_socket=str(path))
    finding, held = trio.run(kubelet.check_pod_resources, settings, (RESOURCE,))
    return finding, held


def test_pod_resources(plugins: Path) -> None:
    """Containers and their shares are counted."""
    with FakePodResources(plugins / "s") as fake:
        fake.assign("default", "a", "main", [f"{GPU}::0", f"{GPU}::1"])
        fake.assign("default", "b", "main", [f"{GPU}::2"])
        expect(pods(plugins / "s"), "ok", plugins / "s", 2, 3)


@pytest.mark.usefixtures("impatient")
def test_no_pod_resources(plugins: Path) -> None:
    """A kubelet that does not answer is a warning: shares are offered without it."""
    expect(pods(plugins / "s"), "warn", plugins / "s", advice="-pod-resources-socket")
    with silent(plugins / "s"):
        expect(pods(plugins / "s"), "warn", plugins / "s", "0.2 s", advice="-pod-resources-socket")


# What containers have


def held_of(plugins: Path, node: str) -> list[Finding]:
    """Check with a GPU that has this device node now."""
    (plugins / "proc").mkdir(exist_ok=True)
    (plugins / "logs").mkdir(exist_ok=True)
    unlisted = Unlisted(plugins, Places(plugins / "proc", plugins / "logs"))
    gpu = Gpu(GPU, "T4", "00000000:3B:00.0", (node,))
    return list(kubelet.check_held(listed(plugins / "s")[1], unlisted, [gpu]))


def stored_answers(plugins: Path, node: str) -> Finding:
    (finding,) = held_of(plugins, node)
    return finding


def test_stored_answers(plugins: Path) -> None:
    """A pod that gets another GPU at its next start is named, with the cure; so is one with another plugin's GPU."""
    with FakePodResources(plugins / "s") as fake:
        expect(stored_answers(plugins, "nvidia0"), "ok")  # no record, as on a new node
        fake.assign("default", "a", "main", [f"{GPU}::0"])
        answer = v1beta1_pb2.ContainerAllocateResponse(devices=[v1beta1_pb2.DeviceSpec(container_path="/dev/nvidia1")])
        stored = base64.b64encode(answer.SerializeToString()).decode()
        entry = {"PodUID": "u", "ContainerName": "main", "ResourceName": RESOURCE, "DeviceIDs": {"-1": [f"{GPU}::0"]}}
        (plugins / FILE).write_text(json.dumps({"Data": {"PodDeviceEntries": [{**entry, "AllocResp": stored}]}}))
        expect(stored_answers(plugins, "nvidia1"), "ok")
        expect(stored_answers(plugins, "nvidia0"), "warn", "default/a", "/dev/nvidia1", "/dev/nvidia0", advice="delete")
        (plugins / FILE).write_text("{")
        expect(stored_answers(plugins, "nvidia0"), "skip")
        fake.assign("default", "b", "main", [GPU], "nvidia.com/gpu")
        _, given = held_of(plugins, "nvidia0")
        assert GPU in given.subject
        expect(given, "warn", "default/b", "nvidia.com/gpu", advice="gpus")
    expect(stored_answers(plugins, "nvidia0"), "skip")
