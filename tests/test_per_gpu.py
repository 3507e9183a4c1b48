"""Rules per GPU: the real daemon with a file of them, a stub driver below it and a kubelet above it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import grpc
import pytest
from daemon_process import DaemonProcess
from fake_kubelet import Connection, FakeKubelet
from fake_pod_resources import FakePodResources, wait_until
from node import RESOURCE, Node
from rewriting import WAYS, rewrite
from stub_driver import GIB, StubGpu

from sgpu.daemon import FAREWELL

pytestmark = pytest.mark.soak

WHOLE = "example.com/whole-gpu"
#: Of a GPU that is shared, unless the test says otherwise.
SHARES = 4
T4 = StubGpu(0)
A100 = attrs.evolve(StubGpu(1), name="NVIDIA A100-SXM4-80GB", total=80 * GIB)
OTHER = StubGpu(2)
ONE_OF_EACH = f"""\
gpu-duplication-factor: {SHARES}
gpus:
  - name: "*a100*"
    shares: 1
    resource: {WHOLE}
  - uuid: {OTHER.uuid}
    exclude: true
"""
ALL_SHARED = f"gpu-duplication-factor: {SHARES}\n"


@pytest.fixture
def config(node: Node) -> Path:
    """Where the rules are, in a directory of their own; the node has three GPUs."""
    node.driver.set(gpus=(T4, A100, OTHER))
    file = node.host.parent / "etc" / "config.yaml"
    file.parent.mkdir()
    file.write_text(ONE_OF_EACH)
    return file


@pytest.fixture
def kubelet(node: Node) -> Iterator[FakeKubelet]:
    """A kubelet that runs already."""
    with FakeKubelet(node.plugins) as running:
        yield running


@pytest.fixture
def daemon(node: Node, config: Path, kubelet: FakeKubelet) -> Iterator[DaemonProcess]:
    """A daemon that offers one GPU shared and one whole."""
    with started(node, config) as running:
        wait_one_of_each(kubelet)
        yield running


def started(node: Node, config: Path) -> DaemonProcess:
    """A daemon with these rules, to be entered."""
    return node.daemon("-config", str(config), "-sample-interval", 0.2)


def shares(gpu: StubGpu, count: int = SHARES) -> set[str]:
    return {f"{gpu.uuid}::{number}" for number in range(count)}


def wait_shares(kubelet: FakeKubelet, expected: set[str], resource: str = RESOURCE) -> None:
    """Wait until the kubelet has been told of exactly these."""
    kubelet.wait_for(lambda: kubelet.devices(resource).keys() == expected, message=f"{expected} of {resource}")


def wait_one_of_each(kubelet: FakeKubelet) -> None:
    wait_shares(kubelet, shares(T4))
    wait_shares(kubelet, shares(A100, 1), WHOLE)


def connection(kubelet: FakeKubelet, resource: str = RESOURCE) -> Connection:
    """The one connection that the resource has had. AssertionError if it was registered more than once."""
    (registration,) = (each for each in kubelet.registrations if each.request.resource_name == resource)
    return registration.connection


def whole_socket(node: Node) -> Path:
    return node.plugins / "sgpu-example.com_whole-gpu.sock"


class TestSideBySide:
    def test_one_shared_one_whole_one_left_out(self, node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
        """Two registrations with a socket each, which know each their own GPU and no other; both stop cleanly."""
        endpoints = {each.request.resource_name: each.request.endpoint for each in kubelet.registrations}
        assert endpoints == {RESOURCE: node.socket.name, WHOLE: whole_socket(node).name}
        assert node.socket.is_socket()
        assert whole_socket(node).is_socket()

        (shared,) = kubelet.allocate([f"{T4.uuid}::3"], resource=RESOURCE).container_responses
        (whole,) = kubelet.allocate([f"{A100.uuid}::0"], resource=WHOLE).container_responses
        assert shared.envs["SGPU_MEMORY_BYTES"] == str(T4.total // SHARES)
        assert whole.envs["SGPU_MEMORY_BYTES"] == str(A100.total)
        for resource, gpu in ((RESOURCE, A100), (RESOURCE, OTHER), (WHOLE, T4), (WHOLE, OTHER)):
            with pytest.raises(grpc.RpcError) as refusal:
                kubelet.allocate([f"{gpu.uuid}::0"], resource=resource)
            assert refusal.value.code() is grpc.StatusCode.NOT_FOUND

        daemon.terminate()
        assert not node.socket.exists()
        assert not whole_socket(node).exists()
        assert "ERROR" not in daemon.logs

    def test_a_fault_is_told_to_its_resource_alone(
        self, node: Node, kubelet: FakeKubelet, daemon: DaemonProcess
    ) -> None:
        """The other one hears nothing."""
        node.driver.xid(A100, 79)
        kubelet.wait_for(lambda: set(kubelet.devices(WHOLE).values()) == {"Unhealthy"})
        assert len(kubelet.lists[RESOURCE]) == 1
        assert len(kubelet.lists[WHOLE]) == 2

    def test_one_that_fails_does_not_stop_the_other(self, node: Node, config: Path, kubelet: FakeKubelet) -> None:
        """It is told with its path and tried again, for as long as it takes."""
        whole_socket(node).write_text("in the way")
        with started(node, config) as daemon:
            wait_shares(kubelet, shares(T4))
            daemon.wait_log(f"there is something that is not a socket: '{whole_socket(node)}'")
            kubelet.allocate([f"{T4.uuid}::0"], resource=RESOURCE)
            whole_socket(node).unlink()
            wait_one_of_each(kubelet)
            assert connection(kubelet).streaming

    def test_one_that_is_forgotten_is_registered_again(
        self, node: Node, kubelet: FakeKubelet, daemon: DaemonProcess
    ) -> None:
        """And the other one is left alone."""
        before = connection(kubelet)
        whole_socket(node).unlink()
        kubelet.wait_registrations(3)
        wait_one_of_each(kubelet)
        assert connection(kubelet) is before
        assert before.streaming

    def test_a_kubelet_that_restarts(self, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
        """It gets both back."""
        kubelet.restart()
        kubelet.wait_registrations(4)
        wait_one_of_each(kubelet)
        assert {each.request.resource_name for each in kubelet.registrations[2:]} == {RESOURCE, WHOLE}

    def test_a_gpu_that_comes_later(self, node: Node, config: Path, kubelet: FakeKubelet) -> None:
        """A resource is registered when there is a GPU for it; until then its rule is told to be about none."""
        node.driver.set(gpus=(T4,))
        with started(node, config) as daemon:
            wait_shares(kubelet, shares(T4))
            line = daemon.wait_log("is about no GPU of this node").text
            assert line.partition(" WARNING ")[2] == (
                f"`name: *a100*` ({config}:3) is about no GPU of this node; "
                f"`uuid: {OTHER.uuid}` ({config}:6) is about no GPU of this node"
            )
            assert [each.request.resource_name for each in kubelet.attempts] == [RESOURCE]
            node.driver.set(gpus=(T4, A100))
            wait_one_of_each(kubelet)
            daemon.wait_log(f" WARNING `uuid: {OTHER.uuid}` ({config}:6) is about no GPU of this node")
            assert connection(kubelet).streaming


class TestStart:
    @pytest.mark.parametrize(
        ("content", "line"),
        [
            pytest.param(
                f"gpus:\n- name: '*A100*'\n  shares: 1\n- pci-bus-id: {A100.bus_id}\n  exclude: true\n",
                f"GPU {A100.uuid} ({A100.name} at {A100.bus_id}) is claimed twice: "
                f"by `name: *A100*` ({{0}}:2) and by `pci-bus-id: {A100.bus_id}` ({{0}}:4)",
                id="two rules for a GPU",
            ),
            pytest.param(
                "gpus:\n- name: '*'\n  replicas: 1\n",
                "gpus: unknown key 'replicas' ({0}:2); "
                "an entry takes uuid, pci-bus-id, name, shares, resource, exclude",
                id="unknown key",
            ),
        ],
    )
    def test_rules_that_can_not_be_kept(self, node: Node, config: Path, content: str, line: str) -> None:
        """One line with the places, and exit code 2."""
        config.write_text(content)
        with started(node, config) as daemon:
            assert daemon.wait_exit() == 2
            assert [each.text for each in daemon.lines if each.text.startswith("sgpu: ")] == [
                f"sgpu: {line.format(config)}"
            ]
            assert "Traceback" not in daemon.logs
            assert daemon.lines[-1].text.startswith("sgpu: ")


class TestReload:
    @pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__.replace("_", " "))
    def test_another_number_of_shares(
        self, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path, write: Callable[[Path, str], None]
    ) -> None:
        """It is listed on the stream that there is, however the file was written; the other resource hears nothing."""
        for count in (6, 2):
            write(config, ONE_OF_EACH.replace(f": {SHARES}\n", f": {count}\n"))
            wait_shares(kubelet, shares(T4, count))
        assert connection(kubelet).streaming
        assert connection(kubelet, WHOLE).streaming
        assert len(kubelet.lists[RESOURCE]) == 3
        assert len(kubelet.lists[WHOLE]) == 1

    def test_a_hang_up(self, node: Node, kubelet: FakeKubelet, config: Path) -> None:
        """SIGHUP has a file read that is changed where nobody looks."""
        target = node.host.parent / "elsewhere.yaml"
        target.write_text(ONE_OF_EACH)
        config.unlink()
        config.symlink_to(target)
        with started(node, config) as daemon:
            wait_one_of_each(kubelet)
            rewrite(target, ALL_SHARED)
            daemon.signal(signal.SIGHUP)
            wait_shares(kubelet, shares(T4) | shares(A100) | shares(OTHER))
            assert connection(kubelet).streaming

    def test_a_resource_that_goes(self, node: Node, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path) -> None:
        """It first lists nothing, and is left when the kubelet knows; its GPU is shared from the beginning on."""
        leaving = connection(kubelet, WHOLE)
        config.write_text(ALL_SHARED)
        wait_shares(kubelet, shares(T4) | shares(A100) | shares(OTHER))
        kubelet.wait_for(lambda: len(kubelet.lists[WHOLE]) == 2)
        assert leaving.streaming
        assert not kubelet.lists[WHOLE][-1].response.devices
        kubelet.wait_for(lambda: leaving.ended)
        assert len(kubelet.lists[WHOLE]) == 2
        assert connection(kubelet).streaming
        wait_until(lambda: not whole_socket(node).exists(), "its socket removed")
        daemon.terminate()
        assert "ERROR" not in daemon.logs

    def test_a_resource_that_comes(self, kubelet: FakeKubelet, node: Node, config: Path) -> None:
        """It is registered beside the others."""
        config.write_text(ALL_SHARED)
        with started(node, config):
            wait_shares(kubelet, shares(T4) | shares(A100) | shares(OTHER))
            config.write_text(ONE_OF_EACH)
            wait_one_of_each(kubelet)
            assert connection(kubelet).streaming

    @pytest.mark.parametrize("gone", [False, True], ids=["at once", "after it was left"])
    def test_a_resource_that_goes_and_comes_back(
        self, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path, gone: bool
    ) -> None:
        """Whether or not its registration was still there. If it was, it goes on."""
        leaving = connection(kubelet, WHOLE)
        config.write_text(ALL_SHARED)
        kubelet.wait_for(lambda: len(kubelet.lists[WHOLE]) == 2)
        if gone:
            kubelet.wait_for(lambda: leaving.ended)
        config.write_text(ONE_OF_EACH)
        wait_one_of_each(kubelet)
        if not gone:
            time.sleep(FAREWELL + 0.2)  # by then it would have been left
            assert leaving.streaming
            assert len(kubelet.registrations) == 2
        assert connection(kubelet).streaming
        daemon.terminate()

    def test_another_name_for_all_others(self, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path) -> None:
        """`resource-name` takes effect at once, too."""
        config.write_text(f"resource-name: example.com/new\n{ONE_OF_EACH}")
        wait_shares(kubelet, shares(T4), "example.com/new")
        kubelet.wait_for(lambda: not kubelet.lists[RESOURCE][-1].response.devices)
        assert connection(kubelet, WHOLE).streaming

    def test_a_file_that_can_not_be_used(self, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path) -> None:
        """The old settings stay, and one line says why and where; once it is mended, it takes effect."""
        config.write_text("gpu-duplication-factor: 2\ngpus:\n- uuid: x\n")
        line = daemon.wait_log("the settings stay as they were").text
        assert line.partition(" ERROR ")[2] == (
            f"the settings stay as they were: gpus: uuid: 'x' ({config}:3) is not a GPU's UUID, as `nvidia-smi -L` "
            "shows it"
        )
        claimed = f"gpus:\n- {{uuid: {T4.uuid}, shares: 1}}\n- {{name: '*', shares: 2}}\n"
        config.write_text(claimed)
        line = daemon.wait_log(f"the settings stay as they were: GPU {T4.uuid} ").text
        assert line.endswith(f"is claimed twice: by `uuid: {T4.uuid}` ({config}:2) and by `name: *` ({config}:3)")
        kubelet.allocate([f"{T4.uuid}::3"], resource=RESOURCE)
        assert len(kubelet.lists[RESOURCE]) == 1
        config.write_text("gpu-duplication-factor: 2\n")
        wait_shares(kubelet, shares(T4, 2) | shares(A100, 2) | shares(OTHER, 2))
        assert daemon.logs.count("ERROR") == 2

    def test_what_takes_a_restart(self, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path) -> None:
        """It is named in a warning; the rest of the file takes effect."""
        config.write_text("gpu-duplication-factor: 2\nplacement: pack\nlog-format: json\n")
        wait_shares(kubelet, shares(T4, 2) | shares(A100, 2) | shares(OTHER, 2))
        daemon.wait_log("WARNING takes effect at the next start: -placement, -log-format")


class TestInUse:
    def test_fewer_shares(self, node: Node, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path) -> None:
        """Those that containers have stay known until they are free; nobody is offered them first meanwhile."""
        with FakePodResources(node.pods) as pods:
            pods.assign("default", "trainer", "main", [f"{T4.uuid}::1", f"{T4.uuid}::3"])
            pods.wait_heeded()
            config.write_text(ONE_OF_EACH.replace(f": {SHARES}\n", ": 2\n"))
            wait_shares(kubelet, shares(T4, 2) | {f"{T4.uuid}::3"})
            kubelet.allocate([f"{T4.uuid}::3"], resource=RESOURCE)
            available = [f"{T4.uuid}::3", f"{T4.uuid}::0"]
            assert kubelet.preferred(available, resource=RESOURCE) == [f"{T4.uuid}::0"]
            pods.release("trainer")
            wait_shares(kubelet, shares(T4, 2))
        assert connection(kubelet).streaming

    def test_after_a_restart(self, node: Node, config: Path, kubelet: FakeKubelet) -> None:
        """A daemon that starts with fewer shares learns which are in use."""
        config.write_text(ONE_OF_EACH.replace(f": {SHARES}\n", ": 2\n"))
        with FakePodResources(node.pods) as pods:
            pods.assign("default", "trainer", "main", [f"{T4.uuid}::3"])
            with started(node, config):
                wait_shares(kubelet, shares(T4, 2) | {f"{T4.uuid}::3"})

    def test_a_shared_gpu_becomes_a_whole_one(
        self, node: Node, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path
    ) -> None:
        """It is offered once, however many of its shares are in use, also after a restart."""
        with FakePodResources(node.pods) as pods:
            pods.assign("default", "trainer", "main", [f"{T4.uuid}::1", f"{T4.uuid}::3"])
            pods.wait_heeded()
            config.write_text(f"gpus:\n- {{name: '*', shares: 1, resource: {WHOLE}}}\n")
            whole = shares(T4, 1) | shares(A100, 1) | shares(OTHER, 1)
            wait_shares(kubelet, whole, WHOLE)
            pods.wait_heeded()
            pods.wait_heeded()
            assert kubelet.devices(WHOLE).keys() == whole
            daemon.terminate()
            with started(node, config):
                wait_shares(kubelet, whole, WHOLE)
                pods.wait_heeded()
                pods.wait_heeded()
                assert kubelet.devices(WHOLE).keys() == whole
