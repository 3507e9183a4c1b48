"""Measure how long a container goes without its limit: from its cgroup to the limit that is read back, and a
PreStartContainer call.

    PYTHONPATH=src:tests python bench/limits.py [CGROUP2_DIRECTORY]

The directory is one of a mounted cgroup v2 tree; without it, plain directories stand in: inotify works there, too.
The driver is the stub of the tests, whose calls take some 0.1 ms: what is measured is sgpu.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from inotify_simple import INotify, flags
from node import RESOURCE, Node, new_node

from sgpu.api import v1beta1_pb2

#: Pods, one after the other, each with one container and one share.
PODS: Final = 200
#: Seconds after which a limit is taken not to come.
TIMEOUT: Final = 10.0


@contextmanager
def cgroup_tree(below: Path | None) -> Iterator[Path]:
    """Make a tree as a kubelet's, and remove it at the end."""
    with tempfile.TemporaryDirectory(dir=below, ignore_cleanup_errors=True) as name:
        root = Path(name)
        (root / "kubepods/burstable").mkdir(parents=True)
        if below is None:
            (root / "cgroup.controllers").touch()
        yield root
        for directory in sorted(root.rglob("*/"), reverse=True):
            directory.rmdir()


class Limits:
    """The limits that were read back of the driver, by the files beside it. The kernel reports them: to look again and
    again would take a processor from what is measured.
    """

    def __init__(self, node: Node) -> None:
        self._inotify = INotify()
        self._inotify.add_watch(node.driver.path.parent, flags.CLOSE_NOWRITE)
        self._known: set[str] = set()

    def take(self, timeout: float = 0) -> set[str]:
        """Return the names of those that were not read back before."""
        names = {event.name for event in self._inotify.read(timeout=round(1000 * timeout))}
        new = {name for name in names - self._known if name.startswith("limit.")}
        self._known |= new
        return new

    def wait(self) -> float:
        """Wait until another one is read back; returns the time."""
        deadline = time.perf_counter() + TIMEOUT
        while not self.take(deadline - time.perf_counter()):
            if time.perf_counter() > deadline:
                raise SystemExit(f"no limit within {TIMEOUT:g} s")
        return time.perf_counter()


def measure(node: Node, kubelet: FakeKubelet, tree: Path) -> Iterator[tuple[float, float]]:
    """Yield, for each pod, seconds of a PreStartContainer, and from the container's cgroup to its limit."""
    shares, limits = list(kubelet.wait_devices(PODS)), Limits(node)
    kubelet.wait_for(lambda: kubelet.registrations)
    for share in shares:
        uid, container = str(uuid.uuid4()), os.urandom(32).hex()
        kubelet.allocate([share])
        ids = {"0": [share]}
        kubelet.entries.append({"PodUID": uid, "ContainerName": "main", "ResourceName": RESOURCE, "DeviceIDs": ids})
        kubelet.write_checkpoint()
        pod = tree / "kubepods/burstable" / f"pod{uid}"
        pod.mkdir()
        began = time.perf_counter()
        request = v1beta1_pb2.PreStartContainerRequest(devices_ids=[share])
        kubelet.call("v1beta1.DevicePlugin", "PreStartContainer", request, v1beta1_pb2.PreStartContainerResponse)
        waited = time.perf_counter() - began
        limits.take()  # the pod's
        began = time.perf_counter()
        (pod / container).mkdir()
        yield waited, limits.wait() - began


def main() -> None:
    below = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    # As on a node, where the state is in /run: that of the tests polls the driver 17 times as often, without metrics.
    with new_node() as node, cgroup_tree(below) as tree, tempfile.TemporaryDirectory(dir="/dev/shm") as state:
        node.driver.set(limits="misc")
        options = ["-memory-limits", "fair", "-cgroup-directory", str(tree), "-gpu-duplication-factor", f"{PODS}"]
        options += ["-state-file", f"{state}/state.json", "-metrics-address", "127.0.0.1:0", "-sample-interval", "5"]
        with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods), node.daemon(*options):
            measured = list(measure(node, kubelet, tree))
    for name, values in zip(("PreStartContainer", "cgroup to limit"), zip(*measured, strict=True), strict=True):
        milliseconds = sorted(1000 * value for value in values)
        row = {"median": statistics.median(milliseconds), "99th": milliseconds[-2], "worst": milliseconds[-1]}
        print(name, json.dumps({key: round(value, 1) for key, value in row.items()}), "ms,", PODS, "pods")


if __name__ == "__main__":
    main()
