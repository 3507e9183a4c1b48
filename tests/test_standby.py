"""A daemon that stands by takes over from the one before, as the real process with a kubelet on grpcio."""

from __future__ import annotations

import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import pytest
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet, NotConnectedError
from node import RESOURCE, Node
from watching import wait_listening, wait_until

from sgpu.driver.nvml import Code
from sgpu.observe.client import fetch

pytestmark = pytest.mark.process

FACTOR = ("-gpu-duplication-factor", "10")
STANDBY = (*FACTOR, "-standby")
#: Seconds, fewer than any wait that a signal cuts short.
AT_ONCE = 5


@contextmanager
def allocations(kubelet: FakeKubelet) -> Iterator[list[object]]:
    """Allocate without a pause meanwhile, as admission does. Gives the errors; there are answers before and after."""
    errors: list[object] = []
    answered, done = threading.Semaphore(0), threading.Event()

    def allocate() -> None:
        while not done.is_set():
            devices = kubelet.devices(RESOURCE)
            try:
                kubelet.allocate(kubelet.preferred(sorted(devices), resource=RESOURCE), resource=RESOURCE)
                answered.release()
            except (grpc.RpcError, NotConnectedError, ValueError) as error:
                errors.append(error)
            time.sleep(0.001)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        assert answered.acquire(timeout=AT_ONCE)
        yield errors
        while answered.acquire(blocking=False):
            pass
        assert answered.acquire(timeout=AT_ONCE)
    finally:
        done.set()
        thread.join()


def in_turn(node: Node, kubelet: FakeKubelet, daemons: ExitStack, standbys: int = 1) -> list[DaemonProcess]:
    """The daemon that serves, and those that stand by."""
    started = [daemons.enter_context(node.daemon(*FACTOR))]
    kubelet.wait_devices(10)
    for _ in range(standbys):
        started.append(daemons.enter_context(node.daemon(*STANDBY)))
        standing_by(started[-1])
    return started


def standing_by(daemon: DaemonProcess) -> None:
    daemon.wait_log("standing by")
    daemon.wait_log(" at 0000")  # it has seen the GPU


@pytest.mark.parametrize("answers_first", [False, True], ids=["from 1.25 on", "up to 1.24"])
def test_a_rollout(node: Node, answers_first: bool) -> None:
    """No allocation fails, and the devices are always there, from one daemon to the next and the next."""
    with FakeKubelet(node.plugins, answers_first=answers_first) as kubelet, ExitStack() as daemons:
        (serving,) = in_turn(node, kubelet, daemons, standbys=0)
        with allocations(kubelet) as errors:
            for registrations in (2, 3):
                successor = daemons.enter_context(node.daemon(*STANDBY))
                standing_by(successor)
                serving.terminate()
                kubelet.wait_registrations(registrations)
                serving = successor
        assert errors == []
        assert kubelet.gaps == []


def test_a_daemon_that_is_killed(node: Node) -> None:
    """The standby takes over at once, whichever of the two the kubelet hears first."""
    with FakeKubelet(node.plugins) as kubelet, ExitStack() as daemons:
        first, second = in_turn(node, kubelet, daemons)
        first.kill()
        kubelet.wait_for(lambda: kubelet.gaps)
        kubelet.wait_for(lambda: kubelet.registrations[-1].connection.streaming)
        assert sum(kubelet.gaps) < AT_ONCE
        second.wait_log("taking over")
        kubelet.wait_devices(10)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "SIGTERM"])
def test_a_standby_that_ends(node: Node, killed: bool) -> None:
    """The daemon that serves does not notice, and ends without another one to hand over to."""
    with FakeKubelet(node.plugins) as kubelet, ExitStack() as daemons:
        first, second = in_turn(node, kubelet, daemons)
        second.kill() if killed else second.terminate(AT_ONCE)
        second.wait_exit()
        kubelet.allocate([next(iter(kubelet.devices(RESOURCE)))])
        first.terminate(AT_ONCE)
        kubelet.wait_devices(0)
        assert len(kubelet.registrations) == 1
        assert not [path for path in node.plugins.iterdir() if path.name.startswith((".sgpu", "sgpu"))]


def test_a_kubelet_that_restarts(node: Node) -> None:
    """Its start removes all sockets; the standby stands by all the same, until the daemon that serves ends."""
    with FakeKubelet(node.plugins) as kubelet, ExitStack() as daemons:
        first, second = in_turn(node, kubelet, daemons)
        kubelet.restart()
        kubelet.wait_registrations(2)
        kubelet.wait_devices(10)
        assert "taking over" not in second.logs
        first.terminate()
        kubelet.wait_registrations(3)
        kubelet.wait_devices(10)
        assert kubelet.gaps == []


