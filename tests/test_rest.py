"""Counts of what the daemon does while nothing happens, which no busy machine changes much."""

from __future__ import annotations

import pytest
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import Node
from watching import wait_until

#: Polls of the driver, and about as many looks at pods, that are counted.
POLLS = 30
#: Times that a thread waits, for each of them: the worker for the time, the daemon for its report, for the time of the
#: next look and for the kubelet. With a message for each GPU, and a connection and a thread for each look, it was 12.
MOST_WAKE_UPS = 7


def polls(node: Node) -> int:
    return node.driver.calls("nvmlDeviceGetCount")


@pytest.mark.process
def test_wake_ups(node: Node) -> None:
    """Wake up seldom, in all processes together."""
    node.driver.gpus(4)
    with FakePodResources(node.pods) as pods, FakeKubelet(node.plugins) as kubelet, node.daemon() as daemon:
        kubelet.wait_devices(400)
        for number, share in enumerate(list(kubelet.devices())[:20]):
            pods.assign("team", f"pod-{number}", "main", [share])
        pods.wait_heeded()
        began, before = polls(node), daemon.wake_ups()
        wait_until(lambda: polls(node) >= began + POLLS, "it polls")
        assert (daemon.wake_ups() - before).total() / (polls(node) - began) < MOST_WAKE_UPS
