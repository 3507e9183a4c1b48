"""The doctor on the kubelet: what answers in the plugin directory, and whose devices are registered."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
from daemon_process import short_directory
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from findings import told
from node import RESOURCE
from purerpc import StatusCode

from sgpu.doctor import kubelet, peer
from sgpu.doctor.checkpoint import FILE, read_checkpoint
from sgpu.doctor.finding import ok
from sgpu.doctor.kubelet import (
    Daemon,
    check_directory,
    check_kubelet,
    check_others,
    check_pod_resources,
    check_registration,
    find_daemon,
    other_plugins,
)
from sgpu.doctor.peer import Peer
from sgpu.settings import Settings, endpoint

GPU = "GPU-bf428e1d-f221-55de-a77f-a61755a4d727"
SERVED = Daemon(RESOURCE, ok("daemon", "serves"), Peer(StatusCode.OK))
NOT_SERVED = Daemon(RESOURCE, ok("daemon", "none"), Peer(absent=True))


@pytest.fixture
def plugins() -> Iterator[Path]:
    """A plugin directory with a path short enough for sockets."""
    with short_directory() as directory:
        (directory / "p").mkdir()
        yield directory / "p"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "TIMEOUT", 1.0)
    monkeypatch.setattr(kubelet, "TIMEOUT", 1.0)


@contextmanager
def silent(path: Path) -> Iterator[None]:
    """Somebody who takes connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield


