"""How an operator steers sharing: the real daemon, a stub driver below it, a kubelet and its PodResources above it."""

from __future__ import annotations

import socket
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import grpc
import pytest
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources, wait_until
from node import RESOURCE, Node
from prometheus_client.parser import text_string_to_metric_families
from stub_driver import GIB, StubGpu

from sgpu.nvml import Code

pytestmark = pytest.mark.soak

SHARES = 4
#: Often enough for a test, and seldom enough that a sample is not stale by the time it is looked at.
FLAGS = ("-gpu-duplication-factor", SHARES, "-sample-interval", 0.2)
#: A driver that is looked at once, when the daemon starts.
ONCE = ("-gpu-duplication-factor", SHARES, "-sample-interval", 3600, "-health-interval", 3600)


@pytest.fixture
def kubelet(node: Node) -> Iterator[FakeKubelet]:
    """A kubelet that runs already."""
    with FakeKubelet(node.plugins) as running:
        yield running


@pytest.fixture
def pods(node: Node) -> Iterator[FakePodResources]:
    """The kubelet's PodResources, without pods."""
    with FakePodResources(node.pods) as serving:
        yield serving


@pytest.fixture
def gpus(node: Node) -> tuple[StubGpu, StubGpu]:
    """Two GPUs, in the order of their UUIDs, which is that of ties."""
    first, second = sorted(node.driver.gpus(2), key=lambda gpu: gpu.uuid)
    return first, second


def shares(gpu: StubGpu, numbers: Iterable[int] = range(SHARES)) -> list[str]:
    return [f"{gpu.uuid}::{number}" for number in numbers]


def counts(share_ids: Iterable[str]) -> Counter[str]:
    """How many shares of which GPU."""
    return Counter(share_id.partition("::")[0] for share_id in share_ids)


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


def wait_preferred(kubelet: FakeKubelet, available: Sequence[str], expected: Sequence[str]) -> None:
    """Wait until one share is preferred, of those: samples come when they come."""
    wait_until(lambda: kubelet.preferred(available) == list(expected), f"{expected} preferred")


