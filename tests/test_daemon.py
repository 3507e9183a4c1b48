"""The real daemon as a process, a stub driver below it and a kubelet on grpcio above it."""

from __future__ import annotations

import os
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

from sgpu.nvml import Code

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


class TestListing:
    def test_every_gpu_is_listed_as_many_healthy_shares(self, node: Node) -> None:
        """Ids are `<UUID>::<n>` with n from 0; all healthy."""
        gpus = node.driver.gpus(3)
        with FakeKubelet(node.plugins) as kubelet, node.daemon():
            devices = kubelet.wait_devices(300)
        assert devices == {f"{gpu.uuid}::{n}": "Healthy" for gpu in gpus for n in range(100)}

    def test_the_registration_names_resource_endpoint_and_options(self, node: Node) -> None:
        """The same options are said in the request and when asked."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-resource-name", "example.com/gpu"):
            registration = kubelet.wait_registrations(1)
        request = registration.request
        assert (request.version, request.resource_name) == ("v1beta1", "example.com/gpu")
        assert request.endpoint == "sgpu-example.com_gpu.sock"
        assert request.options == registration.options
        assert registration.options.get_preferred_allocation_available
        assert not registration.options.pre_start_required

    def test_topology_is_given_where_the_kernel_knows_the_numa_node(self, node: Node) -> None:
        """Node 0 counts as known; -1 and no entry are left out."""
        gpus = node.driver.gpus(4)
        for gpu, numa_node in zip(gpus, (0, 1, -1), strict=False):
            node.set_numa_node(gpu.bus_id, numa_node)
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-gpu-duplication-factor", 1):
            kubelet.wait_devices(4)
            listed = kubelet.lists[RESOURCE][-1].response.devices
        topologies = [device.topology if device.HasField("topology") else None for device in listed]
        assert [topology and [numa.ID for numa in topology.nodes] for topology in topologies] == [[0], [1], None, None]

    def test_a_gpu_that_does_not_answer_is_left_out_with_a_warning(self, node: Node) -> None:
        """The others are offered all the same."""
        lost, good = node.driver.gpus(2)
        node.driver.change(lost, lost=True)
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as daemon:
            devices = kubelet.wait_devices(10)
            daemon.wait_log("GPU 0 is left out: nvmlDeviceGetHandleByIndex_v2: GPU is lost")
        assert {share.split("::")[0] for share in devices} == {good.uuid}

    def test_60000_shares_are_listed(self, node: Node) -> None:
        """Close to the kubelet's limit of 4 MiB a message."""
        node.driver.gpus(2)
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-gpu-duplication-factor", 30_000):
            assert len(kubelet.wait_devices(60_000, timeout=30)) == 60_000

    def test_more_shares_than_a_message_holds_are_refused_with_the_most_that_fit(self, node: Node) -> None:
        """Exit code 2 and one line; the factor it names is accepted."""
        node.driver.gpus(2)
        with node.daemon("-gpu-duplication-factor", 40_000) as daemon:
            assert daemon.wait_exit() == 2
            line = daemon.lines[-1].text
        assert line.startswith("sgpu: 80000 shares on 2 GPU(s) do not fit")
        fits = int(line.split(" at most ")[1].split()[0])
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-gpu-duplication-factor", fits):
            kubelet.wait_devices(2 * fits, timeout=30)

    def test_an_idle_daemon_sends_nothing(self, node: Node) -> None:
        """One list, and no more without a change."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            kubelet.wait_devices(10)
            time.sleep(1)
            assert len(kubelet.lists[RESOURCE]) == 1


class TestAllocate:
    def test_a_container_gets_nodes_libraries_and_environment(self, node: Node) -> None:
        """The node is the minor number's, not the index's; nodes come once however many shares."""
        gpus = tuple(attrs.evolve(StubGpu(number), minor=7 - number) for number in range(3))
        node.driver.set(gpus=gpus)
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
            "SGPU_MEMORY_BYTES": str(2 * 15 * GIB // 100 + 15 * GIB // 100),
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }

    def test_each_container_of_a_request_is_answered(self, node: Node) -> None:
        """In the order asked."""
        first, second = node.driver.gpus(2)
        with FakeKubelet(node.plugins) as kubelet, node.daemon():
            kubelet.wait_devices(200)
            answers = kubelet.allocate([f"{second.uuid}::0"], [f"{first.uuid}::0"]).container_responses
        assert [answer.envs["SGPU_GPU_UUIDS"] for answer in answers] == [second.uuid, first.uuid]

    def test_optional_nodes_that_are_absent_are_left_out(self, node: Node) -> None:
        """No path that the container runtime would trip over."""
        (node.dev / "nvidia-uvm-tools").unlink()
        (gpu,) = node.driver.gpus(1)
        with FakeKubelet(node.plugins) as kubelet, node.daemon():
            kubelet.wait_devices(100)
            (answer,) = kubelet.allocate([f"{gpu.uuid}::0"]).container_responses
        assert [d.container_path for d in answer.devices] == ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]

    @pytest.mark.parametrize(
        "share",
        ["{uuid}::100", "{uuid}::-1", "{uuid}::01", "{uuid}", "GPU-0::0", ""],
        ids=["number", "sign", "zero", "no number", "gpu", "empty"],
    )
    def test_an_unknown_share_is_refused_by_name_and_the_server_goes_on(self, node: Node, share: str) -> None:
        """NOT_FOUND with the id in the message, which ends up in the pod's events."""
        (gpu,) = node.driver.gpus(1)
        unknown = share.format(uuid=gpu.uuid)
        with FakeKubelet(node.plugins) as kubelet, node.daemon():
            kubelet.wait_devices(100)
            with pytest.raises(grpc.RpcError) as refusal:
                kubelet.allocate([f"{gpu.uuid}::1", unknown])
            kubelet.allocate([f"{gpu.uuid}::1"])
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        assert refusal.value.details() == f"share {unknown} is not one of this node's"

    def test_an_unhealthy_share_is_refused_with_the_reason(self, node: Node) -> None:
        """FAILED_PRECONDITION naming share, GPU and reason."""
        faults = node.host / "faults"
        faults.write_text("1 made up for this test\n")
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR, "-simulate-faults", str(faults), simulate=2):
            kubelet.wait_for(lambda: health(kubelet) == {"Healthy": 10, "Unhealthy": 10})
            down = next(share for share, word in kubelet.devices(RESOURCE).items() if word == "Unhealthy")
            with pytest.raises(grpc.RpcError) as refusal:
                kubelet.allocate([down])
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        uuid = down.split("::")[0]
        assert refusal.value.details() == f"share {down}: GPU {uuid} is unhealthy (made up for this test)"

    def test_preferred_allocation_spreads(self, node: Node) -> None:
        """Over as many GPUs as there are, must-haves kept; PreStartContainer is there and does nothing."""
        a, b, c = node.driver.gpus(3)
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            kubelet.wait_devices(30)
            available = [f"{gpu.uuid}::{n}" for gpu, free in ((a, 3), (b, 5), (c, 4)) for n in range(free)]
            chosen = kubelet.preferred(available, [f"{a.uuid}::2"], 4)
            kubelet.pre_start(chosen)
        assert chosen[0] == f"{a.uuid}::2"
        assert Counter(share.split("::")[0] for share in chosen) == {a.uuid: 1, b.uuid: 2, c.uuid: 1}


