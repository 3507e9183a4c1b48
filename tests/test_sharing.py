"""How an operator steers sharing: the real daemon, a stub driver below it, a kubelet and its PodResources above it."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterable

import grpc
import pytest
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import RESOURCE, Node
from prometheus_client.parser import text_string_to_metric_families
from stub_driver import GIB, StubGpu
from watching import wait_until

pytestmark = pytest.mark.soak

SHARES = 4
#: Often enough for a test, and seldom enough that a sample is not stale by the time it is looked at.
FLAGS = ("-gpu-duplication-factor", SHARES, "-health-interval", 0.2)


@pytest.fixture
def gpus(node: Node) -> tuple[StubGpu, StubGpu]:
    """Two GPUs, in the order of their UUIDs, which is that of ties."""
    first, second = sorted(node.driver.gpus(2), key=lambda gpu: gpu.uuid)
    return first, second


def shares(gpu: StubGpu, numbers: Iterable[int] = range(SHARES)) -> list[str]:
    return [f"{gpu.uuid}::{number}" for number in numbers]


def unhealthy(kubelet: FakeKubelet) -> set[str]:
    return {share for share, word in kubelet.devices(RESOURCE).items() if word != "Healthy"}


def fill(node: Node, gpu: StubGpu, part: float) -> None:
    """Have this part of a GPU's memory used, with what the driver has reserved."""
    node.driver.change(gpu, used=int(part * gpu.total) - gpu.reserved)


def wait_heeded(node: Node, pods: FakePodResources, gpu: StubGpu) -> None:
    """Wait until the daemon has seen the driver and the pods as they are now, and has acted upon it."""
    polls = node.driver.calls("nvmlDeviceGetMemoryInfo", gpu)
    wait_until(lambda: node.driver.calls("nvmlDeviceGetMemoryInfo", gpu) >= polls + 3, "three more polls")
    pods.wait_heeded()


