"""Faults from the stub driver, through the real daemon, to what the kubelet sees: one test for each path.

Which fault means what is decided, and tested, in `driver.health` and `driver.monitor`.
"""

from __future__ import annotations

import json
import os
import signal
import time

import grpc
import pytest
from fake_kubelet import FakeKubelet
from node import RESOURCE, Node
from stub_driver import StubDriver, StubEvent, StubGpu
from watching import (
    SHARES,
    history,
    is_alive,
    shares,
    started,
    uuids,
    wait_down,
    wait_listening,
    wait_polls,
    wait_until,
    watched,
)

from sgpu.driver.nvml import Code, EventType

pytestmark = pytest.mark.soak

#: So seldom that what comes sooner was not the poll's doing.
SELDOM = ("-sample-interval", 60)
#: Seconds after which the daemon gives up a call of the driver.
DEADLINE = 1.0
NEW_VERSION = "560.35.03"
NOBODY = uuids()


def refusal(kubelet: FakeKubelet, gpu: StubGpu) -> str:
    """Why a pod does not get a share of the GPU."""
    with pytest.raises(grpc.RpcError) as refused:
        kubelet.allocate([f"{gpu.uuid}::0"])
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return str(refused.value.details())


def wait_call(node: Node, function: str, gpu: StubGpu) -> None:
    """Wait until the function is called once more."""
    calls = node.driver.calls(function, gpu)
    wait_until(lambda: node.driver.calls(function, gpu) > calls, f"{function} is called")


def test_event(node: Node) -> None:
    """Take a GPU out at once after a critical XID, with the operator's policy before the table, and log it once."""
    ignored, chosen, critical = node.driver.gpus(3)
    with watched(node, *SELDOM, "-ignore-xids", "79,74", "-critical-xids", "13") as (kubelet, daemon):
        wait_listening(node)
        node.driver.xid(ignored, 31)  # an application's
        node.driver.xid(ignored, 79)
        node.driver.xid(chosen, 13)
        wait_down(kubelet, chosen)
        node.driver.xid(critical, 48)
        wait_down(kubelet, chosen, critical)
        assert history(kubelet) == [NOBODY, uuids(chosen), uuids(chosen, critical)]
        assert len([line for line in daemon.lines if critical.uuid in line.text and "XID 48" in line.text]) == 1
        assert "XID 48" in refusal(kubelet, critical)
        kubelet.allocate([f"{ignored.uuid}::0"])


def test_recovery_action(node: Node) -> None:
    """Poll at once when an event says that the driver's recovery action changed."""
    gpu, _ = node.driver.gpus(2)
    with watched(node, *SELDOM) as (kubelet, _):
        for action, down in ((1, [gpu]), (0, [])):
            wait_listening(node)
            node.driver.change(gpu, recovery_action=action)
            node.driver.event(gpu, EventType.XID_CRITICAL, 154)
            wait_down(kubelet, *down)
        assert history(kubelet) == [NOBODY, uuids(gpu), NOBODY]


def test_poll(node: Node) -> None:
    """Take a GPU out for as long as polls show a fault; send nothing for what is no fault."""
    gpu, _ = node.driver.gpus(2)
    with watched(node) as (kubelet, daemon):
        wait_polls(node, 2)
        lines = daemon.lines
        gpu = node.driver.change(gpu, used=1 << 30, utilization=50)
        wait_polls(node, 2)
        assert daemon.lines == lines
        node.driver.change(gpu, rows_pending=1)
        wait_down(kubelet, gpu)
        wait_polls(node, 2)
        node.driver.change(gpu, rows_pending=0)
        wait_down(kubelet)
        node.driver.fail("nvmlDeviceGetRemappedRows", 999, gpu)
        wait_down(kubelet, gpu)
        assert "nvmlDeviceGetRemappedRows" in refusal(kubelet, gpu)
        node.driver.works("nvmlDeviceGetRemappedRows", gpu)
        wait_down(kubelet)
        assert history(kubelet) == [NOBODY, uuids(gpu), NOBODY, uuids(gpu), NOBODY]


def test_reset(node: Node) -> None:
    """Clear the fault of a GPU that vanished and came back, and not another's."""
    reset, other, _ = node.driver.gpus(3)
    with watched(node) as (kubelet, _):
        wait_listening(node)
        node.driver.xid(reset, 79)
        node.driver.xid(other, 48)
        wait_down(kubelet, reset, other)
        node.driver.change(reset, lost=True)
        wait_polls(node, 2)
        node.driver.change(reset, lost=False)
        wait_down(kubelet, other)
        wait_polls(node, 2)
        assert history(kubelet)[-1] == uuids(other)


def test_late_device_node(node: Node) -> None:
    """List a GPU once its device node is there, in the same registration, and take it out while it is not."""
    path = node.dev / "nvidia1"
    path.unlink()
    first, late = node.driver.gpus(2)
    with FakeKubelet(node.plugins) as kubelet, started(node) as daemon:
        assert set(kubelet.wait_devices(SHARES)) == shares(first)
        daemon.wait_log(str(path))
        path.touch()
        assert set(kubelet.wait_devices(2 * SHARES)) == shares(first, late)
        path.unlink()
        wait_down(kubelet, late)
        path.touch()
        wait_down(kubelet)
        assert history(kubelet) == [NOBODY, NOBODY, uuids(late), NOBODY]
        assert len(kubelet.registrations) == 1


