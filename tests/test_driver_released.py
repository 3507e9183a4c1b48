"""The worker leaves GPUs alone that are to be reset: the real process, with the stub library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs
import pytest
from node import Node
from stub_driver import StubGpu

from sgpu.driver.messages import ReleasedGpu, Report, WorkerConfig, decode, encode_config
from sgpu.driver.nvml import Code

#: PR_CAPBSET_DROP, and what a container that is not privileged has not.
DROP, CAP_SYS_ADMIN = 24, 21


@pytest.fixture
def gpus(node: Node) -> tuple[StubGpu, ...]:
    gpus = node.driver.gpus(3)
    node.make_devices()
    return gpus


def card(gpu: StubGpu) -> ReleasedGpu:
    return ReleasedGpu(gpu.bus_id, f"nvidia{gpu.minor}")


def command(node: Node, *released: ReleasedGpu, once: bool = True) -> list[str]:
    """The command line of a worker that is to leave these alone."""
    places = (str(node.host), str(node.dev), str(node.sys))
    config = WorkerConfig(*places, 0.1, released=released, once=once, look_only=True, proc_directory=str(node.proc))
    return [sys.executable, "-m", "sgpu.driver", encode_config(config)]


def report(node: Node, *released: ReleasedGpu, dropped: int | None = None) -> Report:
    """Its report; `dropped` is a capability that it has not."""
    done = subprocess.run(
        command(node, *released),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
        preexec_fn=None if dropped is None else lambda: ctypes.CDLL(None).prctl(DROP, dropped, 0, 0, 0),
    )
    message = decode(done.stdout.splitlines()[-1])
    assert isinstance(message, Report)
    return message


def uuids(gpus: Sequence[StubGpu]) -> list[str]:
    return [gpu.uuid for gpu in gpus]


def test_others_alone(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """It is not opened; the others answer as always, in the driver's order."""
    found = report(node, card(gpus[1]))
    assert [gpu.uuid for gpu in found.gpus] == uuids([gpus[0], gpus[2]])
    assert (found.released, found.held, found.problems) == ((gpus[1].bus_id,), "", ())
    assert [call for call in node.driver.call_log() if gpus[1].uuid in call] == []


def test_nobody_else_notices(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where mounts are shared, as on most hosts, no process but the worker gets those that hide a node."""
    script = '"$@" > /dev/null && cat /proc/self/mounts'
    shared = ["unshare", "--mount", "--propagation", "shared", "sh", "-c", script, "sh", *command(node, card(gpus[1]))]
    mounts = subprocess.run(shared, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert mounts
    assert str(node.dev) not in mounts


def test_minor_numbers(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """The node is the one that the kernel has for the card now."""
    node.list_in_kernel("0000:3c:00.0", 1)
    found = report(node, attrs.evolve(card(gpus[1]), device_node="nvidia0"))
    assert [gpu.uuid for gpu in found.gpus] == uuids([gpus[0], gpus[2]])
    assert (found.released, found.held) == ((gpus[1].bus_id,), "")


@pytest.mark.parametrize("known", [True, False], ids=["the kernel lists others", "no list"])
def test_no_node(node: Node, gpus: tuple[StubGpu, ...], known: bool) -> None:
    """For a card that is gone, or was a simulated one, nothing is hidden."""
    if known:
        node.list_in_kernel("0000:3c:00.0", 1)
    found = report(node, ReleasedGpu("00000000:99:00.0", "nvidia1" if known else ""))
    assert ([gpu.uuid for gpu in found.gpus], found.held) == (uuids(gpus), "")


def test_the_wrong_node(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """A card that answers all the same is not released."""
    found = report(node, ReleasedGpu(gpus[1].bus_id, "nvidia0"))
    assert (found.released, gpus[1].bus_id in found.held) == ((), True)


@contextmanager
def worker(node: Node, released: ReleasedGpu) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[Report]]]:
    """A worker that goes on, and its reports. Without events, it initializes the library again by itself."""
    node.driver.fail("nvmlEventSetCreate", Code.NOT_SUPPORTED)
    line, pipe = command(node, released, once=False), subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        yield process, (message for message in map(decode, process.stdout) if isinstance(message, Report))
        process.kill()


def test_made_late(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """A node that was not there, and that the library makes and opens, is hidden when it is initialized again."""
    (node.dev / "nvidia1").unlink()
    with worker(node, card(gpus[1])) as (_, reports):
        first, second = next(reports), next(reports)
    assert (len(first.gpus), first.released, gpus[1].bus_id in first.held) == (3, (), True)
    assert (len(second.gpus), second.released, second.held) == (2, (gpus[1].bus_id,), "")


def test_another_card_in_its_place(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where the hidden node is another card's by now, the worker ends: the next one sees that card."""
    node.list_in_kernel("0000:3c:00.0", 1)
    with worker(node, card(gpus[1])) as (process, reports):
        assert len(next(reports).gpus) == 2
        shutil.rmtree(node.proc / "driver/nvidia/gpus/0000:3c:00.0")
        node.make_nodes("nvidia99")  # a change after which the library is initialized again
        assert process.wait(30) == 0
    assert len(report(node, card(gpus[1])).gpus) == 3


@pytest.mark.parametrize("hidden", [True, False])
def test_counted_all_the_same(node: Node, gpus: tuple[StubGpu, ...], hidden: bool) -> None:
    """It is no problem that a driver counts a GPU that it may not open."""
    node.driver.fail("nvmlDeviceGetHandleByIndex", Code.NO_PERMISSION, gpus[2])
    found = report(node, *([card(gpus[1])] if hidden else []))
    assert (found.problems == ()) is hidden


def test_all(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where all are to be left alone, that is a report, too."""
    found = report(node, *map(card, gpus))
    assert (found.gpus, len(found.released), found.held) == ((), 3, "")


def test_none(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where none is, nothing is hidden."""
    found = report(node)
    assert ([gpu.uuid for gpu in found.gpus], found.released, found.held) == (uuids(gpus), (), "")


def test_not_privileged(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """What can't be hidden is asked about as always, and said."""
    found = report(node, card(gpus[1]), dropped=CAP_SYS_ADMIN)
    assert ([gpu.uuid for gpu in found.gpus], found.released) == (uuids(gpus), ())
    assert "privileged" in found.held


@pytest.mark.parametrize("answers", [True, False])
def test_an_ordinary_file(node: Node, gpus: tuple[StubGpu, ...], answers: bool) -> None:
    """A GPU whose node the library opens all the same is not released, whether or not it answers."""
    path = node.dev / "nvidia1"
    path.unlink()
    path.touch()  # which can be opened where devices can't
    if not answers:
        node.driver.fail("nvmlDeviceGetHandleByIndex", 999, gpus[1])
    found = report(node, card(gpus[1]))
    assert [gpu.uuid for gpu in found.gpus] == uuids(gpus if answers else [gpus[0], gpus[2]])
    assert (found.released, gpus[1].bus_id in found.held) == ((), True)