def no_library(node: Node) -> None:
    shutil.rmtree(node.host / "lib64")


def install_library(node: Node) -> None:
    StubDriver(node.host).gpus(1)


WAITS: dict[str, tuple[Callable[[Node], object], str, Callable[[Node], object]]] = {
    "library": (no_library, "no libnvidia-ml could be loaded from under", install_library),
    "driver": (
        lambda node: node.driver.fail("nvmlInit", Code.DRIVER_NOT_LOADED),
        "nvmlInit_v2: Driver Not Loaded",
        lambda node: node.driver.works("nvmlInit"),
    ),
    "nvidiactl": (
        lambda node: (node.dev / "nvidiactl").unlink(),
        "nvidiactl not there yet",
        lambda node: node.make_nodes("nvidiactl"),
    ),
    "nvidia-uvm": (
        lambda node: (node.dev / "nvidia-uvm").unlink(),
        "nvidia-modprobe -u",
        lambda node: node.make_nodes("nvidia-uvm"),
    ),
    "device node": (
        lambda node: (node.dev / "nvidia0").unlink(),
        "nvidia0 is not there",
        lambda node: node.make_nodes("nvidia0"),
    ),
    "gpu": (lambda node: node.driver.gpus(0), "no GPU to offer", lambda node: node.driver.gpus(1)),
}


