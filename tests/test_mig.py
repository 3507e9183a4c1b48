"""MIG from the driver to a container: the real daemon, a stub driver below it, a kubelet above it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import grpc
import pytest
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import RESOURCE, Node
from stub_driver import GIB, MIB, StubGpu, StubInstance, mig_gpu
from watching import wait_until

from sgpu.pods.checkpoint import FILE

#: Shares of a whole card.
SHARES = 20
FLAGS = ("-gpu-duplication-factor", SHARES, "-sample-interval", 0.2)


@pytest.fixture
def gpu(node: Node) -> StubGpu:
    """An A100 in MIG mode, without instances."""
    node.make_mig_minors()
    made = mig_gpu(0, minor=1)
    node.driver.set(gpus=(made,))
    return made


@pytest.fixture
def pair(node: Node, gpu: StubGpu) -> tuple[StubInstance, StubInstance]:
    """A small instance of two shares, and a large one of nine."""
    return node.driver.create(gpu, "1g.5gb"), node.driver.create(gpu, "3g.20gb")


def counts(kubelet: FakeKubelet, resource: str = RESOURCE) -> dict[tuple[str, str], int]:
    """How many shares of each unit are healthy, or not."""
    return dict(Counter((share.partition("::")[0], word) for share, word in kubelet.devices(resource).items()))


def wait_counts(kubelet: FakeKubelet, expected: dict[tuple[str, str], int], resource: str = RESOURCE) -> None:
    kubelet.wait_for(lambda: counts(kubelet, resource) == expected, message=f"{expected}")


def healthy(instance: StubInstance, count: int) -> dict[tuple[str, str], int]:
    return {(instance.uuid, "Healthy"): count}


def nodes(kubelet: FakeKubelet, *shares: str, resource: str = RESOURCE) -> list[str]:
    (answer,) = kubelet.allocate(list(shares), resource=resource).container_responses
    return [device.container_path for device in answer.devices]


def test_found_and_lost(node: Node, gpu: StubGpu, kubelet: FakeKubelet) -> None:
    """Instances come and go while the daemon runs, at once by the driver's event, and it registers but once.

    One that goes while a container has a share of it keeps that share, as unhealthy, until the container is gone.
    """
    with FakePodResources(node.pods) as pods, node.daemon(*FLAGS, "-sample-interval", 2) as daemon:
        daemon.wait_log("has no instances")
        first = node.driver.create(gpu, "1g.5gb")
        kubelet.wait_registrations(1)
        wait_counts(kubelet, healthy(first, 2))
        second = node.driver.create(gpu, "3g.20gb")
        wait_counts(kubelet, healthy(first, 2) | healthy(second, 9))
        pods.assign("team", "trainer", "main", [f"{first.uuid}::1"])
        pods.wait_heeded()
        node.driver.destroy(gpu, first)
        wait_counts(kubelet, {(first.uuid, "Unhealthy"): 1} | healthy(second, 9))
        assert first.uuid in daemon.wait_log("is gone and is used by team/trainer").text
        with pytest.raises(grpc.RpcError, match="destroyed"):
            kubelet.allocate([f"{first.uuid}::1"])
        third = node.driver.create(gpu, "2g.10gb")
        wait_counts(kubelet, {(first.uuid, "Unhealthy"): 1} | healthy(second, 9) | healthy(third, 4))
        pods.release("trainer", "team")
        wait_counts(kubelet, healthy(second, 9) | healthy(third, 4))
        assert len(kubelet.registrations) == 1
        assert "Traceback" not in daemon.logs


def test_what_a_container_gets(
    node: Node, gpu: StubGpu, pair: tuple[StubInstance, StubInstance], kubelet: FakeKubelet
) -> None:
    """Each gets its parent's node and its own capabilities, by the parent's minor number; two shares are of one."""
    small, large = pair
    with node.daemon(*FLAGS):
        available = list(kubelet.wait_devices(11))
        of_small = nodes(kubelet, f"{small.uuid}::0")
        of_large = nodes(kubelet, f"{large.uuid}::0")
        capabilities = [[name for name in each if "nvidia-caps" in name] for each in (of_small, of_large)]
        assert capabilities == [[f"/dev/nvidia-caps/nvidia-cap{n}" for n in pair] for pair in ((147, 148), (156, 157))]
        others = ["/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]
        assert sorted({*of_small} - {*capabilities[0]}) == sorted(others)
        (answer,) = kubelet.allocate([f"{large.uuid}::0", f"{large.uuid}::1"]).container_responses
        assert answer.envs["CUDA_VISIBLE_DEVICES"] == large.uuid
        assert answer.envs["SGPU_MEMORY_BYTES"] == str(2 * large.total // 9)
        for size in (2, 5):
            assert len({share.partition("::")[0] for share in kubelet.preferred(available, size=size)}) == 1


def test_profiles(node: Node, gpu: StubGpu, pair: tuple[StubInstance, StubInstance], kubelet: FakeKubelet) -> None:
    """With -mig profile each profile is a resource of whole instances, which comes and goes with them.

    The kubelet gets an empty list before the end, or it would keep the number of devices.
    """
    small, large = pair
    name = "nvidia.com/mig-{}"
    one, three = name.format("1g.5gb"), name.format("3g.20gb")
    with node.daemon(*FLAGS, "-mig", "profile", "-mig-resource-name", "nvidia.com/mig-{profile}") as daemon:
        wait_counts(kubelet, healthy(small, 1), one)
        wait_counts(kubelet, healthy(large, 1), three)
        assert RESOURCE not in kubelet.lists
        assert "replace each other" not in daemon.logs
        media = node.driver.create(gpu, "1g.5gb+me")
        wait_counts(kubelet, healthy(media, 1), name.format("1g.5gb.me"))
        assert "/dev/nvidia-caps/nvidia-cap165" in nodes(kubelet, f"{media.uuid}::0", resource=name.format("1g.5gb.me"))
        with FakePodResources(node.pods) as pods:
            pods.wait_heeded()
            node.driver.destroy(gpu, large)
            kubelet.wait_for(lambda: kubelet.lists[three] and not kubelet.devices(three), message="an empty list")
        assert counts(kubelet, one) == healthy(small, 1)


def test_seen(node: Node, gpu: StubGpu, pair: tuple[StubInstance, StubInstance], kubelet: FakeKubelet) -> None:
    """`status` shows each instance with its GPU, its memory, and the pods that use it; utilization is unknown."""
    small, large = pair
    node.start_process(100, "team/trainer/main")
    node.driver.change_instance(gpu, large, used=2 * GIB, compute=((100, 2 * GIB),))
    socket = node.state.parent / "status.sock"
    with FakePodResources(node.pods) as pods, node.daemon(*FLAGS, "-status-socket", str(socket)):
        pods.assign("team", "trainer", "main", [f"{large.uuid}::1"])
        kubelet.wait_devices(11)
        pods.wait_heeded()

        def shown() -> dict[str, dict[str, Any]]:
            command = [sys.executable, "-m", "sgpu", "status", "-o", "json", "-status-socket", str(socket)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return {gpu["uuid"]: gpu for gpu in json.loads(answer)["gpus"]}

        wait_until(lambda: shown()[large.uuid]["containers"] and shown()[large.uuid]["memory_used"], "the pod")
        seen = shown()
        assert set(seen) == {small.uuid, large.uuid}
        of_large = seen[large.uuid]
        assert (of_large["parent"], of_large["mig_profile"], of_large["utilization"]) == (gpu.uuid, "3g.20gb", None)
        assert (of_large["memory_total"], of_large["memory_used"]) == (19968 * MIB, 2 * GIB)
        (use,) = of_large["containers"]
        assert (use["pod"], use["shares"], use["memory_used"], use["utilization"]) == ("trainer", 1, 2 * GIB, None)


def test_doctor(node: Node, kubelet: FakeKubelet) -> None:
    """The doctor checks the daemon for each profile's resource, and says where another plugin has it.

    That no GPU is offered as the default resource is no finding.
    """
    flags = ("-mig", "profile", "-mig-resource-name", "nvidia.com/mig-{profile}", "-simulate-mig", "1g.10gb,2g.20gb")
    registered = {"nvidia.com/mig-1g.10gb": ["MIG-5c4b9b0c"], "nvidia.com/mig-2g.20gb": []}
    with node.daemon(*FLAGS, *flags, simulate=1) as daemon:
        kubelet.wait_for(lambda: all(map(kubelet.devices, registered)))  # each list writes the file
        (node.plugins / FILE).write_text(json.dumps({"Data": {"RegisteredDevices": registered}}))
        arguments = [argument for argument in daemon.arguments if argument != "-m"][2:]
        command = [sys.executable, "-m", "sgpu", "doctor", "-o", "json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
    findings = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert findings["registration of nvidia.com/mig-1g.10gb"]["level"] == "FAIL"
    assert "MIG-5c4b9b0c" in findings["registration of nvidia.com/mig-1g.10gb"]["message"]
    assert findings["daemon for nvidia.com/mig-2g.20gb"]["level"] == "ok"
    assert findings[f"daemon for {RESOURCE}"]["level"] == "skip"
    assert "sgpu-" not in findings["other plugins"]["message"]
    assert "1 x nvidia.com/mig-1g.10gb, 1 x nvidia.com/mig-2g.20gb" in findings["rules per GPU"]["message"]
