"""The worker leaves GPUs alone that are to be reset: one poll of the real process, with the stub library."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence

import pytest
from node import Node, needs_root
from stub_driver import StubGpu

from sgpu.driver.messages import ReleasedGpu, Report, WorkerConfig, decode, encode_config

pytestmark = needs_root
#: PR_CAPBSET_DROP, and what a container that is not privileged has not.
DROP, CAP_SYS_ADMIN = 24, 21


@pytest.fixture
def gpus(node: Node) -> tuple[StubGpu, ...]:
    gpus = node.driver.gpus(3)
    node.make_devices()
    return gpus


def command(node: Node, *gpus: StubGpu) -> list[str]:
    """The command line of a worker that is to leave these alone."""
    released = tuple(ReleasedGpu(gpu.bus_id, f"nvidia{gpu.minor}") for gpu in gpus)
    places = (str(node.host), str(node.dev), str(node.sys))
    config = WorkerConfig(*places, 1.0, released=released, once=True, look_only=True)
    return [sys.executable, "-m", "sgpu.driver", encode_config(config)]


def report(node: Node, *gpus: StubGpu, dropped: int | None = None) -> Report:
    """Its report; `dropped` is a capability that it has not."""
    done = subprocess.run(
        command(node, *gpus),
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
    found = report(node, gpus[1])
    assert [gpu.uuid for gpu in found.gpus] == uuids([gpus[0], gpus[2]])
    assert (found.released, found.held, found.problems) == ((gpus[1].bus_id,), "", ())
    assert [call for call in node.driver.call_log() if gpus[1].uuid in call] == []


def test_nobody_else_notices(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where mounts are shared, as on most hosts, no process but the worker gets those that hide a node."""
    script = '"$@" > /dev/null && cat /proc/self/mounts'
    shared = ["unshare", "--mount", "--propagation", "shared", "sh", "-c", script, "sh", *command(node, gpus[1])]
    mounts = subprocess.run(shared, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert mounts
    assert str(node.dev) not in mounts


def test_all(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where all are to be left alone, that is a report, too."""
    found = report(node, *gpus)
    assert (found.gpus, len(found.released), found.held) == ((), 3, "")


def test_none(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """Where none is, nothing is hidden."""
    found = report(node)
    assert ([gpu.uuid for gpu in found.gpus], found.released, found.held) == (uuids(gpus), (), "")


def test_not_privileged(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """What can't be hidden is asked about as always, and said."""
    found = report(node, gpus[1], dropped=CAP_SYS_ADMIN)
    assert ([gpu.uuid for gpu in found.gpus], found.released) == (uuids(gpus), ())
    assert "privileged" in found.held


def test_an_ordinary_file(node: Node, gpus: tuple[StubGpu, ...]) -> None:
    """A node that the library opens all the same is said, and so is the GPU."""
    path = node.dev / "nvidia1"
    path.unlink()
    path.touch()  # which can be opened where devices can't
    found = report(node, gpus[1])
    assert ([gpu.uuid for gpu in found.gpus], found.released) == (uuids(gpus), ())
    assert gpus[1].bus_id in found.held