def test_spread_follows_the_driver(node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
    """Where as many shares are allocated, more free memory decides, and then lower utilization, as they are now."""
    first, second = gpus
    with node.daemon(*FLAGS):
        available = list(kubelet.wait_devices(2 * SHARES))

        def wait_preferred(gpu: StubGpu) -> None:
            wait_until(lambda: kubelet.preferred(available) == shares(gpu, [0]), f"{gpu.uuid} preferred")

        node.driver.change(first, used=2 * GIB)
        wait_preferred(second)
        node.driver.change(second, used=3 * GIB)
        wait_preferred(first)
        node.driver.change(first, used=3 * GIB, utilization=50)
        wait_preferred(second)


def test_pack_follows_the_pods(
    node: Node, kubelet: FakeKubelet, pods: FakePodResources, gpus: tuple[StubGpu, StubGpu]
) -> None:
    """-placement pack goes to the GPU of which containers have most shares."""
    first, second = gpus
    node.driver.change(second, used=9 * GIB, utilization=90)
    pods.assign("team", "trainer", "main", shares(second, [0, 1]))
    with node.daemon(*FLAGS, "-placement", "pack"):
        kubelet.wait_devices(2 * SHARES)
        # As many free ones of each, so that what is offered says nothing.
        offered = shares(first, [2, 3]) + shares(second, [2, 3])
        wait_until(lambda: kubelet.preferred(offered) == shares(second, [2]), "the fuller one preferred")


def test_what_a_container_gets(node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
    """-multi-share strict-distinct refuses two shares of one GPU. -framework-hints false leaves the hints out."""
    first, second = gpus
    second = node.driver.change(second, total=80 * GIB)
    parts = [(gpu.total - gpu.reserved) // SHARES for gpu in (first, second)]
    with node.daemon(*FLAGS, "-multi-share", "strict-distinct", "-framework-hints=false") as daemon:
        kubelet.wait_devices(2 * SHARES)
        with pytest.raises(grpc.RpcError) as refusal:
            kubelet.allocate(shares(first, [0, 1]))
        daemon.wait_log("strict-distinct")
        (answer,) = kubelet.allocate(shares(first, [0]) + shares(second, [0])).container_responses
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "strict-distinct" in str(refusal.value.details())
    assert dict(answer.envs) == {
        "SGPU_SHARES": "2",
        "SGPU_GPU_UUIDS": f"{first.uuid},{second.uuid}",
        "NVIDIA_VISIBLE_DEVICES": "void",
        "SGPU_MEMORY_BYTES": str(sum(parts)),
        "SGPU_MEMORY_BYTES_0": str(parts[0]),
        "SGPU_MEMORY_BYTES_1": str(parts[1]),
    }


def test_the_free_shares_of_a_full_gpu_are_withheld(
    node: Node, kubelet: FakeKubelet, pods: FakePodResources, gpus: tuple[StubGpu, StubGpu]
) -> None:
    """Unhealthy above -memory-watermark, and back 5 % below. What containers have, and other GPUs, stay as they are.

    One list for each change, and one line of the log with the pods.
    """
    full, other = gpus
    pods.assign("team", "trainer", "main", shares(full, [1]))
    pods.assign("team", "trainer", "sidecar", shares(full, [2]))
    pods.assign("team", "short", "main", shares(full, [3]))
    pods.assign("web", "server", "main", shares(other, [0]))
    with node.daemon(*FLAGS, "-memory-watermark", 0.8) as daemon:
        kubelet.wait_devices(2 * SHARES)
        fill(node, full, 0.79)
        wait_heeded(node, pods, full)
        assert not unhealthy(kubelet)

        fill(node, full, 0.81)
        kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(full, [0])))
        assert full.uuid in daemon.wait_log("team/trainer").text
        pods.release("short", "team")
        kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(full, [0, 3])))
        kubelet.allocate(shares(full, [3]))  # the kubelet was faster than the list
        kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(full, [0])))
        fill(node, full, 0.76)
        wait_heeded(node, pods, full)
        assert unhealthy(kubelet) == set(shares(full, [0]))

        fill(node, full, 0.74)
        kubelet.wait_for(lambda: not unhealthy(kubelet))
        assert len(kubelet.lists[RESOURCE]) == 5
        assert daemon.logs.count("team/trainer") == 1
        assert "ERROR" not in daemon.logs


def test_who_uses_what(node: Node, kubelet: FakeKubelet, pods: FakePodResources) -> None:
    """From the driver's processes to the series of each container, and gone with them; and the driver's errors."""
    (gpu,) = node.driver.state.gpus
    pods.assign("team", "trainer", "main", shares(gpu, [1]))
    node.start_process(100, "team/trainer/main")
    node.start_process(101)
    gpu = node.driver.change(gpu, compute=((100, 9 * GIB), (101, GIB)), mps=((100, GIB),), samples=((100, 30, 0),))
    node.driver.fail("nvmlDeviceGetProcessUtilization", 999)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def series(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The values by these labels."""
        try:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        except OSError:
            return {}
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return {tuple(sample.labels[label] for label in labels): sample.value for sample in samples}

    with node.daemon(*FLAGS, "-metrics-address", address):
        memory = {("team", "trainer", "main"): 9 * GIB, ("", "", ""): GIB}
        names = ("namespace", "pod", "container")
        wait_until(lambda: series("sgpu_container_memory_used_bytes", *names) == memory, "memory")
        assert series("sgpu_container_shares", "pod") == {("trainer",): 1, ("",): 0}
        assert series("sgpu_container_utilization_ratio", "pod") == {}
        (error,) = series("sgpu_nvml_errors_total", "function", "code")
        assert error == ("nvmlDeviceGetProcessUtilization", "999")
        node.driver.works("nvmlDeviceGetProcessUtilization")
        wait_until(lambda: series("sgpu_container_utilization_ratio", "pod") == {("trainer",): 0.3, ("",): 0}, "use")
        pods.release("trainer", "team")
        node.driver.change(gpu, compute=(), mps=())
        wait_until(lambda: not series("sgpu_container_shares") and series("sgpu_gpu_healthy"), "no pods")
