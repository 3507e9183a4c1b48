"""A GPU is taken out for a reset: the real daemon and command, a stub driver below and a kubelet above."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest
from daemon_process import COMMAND, DaemonProcess, LoggedProcess
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import RESOURCE, Node
from stub_driver import StubGpu
from watching import wait_until

from sgpu.observe.client import fetch
from sgpu.observe.snapshot import GpuSnapshot

pytestmark = pytest.mark.process

SHARES = 4
#: Seconds, more than anything takes.
LONG = 60


@pytest.fixture
def gpus(node: Node) -> tuple[StubGpu, ...]:
    gpus = node.driver.gpus(2)
    node.make_devices()
    return gpus


def start(node: Node, *flags: str) -> DaemonProcess:
    return node.daemon("-gpu-duplication-factor", SHARES, "-status-socket", str(node.sgpu_socket), *flags)


def command(node: Node, *arguments: str) -> LoggedProcess:
    """The command, to be entered."""
    return LoggedProcess([*COMMAND, *arguments, "-status-socket", str(node.sgpu_socket)])


def run(node: Node, *arguments: str) -> tuple[int, str]:
    """Run the command to its end; returns its exit code and what it said."""
    with command(node, *arguments) as process:
        return process.wait_exit(LONG), process.logs


def seen(node: Node, gpu: StubGpu) -> GpuSnapshot:
    return next(each for each in fetch(str(node.sgpu_socket), LONG).gpus if each.uuid == gpu.uuid)


def released(node: Node, gpu: StubGpu) -> bool:
    cordon = seen(node, gpu).cordon
    return cordon is not None and cordon.released


def offered(kubelet: FakeKubelet) -> set[str]:
    return {share for share, health in kubelet.devices(RESOURCE).items() if health == "Healthy"}


def shares(gpu: StubGpu) -> set[str]:
    return {f"{gpu.uuid}::{number}" for number in range(SHARES)}


def opened(daemon: DaemonProcess) -> set[str]:
    """The device nodes of GPUs that processes of the daemon have open."""
    links = [link for pid in daemon.pids() for link in Path(f"/proc/{pid}/fd").iterdir()]
    names = {os.path.basename(os.readlink(link)) for link in links if link.is_symlink()}
    return {name for name in names if name.removeprefix("nvidia").isdecimal()}


def test_a_reset(node: Node, kubelet: FakeKubelet, pods: FakePodResources, gpus: tuple[StubGpu, ...]) -> None:
    """A GPU is cordoned while a container has a share, over a restart of sgpu, until it is released and uncordoned."""
    first, second = gpus
    running = f"{first.uuid}::1"
    pods.assign("team", "trainer", "main", [running])
    with start(node) as daemon:
        kubelet.wait_devices(2 * SHARES)
        wait_until(lambda: seen(node, first).allocated == 1, "the pod is seen")
        code, said = run(node, "cordon", first.uuid[:12], "-reason", "row remap")
        assert (code, first.uuid in said, "team/trainer" in said) == (0, True, True)
        kubelet.wait_for(lambda: offered(kubelet) == {running, *shares(second)})
        with pytest.raises(grpc.RpcError, match="row remap"):
            kubelet.allocate([f"{first.uuid}::2"])
        assert opened(daemon) == {"nvidia0", "nvidia1"}
        assert seen(node, first).memory_used is not None
        daemon.terminate()

    with start(node) as daemon:
        kubelet.wait_for(lambda: offered(kubelet) == {running, *shares(second)})
        with command(node, "cordon", first.bus_id, "-wait") as waiting:
            waiting.wait_log("team/trainer")
            assert not released(node, first)
            pods.release("trainer", "team")
            assert waiting.wait_exit(LONG) == 0
        assert opened(daemon) == {"nvidia1"}
        assert offered(kubelet) == shares(second)
        gpu = seen(node, first)
        assert gpu.cordon
        assert (gpu.healthy, gpu.memory_used, gpu.utilization) == (True, None, None)
        assert (gpu.cordon.reason, gpu.cordon.released, gpu.cordon.problem) == ("row remap", True, "")
        daemon.terminate()

    handles = node.driver.calls("nvmlDeviceGetUUID", first)
    with start(node) as daemon:
        daemon.wait_log("serving status")
        kubelet.wait_for(lambda: len(kubelet.devices(RESOURCE)) == 2 * SHARES and offered(kubelet) == shares(second))
        assert released(node, first)
        assert [each.uuid for each in fetch(str(node.sgpu_socket)).gpus] == [first.uuid, second.uuid]
        assert node.driver.calls("nvmlDeviceGetUUID", first) == handles
        assert seen(node, second).memory_used is not None
        code, said = run(node, "uncordon", "0")
        assert (code, first.uuid in said) == (0, True)
        kubelet.wait_for(lambda: offered(kubelet) == shares(first) | shares(second))
        assert opened(daemon) == {"nvidia0", "nvidia1"}
        assert seen(node, first).cordon is None


def test_a_rollout(node: Node, kubelet: FakeKubelet, pods: FakePodResources, gpus: tuple[StubGpu, ...]) -> None:
    """A daemon that stands by takes over what was cordoned meanwhile, and can end it."""
    first, second = gpus
    pods.assign("team", "trainer", "main", [f"{first.uuid}::1"])
    with start(node) as daemon:
        kubelet.wait_devices(2 * SHARES)
        daemon.wait_log("serving status")
        with start(node, "-standby") as successor:
            successor.wait_log("standing by")
            assert run(node, "cordon", first.uuid)[0] == 0
            daemon.terminate()
            successor.wait_log("serving status")
            kubelet.wait_for(lambda: offered(kubelet) == {f"{first.uuid}::1", *shares(second)})
            assert run(node, "uncordon", first.uuid)[0] == 0
            kubelet.wait_for(lambda: offered(kubelet) == shares(first) | shares(second))