class TestWaiting:
    @pytest.mark.parametrize(("remove", "reason", "restore"), WAITS.values(), ids=WAITS)
    def test_it_waits_for_what_is_missing_and_registers_when_it_comes(
        self, node: Node, remove: Callable[[Node], object], reason: str, restore: Callable[[Node], object]
    ) -> None:
        """Without being restarted, and with one log line however often it tries."""
        remove(node)
        with FakeKubelet(node.plugins) as kubelet, node.daemon() as daemon:
            daemon.wait_log(reason)
            time.sleep(0.5)  # several attempts
            assert daemon.logs.count("waiting for a GPU") == 1
            assert not kubelet.attempts
            restore(node)
            kubelet.wait_devices(100)

    def test_each_change_of_reason_is_logged_once(self, node: Node) -> None:
        """First no driver, then no GPU, then another driver's library."""
        node.driver.gpus(0)
        node.driver.fail("nvmlInit", Code.DRIVER_NOT_LOADED)
        with node.daemon() as daemon:
            daemon.wait_log("Driver Not Loaded")
            node.driver.works("nvmlInit")
            daemon.wait_log("no GPU to offer")
            node.driver.fail("nvmlInit", Code.LIB_RM_VERSION_MISMATCH)
            daemon.wait_log("version mismatch")
            assert daemon.logs.count("waiting for a GPU") == 3

    def test_it_waits_for_the_kubelet(self, node: Node) -> None:
        """Started before it: one log line, and registered as soon as it is there."""
        kubelet = FakeKubelet(node.plugins)
        with node.daemon() as daemon:
            daemon.wait_log("the kubelet does not answer")
            time.sleep(0.5)
            assert daemon.logs.count("not registered") == 1
            with kubelet:
                started = time.monotonic()
                kubelet.wait_devices(100)
                assert time.monotonic() - started < 2  # not the 5 s that attempts may be apart

    def test_it_waits_for_the_plugin_directory(self, node: Node) -> None:
        """A kubelet that was never started has made none yet."""
        node.plugins.rmdir()
        with node.daemon() as daemon:
            daemon.wait_log(f"waiting for {node.plugins}")
            node.plugins.mkdir()
            with FakeKubelet(node.plugins) as kubelet:
                kubelet.wait_devices(100)

    def test_a_kubelet_that_refuses_is_tried_again(self, node: Node) -> None:
        """What it said is logged once."""
        with FakeKubelet(node.plugins) as kubelet:
            kubelet.refuse(grpc.StatusCode.UNKNOWN, "not today")
            with node.daemon() as daemon:
                daemon.wait_log("the kubelet refused deepomatic.com/shared-gpu: UNKNOWN: not today")
                kubelet.wait_attempts(5)
                assert daemon.logs.count("not registered") == 1
                kubelet.accept()
                kubelet.wait_devices(100)

    def test_a_kubelet_that_answers_late_is_waited_for(self, node: Node) -> None:
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
            daemon.wait_log(f"({version})")
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
            time.sleep(0.3)
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
        """An event for the inode that we registered with means nothing."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR):
            kubelet.wait_devices(10)
            aside = node.plugins / "aside"
            kubelet.socket.rename(aside)
            time.sleep(0.2)
            aside.rename(kubelet.socket)
            time.sleep(0.5)
            assert len(kubelet.registrations) == 1
            assert len(kubelet.devices(RESOURCE)) == 10

    def test_our_socket_deleted_is_made_again(self, node: Node) -> None:
        """And the kubelet, the same as before, is told once its old stream has drained."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as daemon:
            for round_ in range(1, 6):
                kubelet.wait_devices(10)
                node.socket.unlink()
                daemon.wait_log(f"{node.socket} was removed")
                kubelet.wait_registrations(round_ + 1)
            kubelet.wait_devices(10)
            time.sleep(0.3)  # time for a stream's end to take the new registration with it
            assert len(kubelet.devices(RESOURCE)) == 10
            assert len(kubelet.registrations) == 6

    def test_a_lost_stream_leads_to_a_new_registration(self, node: Node) -> None:
        """A kubelet that dropped its stream and did not restart would count us as gone for ever."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as daemon:
            kubelet.wait_devices(10)
            kubelet.drop_stream()
            kubelet.wait_for(lambda: not kubelet.devices(RESOURCE))
            kubelet.wait_registrations(2, timeout=15)
            kubelet.wait_devices(10)
            assert "no ListAndWatch stream open for 10 s" in daemon.logs

    def test_the_plugin_directory_made_anew(self, node: Node) -> None:
        """As when a node's state is wiped under running pods."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as daemon:
            kubelet.wait_devices(10)
            kubelet.stop()
            shutil.rmtree(node.plugins)
            daemon.wait_log(f"waiting for {node.plugins}")
            node.plugins.mkdir()
            kubelet.start()
            kubelet.wait_devices(10)