def abandon(path: Path) -> None:
    """A socket that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@contextmanager
def plugin(path: Path) -> Iterator[None]:
    """A device plugin on grpcio that answers for its options, and fails the test when it is asked for anything else."""

    def handle(_: bytes, context: grpc.ServicerContext) -> bytes:
        return b"\x10\x01"  # a field that an Empty does not have

    handler = grpc.unary_unary_rpc_method_handler(handle)
    server = grpc.server(ThreadPoolExecutor(2))
    service = grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", {"GetDevicePluginOptions": handler})
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


# The directory


def test_directory(plugins: Path) -> None:
    """Nothing is made in it to find out."""
    before = plugins.stat().st_mtime_ns
    assert told(check_directory(plugins), "ok", "is writable")
    assert plugins.stat().st_mtime_ns == before


def test_no_directory(tmp_path: Path) -> None:
    """Absent, or something else."""
    assert told(check_directory(tmp_path / "p"), "FAIL", "it is not there", "-plugin-directory")
    (tmp_path / "p").touch()
    assert told(check_directory(tmp_path / "p"), "FAIL", "it is not a directory", "-plugin-directory")


def test_read_only_directory(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that takes no writes, whoever asks; and one that does not take them from us."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert told(check_directory(plugins), "FAIL", f"user {os.getuid()} may not write to it", "writable for root")
    real = os.statvfs(plugins)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, real[9])))
    assert told(check_directory(plugins), "FAIL", "it is mounted read-only", "writable for root")


# kubelet.sock


def test_kubelet(plugins: Path) -> None:
    """It answers, and has seen no attempt to register."""
    with FakeKubelet(plugins) as fake:
        assert told(trio.run(check_kubelet, plugins), "ok", "the kubelet answers")
        assert not fake.attempts


def test_no_kubelet(plugins: Path) -> None:
    """No socket: another directory, most likely."""
    assert told(trio.run(check_kubelet, plugins), "FAIL", "there is none in", "<root-dir>/device-plugins")


def test_stopped_kubelet(plugins: Path) -> None:
    """A kubelet that is gone leaves its socket."""
    abandon(plugins / "kubelet.sock")
    assert told(trio.run(check_kubelet, plugins), "FAIL", "nobody listens on it", "systemctl restart kubelet")


def test_silent_kubelet(plugins: Path) -> None:
    """One that does not answer is not waited for."""
    with silent(plugins / "kubelet.sock"):
        assert told(trio.run(check_kubelet, plugins), "FAIL", "does not answer within 1 s")


# The daemon


def test_daemon_absent(plugins: Path) -> None:
    """None is running."""
    assert told(trio.run(find_daemon, plugins, RESOURCE).finding, "warn", "none serves here", "is it running")


def test_daemon(plugins: Path) -> None:
    """One serves, and it is known which process."""
    with plugin(plugins / endpoint(RESOURCE)):
        daemon = trio.run(find_daemon, plugins, RESOURCE)
    assert daemon.serves
    assert daemon.peer.pid > 0
    assert told(daemon.finding, "ok", f"process {daemon.peer.pid}")


def test_daemon_gone(plugins: Path) -> None:
    """It was killed."""
    abandon(plugins / endpoint(RESOURCE))
    assert told(trio.run(find_daemon, plugins, RESOURCE).finding, "warn", "it is gone", "start it")


def test_daemon_silent(plugins: Path) -> None:
    """It hangs."""
    with silent(plugins / endpoint(RESOURCE)):
        daemon = trio.run(find_daemon, plugins, RESOURCE)
    assert not daemon.serves
    assert told(daemon.finding, "FAIL", "does not answer within", "restart its pod")


# Others


def others(directory: Path) -> Any:  # noqa: ANN401  # a Finding; mypy does not see it through trio.run
    return trio.run(check_others, directory, other_plugins(directory, (RESOURCE,)))


def test_no_others(plugins: Path) -> None:
    """Neither the kubelet nor we are another plugin, nor is a file."""
    (plugins / FILE).touch()
    abandon(plugins / "kubelet.sock")
    abandon(plugins / endpoint(RESOURCE))
    assert told(others(plugins), "ok", "none in")
    assert other_plugins(plugins / "absent", ()) == []


def test_others(plugins: Path) -> None:
    """Plugins of other things, alive and gone."""
    abandon(plugins / "old.sock")
    with plugin(plugins / "fpga.sock"):
        assert told(others(plugins), "ok", f"fpga.sock in {plugins}; left behind by plugins that are gone: old.sock")


@pytest.mark.parametrize("name", ["nvidia-gpu.sock", "nvidiaGPU-1700000000.sock", "sgpu-example.com_other.sock"])
def test_rival(plugins: Path, name: str) -> None:
    """One that is called as if it offered the same GPUs."""
    with plugin(plugins / name):
        assert told(others(plugins), "warn", f"{name} may offer the same GPUs", "remove the other one")


# What is registered


def record(directory: Path, healthy: dict[str, Any], held: list[dict[str, Any]] | None = None) -> None:
    """What a current kubelet writes."""
    data = {"PodDeviceEntries": held, "RegisteredDevices": healthy}
    (directory / FILE).write_text(json.dumps({"Data": data, "Checksum": 1, "BootID": "x"}))


def holding(*ids: str) -> dict[str, Any]:
    """A container that has these."""
    return {"PodUID": "u", "ContainerName": "c", "ResourceName": RESOURCE, "DeviceIDs": {"-1": list(ids)}}


def test_registered(plugins: Path) -> None:
    """The kubelet has our devices."""
    record(plugins, {RESOURCE: [f"{GPU}::0", f"{GPU}::1"]}, [holding(f"{GPU}::1")])
    (finding,) = check_registration(plugins, SERVED)
    assert told(finding, "ok", "2 healthy device(s), all of them sgpu's")


@pytest.mark.parametrize(
    ("daemon", "level"),
    [pytest.param(SERVED, "FAIL", id="beside us"), pytest.param(NOT_SERVED, "warn", id="before us")],
)
def test_other_registered(plugins: Path, daemon: Daemon, level: str) -> None:
    """It has those of another plugin under our name."""
    record(plugins, {RESOURCE: ["nvidia0-_-1", "nvidia0-_-2"]})
    (finding,) = check_registration(plugins, daemon)
    assert told(finding, level, "2 device(s) of it that are not sgpu's, as nvidia0-_-1", "-resource-name")


def test_held_from_before(plugins: Path) -> None:
    """Containers still have what another plugin gave them."""
    record(plugins, {RESOURCE: [f"{GPU}::0"]}, [holding("nvidia0-_-1")])
    _, finding = check_registration(plugins, SERVED)
    assert told(finding, "warn", "containers still have 1 device(s) that are not sgpu's", "drain the node")


@pytest.mark.parametrize("healthy", [pytest.param({}, id="never"), pytest.param({RESOURCE: None}, id="none healthy")])
def test_none_registered(plugins: Path, healthy: dict[str, Any]) -> None:
    """A daemon serves, and the kubelet has nothing of it; without one that is no news."""
    record(plugins, healthy)
    (finding,) = check_registration(plugins, SERVED)
    assert told(finding, "FAIL", "allocatable is 0", "the daemon's log")
    (finding,) = check_registration(plugins, NOT_SERVED)
    assert told(finding, "skip", "no daemon serves it")


def test_registered_before(plugins: Path) -> None:
    """The kubelet does not write down that a plugin is gone: its record says nothing without a daemon."""
    record(plugins, {RESOURCE: [f"{GPU}::0"]})
    (finding,) = check_registration(plugins, NOT_SERVED)
    assert told(finding, "skip", "the kubelet's record of 1 device(s) is from before")


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"Data": 1}', '{"Data": {"PodDeviceEntries": [{}]}}', "[" * 10**5]
)
def test_no_record(plugins: Path, content: str | None) -> None:
    """A record that is not there, or not what it was."""
    if content is not None:
        (plugins / FILE).write_text(content)
    (finding,) = check_registration(plugins, SERVED)
    assert told(finding, "skip", f"{plugins / FILE} can't be read")


def test_old_record(plugins: Path) -> None:
    """Kubernetes up to 1.19 listed ids without NUMA nodes, and 1.8 without a checksum around it all."""
    entry = {"PodUID": "u", "ContainerName": "c", "ResourceName": RESOURCE, "DeviceIDs": ["a", "b"]}
    (plugins / FILE).write_text(json.dumps({"PodDeviceEntries": [entry], "RegisteredDevices": {RESOURCE: ["a"]}}))
    checkpoint = read_checkpoint(plugins)
    assert checkpoint.healthy == {RESOURCE: ("a",)}
    assert checkpoint.held == {RESOURCE: ["a", "b"]}


# PodResources


def pods(path: Path) -> Any:  # noqa: ANN401
    return trio.run(check_pod_resources, Settings(pod_resources_socket=str(path)), (RESOURCE,))


def test_pod_resources(plugins: Path) -> None:
    """Who has which share is counted."""
    with FakePodResources(plugins / "s") as fake:
        fake.assign("default", "a", "main", [f"{GPU}::0", f"{GPU}::1"])
        fake.assign("default", "b", "main", [f"{GPU}::2"])
        assert told(pods(plugins / "s"), "ok", "2 container(s) have 3 share(s)")


def _refuses(stack: ExitStack, path: Path) -> None:
    stack.enter_context(FakePodResources(path)).refuse(grpc.StatusCode.UNIMPLEMENTED)


def _is_silent(stack: ExitStack, path: Path) -> None:
    stack.enter_context(silent(path))


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        pytest.param(lambda stack, path: None, "does not answer", id="absent"),
        pytest.param(_refuses, "needs Kubernetes 1.20", id="old"),
        pytest.param(_is_silent, "did not answer", id="silent"),
    ],
)
def test_no_pod_resources(plugins: Path, serve: Callable[[ExitStack, Path], None], words: str) -> None:
    """What goes without it is said."""
    with ExitStack() as stack:
        serve(stack, plugins / "s")
        assert told(pods(plugins / "s"), "warn", words, "the memory watermark and per-pod figures are off")