def test_hang(node: Node) -> None:
    """Take out only the GPU whose call does not return; listen to the others all the while."""
    stuck, other, third = node.driver.gpus(3)
    with watched(node, "-driver-timeout", DEADLINE) as (kubelet, daemon):
        node.driver.hang("nvmlDeviceGetMemoryInfo", stuck)
        wait_down(kubelet, stuck)
        assert f"{DEADLINE:g} s" in refusal(kubelet, stuck)
        wait_listening(node)
        node.driver.xid(other, 79)
        wait_down(kubelet, stuck, other)
        kubelet.allocate([f"{third.uuid}::0"])
        wait_call(node, "nvmlDeviceGetMemoryInfo_v2", stuck)  # it is tried again, which nobody else notices
        assert len([pid for pid in daemon.children() if is_alive(pid)]) <= 2
        node.driver.works("nvmlDeviceGetMemoryInfo", stuck)
        wait_down(kubelet, other)
        assert history(kubelet) == [NOBODY, uuids(stuck), uuids(stuck, other), uuids(other)]


@pytest.mark.parametrize("hanging", [True, False], ids=["SIGTERM while a call hangs", "SIGKILL between polls"])
def test_end(node: Node, hanging: bool) -> None:
    """Leave no worker when the daemon ends, whatever the worker is doing."""
    (gpu,) = node.driver.gpus(1)
    with watched(node, *(() if hanging else SELDOM)) as (_, daemon):
        wait_listening(node)
        if hanging:
            node.driver.hang("nvmlDeviceGetMemoryInfo", gpu)
            wait_call(node, "nvmlDeviceGetMemoryInfo_v2", gpu)
        children = daemon.children()
        assert children
        if hanging:
            began = time.monotonic()
            daemon.terminate()
            assert time.monotonic() - began < 5  # and not after the call's deadline of 20 seconds
        else:
            os.kill(daemon.pid, signal.SIGKILL)
            daemon.wait_exit()
        wait_until(lambda: not any(map(is_alive, children)), "the worker is gone")


def test_crash(node: Node) -> None:
    """Take out only the GPU whose call crashes the worker; listen to the others with another."""
    faulty, other = node.driver.gpus(2)
    with watched(node) as (kubelet, _):
        node.driver.crash("nvmlDeviceGetMemoryInfo", faulty)
        wait_down(kubelet, faulty)
        assert "SIGABRT" in refusal(kubelet, faulty)
        wait_listening(node)
        node.driver.xid(other, 79)
        wait_down(kubelet, faulty, other)
        node.driver.works("nvmlDeviceGetMemoryInfo", faulty)
        wait_down(kubelet, other)
        assert history(kubelet) == [NOBODY, uuids(faulty), uuids(faulty, other), uuids(other)]


def test_driver_replaced(node: Node) -> None:
    """Use another worker for another version of the driver; the faults from before are over."""
    gpus = node.driver.gpus(2)
    with watched(node) as (kubelet, daemon):
        wait_listening(node)
        before = daemon.children()
        node.driver.xid(gpus[0], 79)
        wait_down(kubelet, gpus[0])
        # The library is replaced first, and does not match its driver until the module is, too.
        node.driver.set(calls={"nvmlInit": Code.LIB_RM_VERSION_MISMATCH, "nvmlDeviceGetCount": 999})
        wait_down(kubelet, *gpus)
        node.driver = StubDriver(node.host, gpus=gpus, driver_version=NEW_VERSION)
        wait_down(kubelet)
        daemon.wait_log(NEW_VERSION)
        wait_until(lambda: not {*before} & {*daemon.children()}, "the worker from before is gone")
        wait_listening(node)
        node.driver.xid(gpus[1], 79)
        wait_down(kubelet, gpus[1])


def test_restart(node: Node) -> None:
    """Know the faults from before a restart of the daemon, and what clears them."""
    faulty, _ = node.driver.gpus(2)
    with FakeKubelet(node.plugins) as kubelet:
        with started(node) as daemon:
            kubelet.wait_devices(2 * SHARES)
            wait_listening(node)
            node.driver.xid(faulty, 79)
            wait_down(kubelet, faulty)
            wait_until(lambda: faulty.uuid in json.loads(node.state.read_text())["faults"], "the fault is saved")
            daemon.terminate()
        kubelet.wait_devices(0)
        kubelet.lists.clear()
        with started(node):
            kubelet.wait_devices(2 * SHARES)
            assert "XID 79" in refusal(kubelet, faulty)
            wait_polls(node, 2)
            assert history(kubelet) == [uuids(faulty)]
            node.driver.change(faulty, lost=True)
            wait_polls(node, 2)
            node.driver.change(faulty, lost=False)
            wait_down(kubelet)


def test_storm(node: Node) -> None:
    """Send each change once, and go on allocating, however many events come at a time."""
    *faulty, busy = node.driver.gpus(4)
    with watched(node, *SELDOM) as (kubelet, _):
        wait_listening(node)
        xids = [StubEvent(gpu, EventType.XID_CRITICAL, xid) for xid in (79, 48) for gpu in faulty]
        application = [StubEvent(gpu, EventType.XID_CRITICAL, xid) for xid in (13, 31) for gpu in (*faulty, busy)]
        node.driver.set(events=(*xids, *application) * 20)
        wait_down(kubelet, *faulty)
        kubelet.allocate([f"{busy.uuid}::0"])
        node.driver.xid(busy, 79)  # after all others
        wait_down(kubelet, *faulty, busy)
        assert len(kubelet.lists[RESOURCE]) <= 1 + len(faulty) + 1
