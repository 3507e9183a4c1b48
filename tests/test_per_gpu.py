"""Rules per GPU: the real daemon with a file of them, a stub driver below it and a kubelet above it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import attrs
import grpc
import pytest
from daemon_process import DaemonProcess
from fake_kubelet import Connection, FakeKubelet
from node import RESOURCE, Node
from stub_driver import GIB, StubGpu
from watching import wait_until

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
CLAIMED_TWICE = f"gpus:\n- {{uuid: {T4.uuid}, shares: 1}}\n- {{name: '*', shares: 2}}\n"


@pytest.fixture
def config(node: Node) -> Path:
    """Where the rules are, in a directory of their own; the node has three GPUs."""
    node.driver.set(gpus=(T4, A100, OTHER))
    file = node.host.parent / "etc" / "config.yaml"
    file.parent.mkdir()
    file.write_text(ONE_OF_EACH)
    return file


@pytest.fixture
def daemon(node: Node, config: Path, kubelet: FakeKubelet) -> Iterator[DaemonProcess]:
    """A daemon that offers one GPU shared and one whole."""
    with started(node, config) as running:
        wait_one_of_each(kubelet)
        yield running


def started(node: Node, config: Path) -> DaemonProcess:
    """A daemon with these rules, to be entered."""
    return node.daemon("-config", str(config))


def shares(gpu: StubGpu, count: int = SHARES) -> set[str]:
    return {f"{gpu.uuid}::{number}" for number in range(count)}


def wait_shares(kubelet: FakeKubelet, expected: set[str], resource: str = RESOURCE) -> None:
    """Wait until the kubelet has a list of exactly these."""
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


def test_one_shared_one_whole_one_left_out(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    """Two registrations with a socket each, which know each their own GPU and no other; both stop cleanly."""
    endpoints = {each.request.resource_name: each.request.endpoint for each in kubelet.registrations}
    assert endpoints == {RESOURCE: node.socket.name, WHOLE: whole_socket(node).name}

    (shared,) = kubelet.allocate([f"{T4.uuid}::3"], resource=RESOURCE).container_responses
    (whole,) = kubelet.allocate([f"{A100.uuid}::0"], resource=WHOLE).container_responses
    assert shared.envs["SGPU_MEMORY_BYTES"] == str((T4.total - T4.reserved) // SHARES)
    assert whole.envs["SGPU_MEMORY_BYTES"] == str(A100.total - A100.reserved)
    for resource, gpu in ((RESOURCE, A100), (RESOURCE, OTHER), (WHOLE, T4), (WHOLE, OTHER)):
        with pytest.raises(grpc.RpcError) as refusal:
            kubelet.allocate([f"{gpu.uuid}::0"], resource=resource)
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND

    node.driver.xid(A100, 79)
    kubelet.wait_for(lambda: set(kubelet.devices(WHOLE).values()) == {"Unhealthy"})
    assert [len(kubelet.lists[resource]) for resource in (RESOURCE, WHOLE)] == [1, 2]

    daemon.terminate()
    assert not node.socket.exists()
    assert not whole_socket(node).exists()
    assert "ERROR" not in daemon.logs


def test_reload(node: Node, kubelet: FakeKubelet, config: Path) -> None:
    """Other rules are listed on the streams that there are. SIGHUP does no harm at any time, and reads them anew."""
    target = node.host.parent / "elsewhere.yaml"
    with started(node, config) as daemon:
        daemon.wait_log(str(node.host))
        daemon.signal(signal.SIGHUP)  # before anybody listens for it
        wait_one_of_each(kubelet)

        config.write_text(CLAIMED_TWICE)
        assert T4.uuid in daemon.wait_log(f"{config}:3").text
        kubelet.allocate([f"{T4.uuid}::3"], resource=RESOURCE)  # the old ones stay

        config.write_text(ONE_OF_EACH.replace(f": {SHARES}\n", ": 6\n"))
        wait_shares(kubelet, shares(T4, 6))
        daemon.wait_log(f"6 x {RESOURCE}, 1 x {WHOLE}")

        target.write_text(ONE_OF_EACH.replace(f": {SHARES}\n", ": 5\n"))
        config.unlink()
        config.symlink_to(target)
        wait_shares(kubelet, shares(T4, 5))
        target.write_text(ONE_OF_EACH.replace(f": {SHARES}\n", ": 2\n"))  # where nobody looks
        daemon.signal(signal.SIGHUP)
        wait_shares(kubelet, shares(T4, 2))

        assert connection(kubelet).streaming
        assert connection(kubelet, WHOLE).streaming
        assert [len(kubelet.lists[resource]) for resource in (RESOURCE, WHOLE)] == [4, 1]


def test_a_resource_that_goes_and_comes(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess, config: Path) -> None:
    """It first lists nothing, and is left when the kubelet knows; its GPU is shared from the beginning on."""
    leaving = connection(kubelet, WHOLE)
    config.write_text(ALL_SHARED)
    wait_shares(kubelet, shares(T4) | shares(A100) | shares(OTHER))
    kubelet.wait_for(lambda: len(kubelet.lists[WHOLE]) == 2)
    assert leaving.streaming
    assert not kubelet.lists[WHOLE][-1].response.devices
    kubelet.wait_for(lambda: leaving.ended)
    wait_until(lambda: not whole_socket(node).exists(), "its socket removed")
    assert len(kubelet.lists[WHOLE]) == 2
    config.write_text(ONE_OF_EACH)
    wait_one_of_each(kubelet)
    assert connection(kubelet).streaming
    daemon.terminate()
    assert "ERROR" not in daemon.logs
