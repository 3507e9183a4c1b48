"""Measure how long a container goes without its limit: from its cgroup to the limit, and a PreStartContainer call.

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


def limits(node: Node) -> int:
    """Count the limits that the driver has."""
    return sum(name.startswith("limit.") for name in os.listdir(node.driver.path.parent))


def wait_limits(node: Node, count: int) -> float:
    """Wait until the driver has so many limits; returns the time."""
    deadline = time.perf_counter() + TIMEOUT
    while limits(node) < count:
        if time.perf_counter() > deadline:
            raise SystemExit(f"no limit within {TIMEOUT:g} s")
        time.sleep(0.0002)
    return time.perf_counter()


def measure(node: Node, kubelet: FakeKubelet, tree: Path) -> Iterator[tuple[float, float]]:
    """Yield, for each pod, seconds of a PreStartContainer, and from the container's cgroup to its limit."""
    shares = list(kubelet.wait_devices(PODS))
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
        before, began = limits(node), time.perf_counter()
        (pod / container).mkdir()
        yield waited, wait_limits(node, before + 1) - began


def main() -> None:
    below = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with new_node() as node, cgroup_tree(below) as tree:
        node.driver.set(limits="misc")
        flags = ("-memory-limits", "fair", "-cgroup-directory", str(tree), "-gpu-duplication-factor", PODS)
        with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods), node.daemon(*flags):
            measured = list(measure(node, kubelet, tree))
    for name, values in zip(("PreStartContainer", "cgroup to limit"), zip(*measured, strict=True), strict=True):
        milliseconds = sorted(1000 * value for value in values)
        row = {"median": statistics.median(milliseconds), "99th": milliseconds[-2], "worst": milliseconds[-1]}
        print(name, json.dumps({key: round(value, 1) for key, value in row.items()}), "ms,", PODS, "pods")


if __name__ == "__main__":
    main()
