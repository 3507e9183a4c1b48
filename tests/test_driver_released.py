"""The worker leaves GPUs alone that are to be reset: one poll of the real process, with the stub library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
from node import Node
from stub_driver import StubDriver, StubGpu

from sgpu.driver.messages import Message, NotReady, ReleasedGpu, Report, WorkerConfig, decode, encode_config
from sgpu.driver.nvml import Code


@pytest.fixture
def gpus(node: Node) -> tuple[StubGpu, ...]:
    gpus = node.driver.gpus(3)
    node.list_in_kernel()
    return gpus


def poll(node: Node, *gpus: StubGpu) -> Message:
    """The last message of a worker that is to leave these alone, of a single poll."""
    released = tuple(ReleasedGpu(gpu.bus_id, f"nvidia{gpu.minor}") for gpu in gpus)
    places = (str(node.host), str(node.dev), str(node.sys))
    config = WorkerConfig(*places, 1.0, released=released, once=True, look_only=True)
    command = [sys.executable, "-m", "sgpu.driver", encode_config(config)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60, check=True)
    return decode(done.stdout.splitlines()[-1])


def report(node: Node, *gpus: StubGpu) -> Report:
    message = poll(node, *gpus)
    assert isinstance(message, Report)
    return message


def uuids(gpus: Sequence[StubGpu]) -> list[str]:
    return [gpu.uuid for gpu in gpus]


def test_others_alone(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """No handle of it is taken; the others answer as always, in the driver's order."""
    found = report(node, gpus[1])
    assert [gpu.uuid for gpu in found.gpus] == uuids([gpus[0], gpus[2]])
    assert (found.released, found.held, found.problems) == ((gpus[1].bus_id,), "", ())
    assert [call for call in node.driver.call_log() if gpus[1].uuid in call] == []
    assert node.driver.calls("nvmlInitWithFlags") == 1
    assert node.driver.calls("nvmlDeviceGetHandleByIndex") == 0


def test_all(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where all are to be left alone, that is a report, too."""
    found = report(node, *gpus)
    assert (found.gpus, len(found.released), found.held) == ((), 3, "")


def test_an_old_driver(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Initialize as always where the library knows no flags: by its documentation that opens no GPU."""
    StubDriver(node.host, without=["nvmlInitWithFlags"]).set(gpus=gpus, dev=str(node.dev))
    found = report(node, gpus[1])
    assert (len(found.gpus), found.released, found.held) == (2, (gpus[1].bus_id,), "")


@pytest.mark.parametrize("opens_all", [False, True])
def test_a_driver_that_needs_attaching(node: Node, gpus: tuple[StubGpu, ...], opens_all: bool) -> None:
    """Initialize as always where the others do not answer otherwise, and say so if that opens the GPU."""
    node.driver.set(no_attach_breaks=True, init_attaches=opens_all)
    found = report(node, gpus[1])
    assert [gpu.uuid for gpu in found.gpus] == uuids([gpus[0], gpus[2]])
    assert found.released == (gpus[1].bus_id,)
    assert (gpus[1].bus_id in found.held) is opens_all


def test_a_driver_that_opens_all(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Initialize without attaching where the driver would open each GPU."""
    node.driver.set(init_attaches=True)
    assert (report(node, gpus[1]).held, report(node).released) == ("", ())


def test_flags_that_are_refused(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Initialize as always where the library refuses the flag; without a driver, wait for it."""
    node.driver.fail("nvmlInitWithFlags", Code.NOT_SUPPORTED)
    assert len(report(node, gpus[1]).gpus) == 2
    node.driver.fail("nvmlInitWithFlags", Code.DRIVER_NOT_LOADED)
    assert isinstance(poll(node, gpus[1]), NotReady)


def test_no_list(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Ask about all where the kernel's list is missing, and say why the GPU is not left alone."""
    for file in (node.sys / "bus/pci/drivers/nvidia").iterdir():
        file.unlink()
    found = report(node, gpus[1])
    assert (len(found.gpus), found.released) == (3, ())
    assert "-sysfs-directory" in found.held


def test_what_nvml_does_not_list(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """A GPU that the kernel has and NVML has not is no problem: it is excluded, or being reset."""
    (node.sys / "bus/pci/drivers/nvidia/0000:99:00.0").touch()
    found = report(node, gpus[1])
    assert (len(found.gpus), found.problems) == (2, ())
