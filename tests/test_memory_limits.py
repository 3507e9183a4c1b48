"""A share that holds: the real daemon, a stub driver that keeps limits, a kubelet, and a tree of cgroups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import RESOURCE, Node
from stub_driver import GIB, MIB, StubGpu
from watching import wait_until

from sgpu.api import v1beta1_pb2
from sgpu.observe.client import NoAnswerError, fetch
from sgpu.observe.snapshot import Snapshot

pytestmark = pytest.mark.process

SHARES = 4
UID = "0c1d2e3f-4a5b-6c7d-8e9f-001122334455"
ID = "ab" * 32


class Limited:
    """A node whose kubelet runs one pod with a share, in cgroups of plain directories."""

    def __init__(self, node: Node, kubelet: FakeKubelet, pods: FakePodResources) -> None:
        self.node = node
        self.kubelet = kubelet
        self.pods = pods
        self.root = node.plugins.parent / "cgroup"
        (self.root / "kubepods/burstable").mkdir(parents=True)
        (self.root / "cgroup.controllers").touch()
        self.status = node.plugins.parent / "status"
        node.driver.set(limits="misc")
        (self.gpu,) = node.driver.gpus(1)
        self.share = f"{self.gpu.uuid}::1"

    @property
    def pod(self) -> Path:
        return self.root / f"kubepods/burstable/pod{UID}"

    @property
    def flags(self) -> list[str]:
        places = ("-cgroup-directory", str(self.root), "-status-socket", str(self.status))
        return [*places, "-memory-limits", "fair", "-gpu-duplication-factor", str(SHARES)]

    def daemon(self, *flags: str) -> DaemonProcess:
        return self.node.daemon(*self.flags, *flags)

    def admit(self) -> None:
        """What the kubelet does until the pod's sandbox is there: allocate, write it down, make the pod's cgroup."""
        self.kubelet.wait_devices(SHARES)
        self.kubelet.allocate([self.share])
        ids = {"0": [self.share]}
        self.kubelet.entries.append(
            {"PodUID": UID, "ContainerName": "main", "ResourceName": RESOURCE, "DeviceIDs": ids}
        )
        self.kubelet.write_checkpoint()
        self.pods.assign("team", "trainer", "main", [self.share])
        self.pod.mkdir()

    def pre_start(self) -> None:
        """Wait as the kubelet does before it makes the container. Raises grpc.RpcError."""
        request = v1beta1_pb2.PreStartContainerRequest(devices_ids=[self.share])
        response = v1beta1_pb2.PreStartContainerResponse
        self.kubelet.call("v1beta1.DevicePlugin", "PreStartContainer", request, response)

    def start(self) -> None:
        """What the runtime and the kubelet do then: make the container's cgroup, and the link to its log."""
        (self.pod / ID).mkdir()
        (self.node.logs / f"trainer_team_main-{ID}.log").touch()

    def limits(self) -> list[int]:
        """Bytes of the limits that the driver has."""
        return sorted(int(file.read_text() or 0) for file in self.node.driver.path.parent.glob("limit.*"))

    def snapshot(self) -> Snapshot | None:
        try:
            return fetch(str(self.status))
        except NoAnswerError:
            return None

    def wait_state(self, state: str) -> Snapshot:
        """Wait until the container's limit is in this state."""

        def found() -> Snapshot | None:
            snapshot = self.snapshot()
            states = [use.limit_state for gpu in snapshot.gpus for use in gpu.containers] if snapshot else []
            return snapshot if states == [state] else None

        snapshot = wait_until(found, f"limit {state}")
        assert snapshot
        return snapshot

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`sgpu limits`."""
        flags = [*self.flags, "-host-path", str(self.node.host), "-state-file", str(self.node.state), *arguments]
        return subprocess.run([sys.executable, "-m", "sgpu", "limits", *flags], capture_output=True, text=True)


@pytest.fixture
def limited(node: Node) -> Iterator[Limited]:
    with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods) as pods:
        yield Limited(node, kubelet, pods)


def part(gpu: StubGpu, factor: int = 1) -> int:
    """A share's part of the memory, or so many times that, in whole MiB."""
    return (gpu.total - gpu.reserved) * factor // SHARES // MIB * MIB


