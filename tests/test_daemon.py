"""The real daemon as a process, a stub driver below it and a kubelet on grpcio above it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import attrs
import grpc
import pytest
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from node import RESOURCE, Node
from stub_driver import GIB, StubDriver, StubGpu
from watching import wait_until

from sgpu.deviceplugin.session import STREAM_GRACE
from sgpu.driver.nvml import Code

pytestmark = pytest.mark.process

#: Takes both kinds of lock on a directory, as a user who owns nothing.
LOCKER = """
import fcntl, os, sys, time
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""
FACTOR = ("-gpu-duplication-factor", "10")


def health(kubelet: FakeKubelet) -> Counter[str]:
    return Counter(kubelet.devices(RESOURCE).values())


def count(daemon: DaemonProcess, fact: str) -> int:
    """In how many lines of the log it is."""
    return sum(fact in line.text for line in daemon.lines)


@pytest.mark.smoke
class TestServing:
    def test_the_gpus_are_registered_and_listed(self, node: Node) -> None:
        """Each GPU is that many healthy shares, on the NUMA node that the kernel knows."""
        gpus = node.driver.gpus(3)
        for gpu, numa_node in zip(gpus, (0, -1), strict=False):
            node.set_numa_node(gpu.bus_id, numa_node)
        resource = "example.com/gpu"
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-resource-name", resource):
            devices = kubelet.wait_devices(300)
            (registration,) = kubelet.registrations
            listed = kubelet.lists[resource][-1].response.devices
        assert devices == {f"{gpu.uuid}::{n}": "Healthy" for gpu in gpus for n in range(100)}
        topologies = [[numa.ID for numa in device.topology.nodes] for device in listed[::100]]
        assert topologies == [[0], [], []]
        request = registration.request
        assert (request.version, request.resource_name) == ("v1beta1", resource)
        assert request.endpoint == "sgpu-example.com_gpu.sock"
        assert request.options == registration.options
        assert registration.options.get_preferred_allocation_available
        assert not registration.options.pre_start_required

    def test_more_shares_than_a_message_holds(self, node: Node) -> None:
        """They are refused with exit code 2 and one line; the factor that it names is listed."""
        node.driver.gpus(2)
        with node.daemon("-gpu-duplication-factor", 40_000) as daemon:
            assert daemon.wait_exit() == 2
            line = daemon.lines[-1].text
        assert line.startswith("sgpu: ")
        assert "80000" in line
        fits = int(re.findall(r"\d+", line)[-1])
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-gpu-duplication-factor", fits):
            kubelet.wait_devices(2 * fits, timeout=60)

    def test_a_container_gets_nodes_libraries_and_environment(self, node: Node) -> None:
        """The node is the minor number's, not the index's."""
        gpus = tuple(attrs.evolve(StubGpu(number), minor=7 - number) for number in range(3))
        node.driver.set(gpus=gpus)
        parts = [(gpus[0].total - gpus[0].reserved) * count // 100 for count in (2, 1)]
        node.make_nodes("nvidia-modeset")
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-container-path", "/usr/lib/gpu"):
            kubelet.wait_devices(300)
            shares = [f"{gpus[0].uuid}::4", f"{gpus[0].uuid}::99", f"{gpus[2].uuid}::0"]
            (answer,) = kubelet.allocate(shares).container_responses
        assert [(d.host_path, d.container_path, d.permissions) for d in answer.devices] == [
            (f"{node.dev}/{name}", f"/dev/{name}", "mrw")
            for name in ("nvidia7", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia5")
        ]
        assert [(m.host_path, m.container_path, m.read_only) for m in answer.mounts] == [
            (str(node.host), "/usr/lib/gpu", True)
        ]
        assert dict(answer.envs) == {
            "SGPU_SHARES": "3",
            "SGPU_GPU_UUIDS": f"{gpus[0].uuid},{gpus[2].uuid}",
            "NVIDIA_VISIBLE_DEVICES": "void",
            "SGPU_MEMORY_BYTES": str(sum(parts)),
            "SGPU_MEMORY_BYTES_0": str(parts[0]),
            "SGPU_MEMORY_BYTES_1": str(parts[1]),
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }

    def test_the_other_calls(self, node: Node) -> None:
        """Preferred shares are spread, must-haves kept; PreStartContainer does nothing; an unknown share is refused."""
        a, b, c = node.driver.gpus(3)
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            kubelet.wait_devices(30)
            available = [f"{gpu.uuid}::{n}" for gpu, free in ((a, 3), (b, 5), (c, 4)) for n in range(free)]
            chosen = kubelet.preferred(available, [f"{a.uuid}::2"], 4)
            kubelet.pre_start(chosen)
            unknown = f"{a.uuid}::10"
            with pytest.raises(grpc.RpcError) as refusal:
                kubelet.allocate([*chosen, unknown])
            kubelet.allocate(chosen)
        assert chosen[0] == f"{a.uuid}::2"
        assert Counter(share.split("::")[0] for share in chosen) == {a.uuid: 1, b.uuid: 2, c.uuid: 1}
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        assert unknown in str(refusal.value.details())

    def test_simulated_gpus(self, node: Node) -> None:
        """They give a pod its environment alone; a fault takes all shares of its GPU and no other, until it is over."""
        faults = node.host / "faults"
        with (
            FakeKubelet(node.plugins) as kubelet,
            node.daemon(*FACTOR, "-simulate-faults", str(faults), simulate=3) as daemon,
        ):
            devices = kubelet.wait_devices(30)
            daemon.wait_log("SIMULATED")
            uuids = list(dict.fromkeys(share.split("::")[0] for share in devices))
            (answer,) = kubelet.allocate([f"{uuids[0]}::3"]).container_responses
            faults.write_text("1\n")
            kubelet.wait_for(lambda: health(kubelet)["Unhealthy"])
            down = {share.split("::")[0] for share, word in kubelet.devices(RESOURCE).items() if word == "Unhealthy"}
            assert down == {uuids[1]}
            assert health(kubelet) == {"Healthy": 20, "Unhealthy": 10}
            faults.unlink()
            kubelet.wait_for(lambda: health(kubelet) == {"Healthy": 30})
            assert len(kubelet.lists[RESOURCE]) == 3
        assert not answer.devices
        assert not answer.mounts
        assert dict(answer.envs) == {
            "SGPU_SHARES": "1",
            "SGPU_GPU_UUIDS": uuids[0],
            "NVIDIA_VISIBLE_DEVICES": "void",
            "SGPU_SIMULATED": "1",
            "SGPU_MEMORY_BYTES": str(16 * GIB // 10),
        }


class TestWaiting:
    def test_for_the_driver(self, node: Node) -> None:
        """It is not restarted, each reason is logged once, and the GPU is registered when it comes."""
        shutil.rmtree(node.host / "lib64")
        with FakeKubelet(node.plugins) as kubelet, node.daemon() as daemon:
            daemon.wait_log("libnvidia-ml")
            driver = StubDriver(node.host, gpus=[StubGpu()], calls={"nvmlInit": Code.DRIVER_NOT_LOADED})
            daemon.wait_log("Driver Not Loaded")
            tries = driver.calls("nvmlInit")
            wait_until(lambda: driver.calls("nvmlInit") >= tries + 3, "more attempts")
            assert count(daemon, "Driver Not Loaded") == 1
            assert not kubelet.attempts
            driver.works("nvmlInit")
            kubelet.wait_devices(100)

    def test_for_the_kubelet(self, node: Node) -> None:
        """That is logged once. It is registered with as soon as it is there."""
        kubelet = FakeKubelet(node.plugins)
        with node.daemon() as daemon:
            daemon.wait_log(str(kubelet.socket))
            time.sleep(4.2)  # attempts grow rarer: the next one of its own accord is 4 s away
            assert count(daemon, str(kubelet.socket)) == 1
            started = time.monotonic()
            with kubelet:
                kubelet.wait_devices(100)
                assert time.monotonic() - started < 3

    def test_for_the_plugin_directory(self, node: Node) -> None:
        """A kubelet that was never started has made none yet."""
        node.plugins.rmdir()
        with node.daemon() as daemon:
            daemon.wait_log(str(node.plugins))
            node.plugins.mkdir()
            with FakeKubelet(node.plugins) as kubelet:
                kubelet.wait_devices(100)

    def test_for_a_kubelet_that_refuses(self, node: Node) -> None:
        """It is asked again, and what it said is logged once."""
        with FakeKubelet(node.plugins) as kubelet:
            kubelet.refuse(grpc.StatusCode.UNKNOWN, "not today")
            with node.daemon() as daemon:
                daemon.wait_log("UNKNOWN: not today")
                kubelet.wait_attempts(5)
                assert count(daemon, "not today") == 1
                kubelet.accept()
                kubelet.wait_devices(100)

    def test_for_a_kubelet_that_answers_late(self, node: Node) -> None:
        """It is registered with once."""
        with FakeKubelet(node.plugins) as kubelet:
            kubelet.register_delay = 1
            with node.daemon():
                kubelet.wait_devices(100)
                assert len(kubelet.attempts) == 1


class TestRegistration:
    @pytest.mark.parametrize("version", ["v1alpha2", "v1alpha1"], ids=["1.9", "1.8"])
    def test_kubelets_of_the_alpha_api_are_served(self, node: Node, version: str) -> None:
        """Registered with, listed to, and allocated from, in their dialect."""
        (gpu,) = node.driver.gpus(1)
        with FakeKubelet(node.plugins, api="v1alpha", versions=[version]) as kubelet, node.daemon() as daemon:
            devices = kubelet.wait_devices(100)
            answer = kubelet.allocate_v1alpha([f"{gpu.uuid}::7"])
            daemon.wait_log(version)
        assert devices == {f"{gpu.uuid}::{n}": "Healthy" for n in range(100)}
        assert answer.devices[0].container_path == "/dev/nvidia0"
        assert answer.envs["SGPU_SHARES"] == "1"
        assert answer.mounts[0].host_path == str(node.host)

    @pytest.mark.parametrize("gap", [0.0, 0.5], ids=["within a millisecond", "after a while"])
    @pytest.mark.parametrize("unlink", [False, True], ids=["socket left", "socket removed"])
    def test_a_kubelet_that_restarts_is_registered_with_again(self, node: Node, gap: float, unlink: bool) -> None:
        """Once for each restart, and all devices are back."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            kubelet.wait_devices(10)
            for restart in range(3):
                kubelet.restart(gap, unlink=unlink)
                kubelet.wait_registrations(restart + 2)
                kubelet.wait_devices(10)
            assert len(kubelet.registrations) == 4

    def test_two_kubelets_in_quick_succession(self, node: Node) -> None:
        """The one that stays has the devices, whatever the first one got."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            kubelet.wait_devices(10)
            for _ in range(10):
                kubelet.restart()
                kubelet.restart()
                kubelet.wait_devices(10)

    def test_the_same_socket_again_is_no_restart(self, node: Node) -> None:
        """Nothing comes of an event for the inode that it registered with; our own socket, gone later, is the next."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as daemon:
            kubelet.wait_devices(10)
            aside = node.plugins / "aside"
            kubelet.socket.rename(aside)
            time.sleep(0.2)  # so that both are noticed
            aside.rename(kubelet.socket)
            time.sleep(0.2)
            node.socket.unlink()
            daemon.wait_log(str(node.socket))
            kubelet.wait_registrations(2)
            kubelet.wait_devices(10)
            assert len(kubelet.registrations) == 2

    def test_our_socket_deleted_is_made_again(self, node: Node) -> None:
        """And the same kubelet has all devices, also when the end of its old streams had its consequences."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            for number in range(2, 6):
                kubelet.wait_devices(10)
                node.socket.unlink()
                kubelet.wait_registrations(number)
                kubelet.wait_for(lambda: all(connection.ended for connection in kubelet.connections[:-1]))
                kubelet.wait_devices(10)
            assert len(kubelet.registrations) == 5

    def test_a_lost_stream_leads_to_a_new_registration(self, node: Node) -> None:
        """A kubelet that dropped its stream and did not restart would count us as gone for ever."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            kubelet.wait_devices(10)
            kubelet.drop_stream()
            kubelet.wait_for(lambda: not kubelet.devices(RESOURCE))
            kubelet.wait_registrations(2, timeout=3 * STREAM_GRACE)
            kubelet.wait_devices(10)

    def test_the_plugin_directory_made_anew(self, node: Node) -> None:
        """As when a node's state is wiped under running pods."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as daemon:
            kubelet.wait_devices(10)
            kubelet.stop()

            def removed() -> bool:  # the daemon may make its socket anew meanwhile
                shutil.rmtree(node.plugins, ignore_errors=True)
                return not node.plugins.exists()

            wait_until(removed, "removed")
            wait_until(
                lambda: count(daemon, str(node.plugins)) > count(daemon, f"{node.plugins}/"), "its absence noticed"
            )
            node.plugins.mkdir()
            kubelet.start()
            kubelet.wait_devices(10)


def registered(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    kubelet.start()
    kubelet.wait_devices(10)


def registering(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    kubelet.register_delay = 30
    kubelet.start()
    kubelet.wait_attempts(1)


def waiting_for_the_kubelet(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    daemon.wait_log(str(kubelet.socket))


def waiting_for_the_driver(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    daemon.wait_log("Driver Not Loaded")


def in_a_call_that_never_returns(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    wait_until(lambda: node.driver.calls("nvmlDeviceGetCount"), "the call")


def draining(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    registered(node, kubelet, daemon)
    os.kill(daemon.pid, signal.SIGSTOP)  # so that the signal is there when the drain begins
    node.socket.unlink()
    os.kill(daemon.pid, signal.SIGTERM)
    os.kill(daemon.pid, signal.SIGCONT)


TERM, INT = signal.SIGTERM, signal.SIGINT
PHASES = {
    "SIGTERM, registered": (registered, TERM),
    "SIGINT, registered": (registered, INT),
    "registering": (registering, TERM),
    "waiting for the kubelet": (waiting_for_the_kubelet, TERM),
    "waiting for the driver": (waiting_for_the_driver, TERM),
    "in a call that never returns": (in_a_call_that_never_returns, TERM),
    "SIGTERM, draining": (draining, TERM),
    "SIGINT, draining": (draining, INT),
}
#: Seconds, fewer than any wait that a signal cuts short.
AT_ONCE = 5


class TestStopping:
    @pytest.mark.parametrize(("phase", "number"), PHASES.values(), ids=PHASES)
    def test_a_signal_in_any_phase_ends_it_at_once(
        self, node: Node, phase: Callable[[Node, FakeKubelet, DaemonProcess], None], number: int
    ) -> None:
        """Exit code 0, and no socket left."""
        if phase is waiting_for_the_driver:
            node.driver.fail("nvmlInit", Code.DRIVER_NOT_LOADED)
        if phase is in_a_call_that_never_returns:
            node.driver.hang("nvmlDeviceGetCount")
        kubelet = FakeKubelet(node.plugins)
        try:
            with node.daemon(*FACTOR) as daemon:
                phase(node, kubelet, daemon)
                daemon.signal(number)
                assert daemon.wait_exit(AT_ONCE) == 0
                assert not node.socket.exists()
        finally:
            kubelet.close()

    @pytest.mark.parametrize("delay", [0.03, 0.06, 0.1, 0.2, 0.3], ids=lambda delay: f"{delay * 1000:.0f} ms")
    def test_a_signal_while_starting_ends_it(self, node: Node, delay: float) -> None:
        """From the first line of Python of ours on; before, the interpreter itself is killed by the signal."""
        with FakeKubelet(node.plugins), node.daemon(*FACTOR) as daemon:
            time.sleep(delay)
            daemon.signal(signal.SIGTERM)
            assert daemon.wait_exit() in (0, -signal.SIGTERM)
            assert not node.socket.exists()

    def test_a_second_instance_leaves_the_first_one_alone(self, node: Node) -> None:
        """It says who is there and exits with 1; the first one's socket and registration stay."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as first:
            kubelet.wait_devices(10)
            with node.daemon(*FACTOR) as second:
                assert second.wait_exit() == 1
                said = second.lines[-1].text
            assert said.startswith("sgpu: ")
            assert f" {first.pid} " in said
            assert f"{RESOURCE} with {node.plugins};" in said
            kubelet.allocate([next(iter(kubelet.devices(RESOURCE)))])
            assert len(kubelet.registrations) == 1

    def test_the_socket_of_a_killed_instance_is_taken_over(self, node: Node) -> None:
        """Nobody has to clean up."""
        with FakeKubelet(node.plugins) as kubelet:
            with node.daemon(*FACTOR):
                kubelet.wait_devices(10)
            assert node.socket.exists()
            with node.daemon(*FACTOR):
                kubelet.wait_registrations(2)
                kubelet.wait_devices(10)


class TestOthers:
    def test_connections_that_break_leave_nothing_behind(self, node: Node) -> None:
        """No descriptor, and the registration stays."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as daemon:
            kubelet.wait_devices(10)
            share = next(iter(kubelet.devices(RESOURCE)))
            kubelet.allocate([share])
            before = daemon.fd_count()
            for garbage in (b"", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256))) * 50:
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(str(node.socket))
                    peer.sendall(garbage)
            kubelet.allocate([share])
            wait_until(lambda: daemon.fd_count() <= before, "all closed")
            assert len(kubelet.registrations) == 1

    def test_locks_of_others_are_in_nobodys_way(self, node: Node) -> None:
        """Any user may lock a directory that it can list: it registers, answers and stops all the same."""
        node.state.parent.mkdir(mode=0o755)
        status = node.state.parent / "status.sock"
        with ExitStack() as stack:
            for directory in (node.plugins, node.state.parent):
                for each in (node.plugins.parent, directory):  # mkdir goes by the umask
                    each.chmod(0o755)
                other = stack.enter_context(
                    subprocess.Popen([sys.executable, "-c", LOCKER, str(directory)], stdout=subprocess.PIPE)
                )
                stack.callback(other.kill)
                assert other.stdout is not None
                assert other.stdout.readline() == b"locked\n"
            kubelet = stack.enter_context(FakeKubelet(node.plugins))
            daemon = stack.enter_context(node.daemon("-status-socket", str(status)))
            kubelet.wait_devices(100)
            daemon.wait_log(str(status))
            daemon.terminate()