class TestFaults:
    def test_a_simulated_fault_takes_all_shares_of_that_gpu_and_of_no_other(self, node: Node) -> None:
        """Down and back, one list each."""
        faults = node.host / "faults"
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR, "-simulate-faults", str(faults), simulate=3):
            devices = kubelet.wait_devices(30)
            uuids = list(dict.fromkeys(share.split("::")[0] for share in devices))
            faults.write_text("1\n")
            kubelet.wait_for(lambda: health(kubelet)["Unhealthy"])
            down = {share.split("::")[0] for share, word in kubelet.devices(RESOURCE).items() if word == "Unhealthy"}
            assert down == {uuids[1]}
            assert health(kubelet) == {"Healthy": 20, "Unhealthy": 10}
            faults.unlink()
            kubelet.wait_for(lambda: health(kubelet) == {"Healthy": 30})
            assert len(kubelet.lists[RESOURCE]) == 3

    def test_simulated_gpus_give_only_environment(self, node: Node) -> None:
        """So that pods start on nodes without a GPU; the log says plainly that it simulates."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR, simulate=1) as daemon:
            (share, *_) = kubelet.wait_devices(10)
            (answer,) = kubelet.allocate([share]).container_responses
            daemon.wait_log("SIMULATED")
        assert not answer.devices
        assert not answer.mounts
        assert dict(answer.envs) == {
            "SGPU_SHARES": "1",
            "SGPU_GPU_UUIDS": share.split("::")[0],
            "NVIDIA_VISIBLE_DEVICES": "void",
            "SGPU_SIMULATED": "1",
            "SGPU_MEMORY_BYTES": str(16 * GIB // 10),
        }


def registered(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    kubelet.start()
    kubelet.wait_devices(10)


def registering(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    kubelet.register_delay = 30
    kubelet.start()
    kubelet.wait_attempts(1)


def waiting_for_the_kubelet(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    daemon.wait_log("the kubelet does not answer")


def waiting_for_the_driver(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    daemon.wait_log("waiting for a GPU")


def in_a_call_that_never_returns(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    deadline = time.monotonic() + 10
    while not node.driver.calls("nvmlDeviceGetCount") and time.monotonic() < deadline:
        time.sleep(0.01)


def draining(node: Node, kubelet: FakeKubelet, daemon: DaemonProcess) -> None:
    registered(node, kubelet, daemon)
    os.kill(daemon.pid, signal.SIGSTOP)  # so that the signal is there when the drain begins
    node.socket.unlink()
    daemon.signal(signal.SIGTERM)
    os.kill(daemon.pid, signal.SIGCONT)


PHASES = (
    registered,
    registering,
    waiting_for_the_kubelet,
    waiting_for_the_driver,
    in_a_call_that_never_returns,
    draining,
)


class TestStopping:
    @pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__.replace("_", " "))
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
    def test_a_signal_in_any_phase_ends_it_within_a_second(
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
                told = time.monotonic()
                daemon.signal(number)
                assert daemon.wait_exit() == 0
                assert time.monotonic() - told < 1
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
            assert said.startswith(f"sgpu: process {first.pid} (")
            assert said.endswith(f"already listens on {node.socket}")
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


class TestRobustness:
    def test_connections_that_break_leave_nothing_behind(self, node: Node) -> None:
        """No descriptor, no thread, and the registration stays."""
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
            deadline = time.monotonic() + 5
            while daemon.fd_count() > before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert daemon.fd_count() == before
            assert len(kubelet.registrations) == 1

    def test_memory_not_supported_does_not_leave_a_gpu_out(self, node: Node) -> None:
        """GPUs that share the machine's memory have none of their own to report."""
        node.driver.fail("nvmlDeviceGetMemoryInfo", Code.NOT_SUPPORTED)
        node.driver.fail("nvmlDeviceGetMemoryInfo_v2", Code.NOT_SUPPORTED)
        with FakeKubelet(node.plugins) as kubelet, node.daemon():
            kubelet.wait_devices(100)

    def test_an_old_driver_is_enough(self, node: Node) -> None:
        """One that has only the first variant of each function."""
        old = ("nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetMemoryInfo_v2")
        StubDriver(node.host, without=(*old, "nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetPciInfo_v2")).set(
            gpus=(attrs.evolve(StubGpu(), total=11 * GIB),)
        )
        with FakeKubelet(node.plugins) as kubelet, node.daemon():
            kubelet.wait_devices(100)


class TestLocks:
    def test_locks_of_others_are_in_nobodys_way(self, node: Node) -> None:
        """Any user may lock a directory that it can list: it registers, answers and stops all the same."""
        node.state.parent.mkdir(mode=0o755)
        status = node.state.parent / "status.sock"
        with ExitStack() as stack:
            for directory in (node.plugins, node.state.parent):
                node.plugins.parent.chmod(0o755)
                other = stack.enter_context(
                    subprocess.Popen([sys.executable, "-c", LOCKER, str(directory)], stdout=subprocess.PIPE)
                )
                stack.callback(other.kill)
                assert other.stdout is not None
                assert other.stdout.readline() == b"locked\n"
            kubelet = stack.enter_context(FakeKubelet(node.plugins))
            daemon = stack.enter_context(node.daemon("-status-socket", str(status)))
            kubelet.wait_devices(100)
            daemon.wait_log(f"status is told on {status}")
            daemon.terminate()