def test_a_container_is_limited_before_it_exists(limited: Limited) -> None:
    """PreStartContainer returns once the pod is limited; the container follows, and is seen with its use.

    A restarted daemon knows its limits, sets them again if the driver lost them, and clears them at the end.
    """
    limited.node.driver.set(limit_used={ID: GIB})
    with limited.daemon() as daemon:
        limited.admit()
        limited.pre_start()
        assert limited.limits() == [part(limited.gpu)]
        limited.start()
        (gpu,) = limited.wait_state("enforced").gpus
        (use,) = gpu.containers
        assert (use.pod, use.memory_limit, use.memory_used) == ("trainer", part(limited.gpu), GIB)
        assert limited.kubelet.registrations[-1].options.pre_start_required
        assert "a daemon runs" in limited.command("-clear").stderr
        daemon.terminate()
    assert limited.limits() == [part(limited.gpu)] * 2
    for file in limited.node.driver.path.parent.glob("limit.*"):
        file.unlink()
    with limited.daemon("-memory-limits", "burst=2"):
        wait_until(lambda: limited.limits() == [part(limited.gpu, 2)] * 2, "limits again")
    listed = limited.command()
    assert listed.returncode == 0
    assert listed.stdout.count(f"{part(limited.gpu, 2) // MIB} MiB") == 2
    cleared = limited.command("-clear")
    assert (cleared.returncode, cleared.stdout.count("no limit")) == (0, 2)
    assert limited.limits() == []
    assert "no limits are recorded" in limited.command().stdout


def test_switched_off(limited: Limited) -> None:
    """Limits that are no longer wanted are removed, also those of an earlier daemon."""
    with limited.daemon():
        limited.admit()
        limited.pre_start()
    assert limited.limits()
    with limited.daemon("-memory-limits", "off"):
        wait_until(lambda: not limited.limits(), "no limit")
        assert not limited.kubelet.wait_registrations(2).options.pre_start_required


@pytest.mark.parametrize("failure", ["open", "closed"])
def test_backend_that_lies(limited: Limited, failure: str) -> None:
    """A limit that is not read back is not enforced: the container starts, or fails, and it is said."""
    limited.node.driver.set(limits="lies")
    with limited.daemon("-memory-limits-failure", failure) as daemon:
        limited.admit()
        if failure == "open":
            limited.pre_start()
            limited.start()
            (gpu,) = limited.wait_state("refused").gpus
            assert "no limit" in gpu.containers[0].limit_reason
        else:
            with pytest.raises(grpc.RpcError) as refusal:
                limited.pre_start()
            assert "reads back no limit" in str(refusal.value.details())
        daemon.wait_log("memory limits are not enforced")


def test_driver_hangs(limited: Limited) -> None:
    """A call about a limit that does not return is a GPU that does not answer; limits are set once it does."""
    with limited.daemon("-driver-timeout", "1", "-memory-limits-failure", "open"):
        limited.admit()
        limited.pre_start()
        limited.node.driver.hang("nvmlDeviceGetMemoryLimits")
        down = {"Unhealthy"}
        limited.kubelet.wait_for(lambda: set(limited.kubelet.devices(RESOURCE).values()) == down)
        limited.node.driver.works("nvmlDeviceGetMemoryLimits")
        limited.start()
        limited.kubelet.wait_for(lambda: set(limited.kubelet.devices(RESOURCE).values()) == {"Healthy"})
        limited.wait_state("enforced")


def test_the_command_without_a_driver(limited: Limited) -> None:
    """`sgpu limits` says in one line what is missing."""
    with limited.daemon():
        limited.admit()
        limited.pre_start()
    limited.node.driver.fail("nvmlInit", 9)
    failed = limited.command("-clear")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    limited.node.driver.works("nvmlInit")
    limited.node.driver.fail("nvmlDeviceSetMemoryLimits", 4)
    refused = limited.command("-clear")
    assert (refused.returncode, len(limited.limits())) == (1, 1)
    assert os.path.basename(limited.pod) in refused.stderr
    assert "-state-file" in limited.command("-state-file=").stderr