def test_both_are_told_to_stop(node: Node) -> None:
    """The kubelet does not keep the devices of a daemon that found nobody to take over."""
    with FakeKubelet(node.plugins) as kubelet, ExitStack() as daemons:
        first, second = in_turn(node, kubelet, daemons)
        kubelet.register_delay = 0.5  # the first one's withdrawal takes that long
        first.signal(signal.SIGTERM)
        kubelet.wait_attempts(2)
        second.terminate(AT_ONCE)
        first.wait_log("no daemon took over")
        assert first.wait_exit() == 0
        kubelet.wait_devices(0)


def test_two_standbys(node: Node) -> None:
    """One after the other takes over."""
    with FakeKubelet(node.plugins) as kubelet, ExitStack() as daemons:
        first, *standbys = in_turn(node, kubelet, daemons, standbys=2)
        first.terminate()
        kubelet.wait_registrations(2)
        (second,) = [each for each in standbys if "registered" in each.logs]
        (third,) = [each for each in standbys if each is not second]
        kubelet.wait_for(lambda: kubelet.registrations[-1].connection.streaming)
        wait_until(lambda: third.logs.count("standing by") == 1, "it stands by, and said so once")
        second.terminate()
        kubelet.wait_registrations(3)
        third.terminate()
        assert kubelet.gaps == []


def test_what_others_see_of_a_standby(node: Node) -> None:
    """It is alive, and ready once it knows its GPUs; `status` asks the daemon that serves, then its successor."""
    socket, served = node.state.parent / "status.sock", ("-metrics-address", "127.0.0.1:0", "-status-socket")
    with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR, "-status-socket", str(socket)) as first:
        kubelet.wait_devices(10)
        node.driver.fail("nvmlInit", Code.DRIVER_NOT_LOADED)
        with node.daemon(*STANDBY, *served, str(socket)) as second:
            url = "http://" + second.wait_log(" http://").text.partition(" http://")[2].split(",")[0]
            assert get(f"{url}/healthz") == (200, "ok")
            assert get(f"{url}/readyz")[0] == 503
            node.driver.works("nvmlInit")
            standing_by(second)
            assert get(f"{url}/readyz") == (200, "ok, standing by")
            _, metrics = get(f"{url}/metrics")
            assert "sgpu_build_info" in metrics
            assert "uuid=" not in metrics
            assert "sgpu_registered{" not in metrics
            assert fetch(str(socket)).resources[0].registered
            assert "cannot listen" not in second.logs
            first.terminate()
            second.wait_log(f"serving status on {socket}")
            second.wait_log("registered")
            assert get(f"{url}/readyz") == (200, "ok")
            assert fetch(str(socket)).resources[0].registered


def test_faults_of_the_daemon_before(node: Node) -> None:
    """A fault that came before the standby was there is known to it, and was never healthy for the kubelet."""
    (gpu,) = node.driver.gpus(1)
    with FakeKubelet(node.plugins) as kubelet, node.daemon(*FACTOR) as first:
        kubelet.wait_devices(10)
        wait_listening(node)
        node.driver.xid(gpu, 79)
        wait_until(lambda: "Unhealthy" in kubelet.devices(RESOURCE).values(), "the fault")
        with node.daemon(*STANDBY) as second:
            standing_by(second)
            lists = len(kubelet.lists[RESOURCE])
            first.terminate()
            kubelet.wait_registrations(2)
            kubelet.wait_for(lambda: len(kubelet.lists[RESOURCE]) > lists)
            assert set(kubelet.devices(RESOURCE).values()) == {"Unhealthy"}
            second.terminate()
        assert kubelet.gaps == []


def test_mig_profiles(node: Node) -> None:
    """The resource of a MIG profile is handed over, too."""
    resource, flags = "deepomatic.com/mig-1g.10gb", ("-mig", "profile", "-simulate-mig", "1g.10gb")
    with FakeKubelet(node.plugins) as kubelet, node.daemon(*flags, simulate=1) as first:
        kubelet.wait_devices(1, resource=resource)
        with node.daemon(*flags, "-standby", simulate=1) as second:
            second.wait_log("standing by")
            second.wait_log("SIMULATED")
            first.terminate()
            kubelet.wait_registrations(2)
            first.wait_exit()
            assert "no daemon took over" not in first.logs
            kubelet.wait_devices(1, resource=resource)
        assert kubelet.gaps == []


def get(url: str) -> tuple[int, str]:
    """The status and the text of a page."""
    try:
        with urllib.request.urlopen(url) as response:
            return response.status, response.read().decode().strip()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode().strip()