class TestPlacement:
    def test_spread_follows_the_driver(self, node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
        """Where as many shares are allocated, more free memory decides, and then lower utilisation, as they are now."""
        first, second = gpus
        with node.daemon(*FLAGS):
            available = list(kubelet.wait_devices(2 * SHARES))
            node.driver.change(first, used=2 * GIB)
            wait_preferred(kubelet, available, shares(second, [0]))
            node.driver.change(second, used=3 * GIB)
            wait_preferred(kubelet, available, shares(first, [0]))
            node.driver.change(first, used=3 * GIB, utilisation=50)
            wait_preferred(kubelet, available, shares(second, [0]))

    @pytest.mark.parametrize(("placement", "chosen"), [("spread", 0), ("pack", 1)], ids=["spread", "pack"])
    def test_allocated_shares_come_first(
        self,
        node: Node,
        kubelet: FakeKubelet,
        pods: FakePodResources,
        gpus: tuple[StubGpu, StubGpu],
        placement: str,
        chosen: int,
    ) -> None:
        """Spread goes to the GPU of which containers have fewest, pack to that of which they have most."""
        first, second = gpus
        node.driver.change(first, used=9 * GIB, utilisation=90)
        pods.assign("team", "trainer", "main", shares(second, [0, 1]))
        with node.daemon(*FLAGS, "-placement", placement):
            kubelet.wait_devices(2 * SHARES)
            pods.wait_heeded()
            # As many free ones of each, so that what is offered says nothing.
            assert kubelet.preferred(shares(first, [2, 3]) + shares(second, [2, 3])) == shares(gpus[chosen], [2])

    @pytest.mark.parametrize(
        ("multi_share", "divided"),
        [("distinct", [1, 2]), ("strict-distinct", [1, 2]), ("same", [3])],
        ids=["distinct", "strict-distinct", "same"],
    )
    def test_shares_of_one_container(
        self,
        node: Node,
        kubelet: FakeKubelet,
        gpus: tuple[StubGpu, StubGpu],
        multi_share: str,
        divided: list[int],
    ) -> None:
        """From as many GPUs as possible, or from one that has room for all."""
        first, second = gpus
        with node.daemon(*ONCE, "-multi-share", multi_share):
            kubelet.wait_devices(2 * SHARES)
            chosen = kubelet.preferred(shares(first) + shares(second), size=3)
        assert sorted(counts(chosen).values()) == divided

    def test_what_is_offered_is_kept_to(self, node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
        """A NUMA node's share of the GPUs, must-haves, ids of nobody, too few: never an error."""
        first, second = gpus
        node.driver.change(second, used=9 * GIB)
        with node.daemon(*ONCE):
            kubelet.wait_devices(2 * SHARES)
            assert kubelet.preferred(shares(second), size=2) == shares(second, [0, 1])
            assert kubelet.preferred(shares(first), shares(first, [3]), size=2) == shares(first, [3, 0])
            unknown = ["GPU-0::0", "nonsense", "", f"{first.uuid}::99", f"{first.uuid}::01"]
            assert kubelet.preferred([*unknown, *shares(second, [1])], size=3) == shares(second, [1])
            assert kubelet.preferred(unknown) == []
            assert kubelet.preferred([], size=2) == []
            assert kubelet.preferred(shares(first), size=0) == []
            assert kubelet.preferred(shares(first, [0]), ["nonsense"], size=2) == ["nonsense", *shares(first, [0])]

    def test_a_share_just_handed_out_counts(
        self, node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]
    ) -> None:
        """As used memory, before the container has loaded anything: the next one goes elsewhere."""
        first, second = gpus
        node.driver.change(second, used=1 * GIB)
        with node.daemon(*FLAGS):
            kubelet.wait_devices(2 * SHARES)
            offered = shares(first, [1, 2]) + shares(second, [1, 2])
            wait_preferred(kubelet, offered, shares(first, [1]))
            kubelet.allocate(shares(first, [0]))
            wait_preferred(kubelet, offered, shares(second, [1]))

    def test_stale_samples_do_not_count(self, node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
        """A driver that hangs says nothing of now: then only shares count, and calls are answered as before."""
        first, second = gpus
        node.driver.change(first, used=9 * GIB)
        with node.daemon(*FLAGS, "-driver-timeout", 60) as daemon:
            available = list(kubelet.wait_devices(2 * SHARES))
            wait_preferred(kubelet, available, shares(second, [0]))
            node.driver.hang("nvmlDeviceGetMemoryInfo")
            wait_preferred(kubelet, available, shares(first, [0]))
            assert kubelet.preferred(shares(first, [3]) + shares(second)) == shares(second, [0])
            assert len(kubelet.lists[RESOURCE]) == 1
            node.driver.works("nvmlDeviceGetMemoryInfo")
            wait_preferred(kubelet, available, shares(second, [0]))
            daemon.terminate()

    def test_no_call_asks_the_driver(self, node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
        """Neither GetPreferredAllocation nor Allocate."""
        with node.daemon(*ONCE):
            available = list(kubelet.wait_devices(2 * SHARES))
            before = nvml_calls(node)
            for share in available:
                kubelet.preferred(available, size=2)
                kubelet.allocate([share])
            assert nvml_calls(node) == before > 0


def nvml_calls(node: Node) -> int:
    """How many there were, but for those that wait for events."""
    return sum(not line.startswith("nvmlEventSetWait") for line in node.driver.call_log())


class TestAllocate:
    def test_strict_distinct_refuses(self, node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
        """Two shares of one GPU for a container, with a message for the pod's events; of two GPUs, they are given."""
        first, second = gpus
        with node.daemon(*ONCE, "-multi-share", "strict-distinct") as daemon:
            kubelet.wait_devices(2 * SHARES)
            with pytest.raises(grpc.RpcError) as refusal:
                kubelet.allocate(shares(first, [0, 1]))
            kubelet.allocate(shares(first, [0]) + shares(second, [0]))
            daemon.wait_log("WARNING refused an allocation: shares ")
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert refusal.value.details() == (
            f"shares {first.uuid}::0, {first.uuid}::1 are not all of different GPUs, which -multi-share "
            "strict-distinct asks for: ask for fewer, or wait until more GPUs of the node have a free share"
        )

    def test_memory_and_no_hints(self, node: Node, kubelet: FakeKubelet, gpus: tuple[StubGpu, StubGpu]) -> None:
        """Each container's part of the memory of the GPUs it has shares of; hints can be switched off."""
        first, second = gpus
        node.driver.change(second, total=80 * GIB)
        with node.daemon(*ONCE, "-framework-hints=false"):
            kubelet.wait_devices(2 * SHARES)
            answers = kubelet.allocate(shares(first, [0]), shares(first, [1, 2]) + shares(second, [3]))
        parts = [15 * GIB // 4, 2 * 15 * GIB // 4 + 80 * GIB // 4]
        assert [dict(answer.envs) for answer in answers.container_responses] == [
            {
                "SGPU_SHARES": "1",
                "SGPU_GPU_UUIDS": first.uuid,
                "NVIDIA_VISIBLE_DEVICES": "void",
                "SGPU_MEMORY_BYTES": str(parts[0]),
            },
            {
                "SGPU_SHARES": "3",
                "SGPU_GPU_UUIDS": f"{first.uuid},{second.uuid}",
                "NVIDIA_VISIBLE_DEVICES": "void",
                "SGPU_MEMORY_BYTES": str(parts[1]),
            },
        ]


class TestWatermark:
    def test_the_free_shares_of_a_full_gpu_are_withheld(
        self, node: Node, kubelet: FakeKubelet, pods: FakePodResources, gpus: tuple[StubGpu, StubGpu]
    ) -> None:
        """Unhealthy above 95 %, and back at 90 %, not before. What containers have, and other GPUs, stay as they are.

        One list for each change, and one line of the log with the pods.
        """
        full, other = gpus
        pods.assign("team", "trainer", "main", shares(full, [1]))
        pods.assign("team", "trainer", "sidecar", shares(full, [2]))
        pods.assign("web", "server", "main", shares(other, [0]))
        with node.daemon(*FLAGS) as daemon:
            kubelet.wait_devices(2 * SHARES)
            fill(node, full, 0.94)
            wait_heeded(node, pods, full)
            assert not unhealthy(kubelet)

            fill(node, full, 0.96)
            kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(full, [0, 3])))
            line = daemon.wait_log("its memory is full").text
            assert line.partition(" WARNING ")[2] == (
                f"GPU {full.uuid}: its memory is full: 14.4 of 15.0 GiB are used, by team/trainer; "
                "its free shares are withheld"
            )
            fill(node, full, 0.91)
            wait_heeded(node, pods, full)
            assert unhealthy(kubelet) == set(shares(full, [0, 3]))

            fill(node, full, 0.89)
            kubelet.wait_for(lambda: not unhealthy(kubelet))
            daemon.wait_log(f"GPU {full.uuid}: its free shares are no longer withheld")
            assert len(kubelet.lists[RESOURCE]) == 3
            assert daemon.logs.count("its memory is full") == 1

    def test_the_pods_with_what_they_use(self, node: Node, kubelet: FakeKubelet, pods: FakePodResources) -> None:
        """Where the driver tells of processes, and the kernel whose they are."""
        (gpu,) = node.driver.state.gpus
        pods.assign("team", "trainer", "main", shares(gpu, [1]))
        pods.assign("team", "idle", "main", shares(gpu, [2]))
        node.start_process(100, "team/trainer/main")
        node.start_process(101, "web/server/main")
        node.start_process(102)
        compute = ((100, 9 * GIB), (101, 3 * GIB), (102, GIB), (103, GIB))
        node.driver.change(gpu, used=int(0.96 * gpu.total), compute=compute, graphics=((102, GIB),))
        with node.daemon(*FLAGS) as daemon:
            kubelet.wait_devices(SHARES)
            line = daemon.wait_log("its memory is full").text
            assert (
                "GiB are used, by team/trainer (9.0 GiB), web/server (3.0 GiB), processes of no pod (1.0 GiB);" in line
            )

    def test_a_share_counts_as_free_when_its_pod_is_gone(
        self, node: Node, kubelet: FakeKubelet, pods: FakePodResources
    ) -> None:
        """And as taken from Allocate on, though the kubelet's list does not have it yet."""
        (gpu,) = node.driver.state.gpus
        pods.assign("default", "trainer", "main", shares(gpu, [0]))
        with node.daemon(*FLAGS):
            kubelet.wait_devices(SHARES)
            pods.wait_heeded()
            kubelet.allocate(shares(gpu, [3]))
            fill(node, gpu, 0.96)
            kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(gpu, [1, 2])))
            pods.release("trainer")
            kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(gpu, [0, 1, 2])))

    def test_zero_switches_it_off(self, node: Node, kubelet: FakeKubelet, pods: FakePodResources) -> None:
        """However full."""
        (gpu,) = node.driver.state.gpus
        fill(node, gpu, 1.0)
        with node.daemon(*FLAGS, "-memory-watermark", 0) as daemon:
            kubelet.wait_devices(SHARES)
            wait_heeded(node, pods, gpu)
            assert not unhealthy(kubelet)
            assert "WARNING" not in daemon.logs

    def test_without_pod_resources_nothing_is_withheld(self, node: Node, kubelet: FakeKubelet) -> None:
        """That is told once. It is looked for again and again: when it is there, it works; and off again without."""
        (gpu,) = node.driver.state.gpus
        fill(node, gpu, 0.99)
        pods = FakePodResources(node.pods)
        pods.assign("team", "trainer", "main", shares(gpu, [0]))
        with node.daemon(*FLAGS) as daemon:
            kubelet.wait_devices(SHARES)
            daemon.wait_log("which shares are in use is not known, so that none is withheld: the kubelet does not an")
            polls = node.driver.calls("nvmlDeviceGetMemoryInfo")
            wait_until(lambda: node.driver.calls("nvmlDeviceGetMemoryInfo") >= polls + 4)
            assert daemon.logs.count("is not known") == 1
            assert not unhealthy(kubelet)
            with pods:
                kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(gpu, [1, 2, 3])))
                pods.refuse(grpc.StatusCode.UNIMPLEMENTED, "unknown service v1.PodResourcesLister")
                kubelet.wait_for(lambda: not unhealthy(kubelet))
                daemon.wait_log("unknown service v1.PodResourcesLister; it needs Kubernetes 1.20")
            assert len(kubelet.lists[RESOURCE]) == 3

    def test_a_slow_kubelet_is_waited_for(self, node: Node, kubelet: FakeKubelet, pods: FakePodResources) -> None:
        """Nobody else waits with it: calls are answered, and GPUs are withheld when its answer comes."""
        (gpu,) = node.driver.state.gpus
        fill(node, gpu, 0.99)
        pods.delay = 1.0
        with node.daemon(*FLAGS) as daemon:
            kubelet.wait_devices(SHARES)
            pods.wait_calls(1)
            assert kubelet.preferred(shares(gpu)) == shares(gpu, [0])
            kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(gpu)))
            assert "is not known" not in daemon.logs

    def test_memory_not_supported(
        self, node: Node, kubelet: FakeKubelet, pods: FakePodResources, gpus: tuple[StubGpu, StubGpu]
    ) -> None:
        """A GPU that shares the machine's memory has no part of it to tell and is never full; others are as ever."""
        unified, other = gpus
        node.driver.fail("nvmlDeviceGetMemoryInfo", Code.NOT_SUPPORTED, unified)
        fill(node, unified, 0.99)
        with node.daemon(*FLAGS):
            kubelet.wait_devices(2 * SHARES)
            one, two = kubelet.allocate(shares(unified, [0]), shares(other, [0])).container_responses
            assert "SGPU_MEMORY_BYTES" not in one.envs
            assert two.envs["SGPU_MEMORY_BYTES"] == str(15 * GIB // SHARES)
            assert one.envs["XLA_PYTHON_CLIENT_PREALLOCATE"] == two.envs["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
            fill(node, other, 0.99)
            kubelet.wait_for(lambda: unhealthy(kubelet) == set(shares(other, [1, 2, 3])))
            wait_heeded(node, pods, other)
            assert unhealthy(kubelet) == set(shares(other, [1, 2, 3]))


class TestMetrics:
    def test_who_uses_what(self, node: Node, kubelet: FakeKubelet, pods: FakePodResources) -> None:
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
            wait_until(lambda: series("sgpu_container_memory_used_bytes", *names) == memory)
            assert series("sgpu_container_shares", "pod") == {("trainer",): 1, ("",): 0}
            assert series("sgpu_container_utilization_ratio", "pod") == {}
            (error,) = series("sgpu_nvml_errors_total", "function", "code")
            assert error == ("nvmlDeviceGetProcessUtilization", "999")
            node.driver.works("nvmlDeviceGetProcessUtilization")
            wait_until(lambda: series("sgpu_container_utilization_ratio", "pod") == {("trainer",): 0.3, ("",): 0})
            pods.release("trainer", "team")
            node.driver.change(gpu, compute=(), mps=())
            wait_until(lambda: not series("sgpu_container_shares") and series("sgpu_gpu_healthy"))
