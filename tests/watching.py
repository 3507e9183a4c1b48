"""Follows the unhealthy GPUs in the kubelet's lists, and waits for changes.

A list in which one GPU has healthy and unhealthy shares, a list that repeats the one before, and a registration that
was lost are failures wherever they happen: `watched` looks for them at the end of each test.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from node import RESOURCE, Node
from stub_driver import StubGpu

T = TypeVar("T")

#: Shares of each GPU: more than one, and few enough to read in a failure.
SHARES: Final = 4
#: Seconds after which something that is due is taken not to come.
TIMEOUT: Final = 30.0


def down_in(healths: Mapping[str, str]) -> frozenset[str]:
    """The UUIDs of the GPUs that are unhealthy, from health by share. All shares of a GPU must agree."""
    by_gpu = defaultdict(set)
    for share, health in healths.items():
        by_gpu[share.partition("::")[0]].add(health)
    assert all(len(found) == 1 for found in by_gpu.values()), f"shares of one GPU differ: {dict(by_gpu)}"
    return frozenset(uuid for uuid, found in by_gpu.items() if "Unhealthy" in found)


def history(kubelet: FakeKubelet) -> list[frozenset[str]]:
    """Return the GPUs that were down, list by list."""
    return [
        down_in({device.ID: device.health for device in listed.response.devices}) for listed in kubelet.lists[RESOURCE]
    ]


def wait_down(kubelet: FakeKubelet, *gpus: StubGpu, timeout: float = TIMEOUT) -> float:
    """Wait until these GPUs and no others are unhealthy for the kubelet; returns when it got that list."""
    uuids = {gpu.uuid for gpu in gpus}
    kubelet.wait_for(
        lambda: kubelet.devices(RESOURCE) and down_in(kubelet.devices(RESOURCE)) == uuids, timeout, f"{uuids} down"
    )
    return kubelet.lists[RESOURCE][-1].time


def uuids(*gpus: StubGpu) -> frozenset[str]:
    return frozenset(gpu.uuid for gpu in gpus)


def shares(*gpus: StubGpu) -> set[str]:
    """The ids of all their shares."""
    return {f"{gpu.uuid}::{number}" for gpu in gpus for number in range(SHARES)}


@contextmanager
def watched(node: Node, *flags: str | float) -> Iterator[tuple[FakeKubelet, DaemonProcess]]:
    """A kubelet that has every GPU of the node's driver, and the daemon that registered them."""
    with FakeKubelet(node.plugins) as kubelet, started(node, *flags) as daemon:
        kubelet.wait_devices(SHARES * len(node.driver.state.gpus))
        yield kubelet, daemon
        check_updates(kubelet)
        assert len(kubelet.registrations) == 1


def started(node: Node, *flags: str | float) -> DaemonProcess:
    """The daemon, to be entered, with SHARES shares of each GPU."""
    return node.daemon("-gpu-duplication-factor", SHARES, *flags)


def check_updates(kubelet: FakeKubelet) -> None:
    """Fail if a list repeats the one before."""
    history(kubelet)
    # The session it was sent in matters: a kubelet that restarts must get what it got before.
    bounds = [registration.time for registration in kubelet.registrations]
    previous = None
    for listed in kubelet.lists[RESOURCE]:
        current = (sum(bound <= listed.time for bound in bounds), listed.response)
        assert current != previous, f"the same list twice: {down_in({d.ID: d.health for d in listed.response.devices})}"
        previous = current


def wait_until(condition: Callable[[], T], message: str, timeout: float = TIMEOUT) -> T:
    """Wait for what nobody announces, and return it: check every few milliseconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {message}"
        time.sleep(0.005)
    return found


def wait_listening(node: Node) -> None:
    """Wait until the driver's process waits for events once more than it did: a poll was made, sets are registered."""
    before = node.driver.calls("nvmlEventSetWait")
    wait_until(lambda: node.driver.calls("nvmlEventSetWait") > before, "the driver's process waits for events")


def wait_polls(node: Node, number: int = 2) -> None:
    """Wait for that many polls to come back."""
    before = node.driver.calls("nvmlSystemGetDriverVersion")
    wait_until(lambda: node.driver.calls("nvmlSystemGetDriverVersion") >= before + number, f"{number} polls")


def is_alive(pid: int) -> bool:
    """Return whether a process runs. One that only waits to be reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
