"""Measure the daemon on a large node, beside a small one: a part of figures.py, which can be run by itself.

On both nodes every other share is taken, by as many pods as a node has at most, which the tests' PodResources tells.
Times include the kubelet's own work: grpcio's part of a list of 16,000 devices is a few milliseconds.
"""

from __future__ import annotations

import gzip
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import grpc
from daemon_process import DaemonProcess
from fake_kubelet import CHANNEL_OPTIONS, FakeKubelet
from fake_pod_resources import FakePodResources
from node import Node, new_node

from sgpu.api import v1beta1_pb2

GPUS: Final = 8
SHARES: Final = 100
LARGE_GPUS: Final = 16
LARGE_SHARES: Final = 1000
#: Shares of one container.
WANTED: Final = 16
#: As many as large nodes are set up for; the kubelet's default is 110.
PODS: Final = 250
CALLS: Final = 200
LISTS: Final = 50
SCRAPES: Final = 50
#: Seconds for which pods come and go, and between two looks at them: more often than by default, so that a call often
#: finds the daemon busy with them.
CHURN: Final = 10
INTERVAL: Final = 0.5


def series(measure: Callable[[], float], count: int) -> list[float]:
    """That many measurements, sorted."""
    return sorted(measure() for _ in range(count))


def percentile(values: list[float], part: float) -> float:
    return values[min(int(part * len(values)), len(values) - 1)]


def print_table(rows: Iterable[tuple[str, str, str]]) -> None:
    print("| figure | measured | aim |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


@attrs.frozen
class Measured:
    """Times in milliseconds, sorted; memory in bytes."""

    preferred: list[float]
    preferred_in_churn: list[float]
    lists: list[float]
    resident: int


@contextmanager
def serving(node: Node, shares: int) -> Iterator[tuple[FakeKubelet, DaemonProcess]]:
    with (
        FakeKubelet(node.plugins) as kubelet,
        node.daemon("-gpu-duplication-factor", shares, "-sample-interval", INTERVAL) as daemon,
    ):
        yield kubelet, daemon


def preferred(kubelet: FakeKubelet, available: list[str], size: int) -> float:
    """Milliseconds of one GetPreferredAllocation, as the kubelet waits for it."""
    started = time.perf_counter()
    chosen = kubelet.preferred(available, size=size)
    took = 1000 * (time.perf_counter() - started)
    assert len(chosen) == size
    return took


def full_list(node: Node, channel: grpc.Channel, devices: int) -> float:
    """Milliseconds from opening a ListAndWatch stream to having its first list."""
    watch = channel.unary_stream(
        "/v1beta1.DevicePlugin/ListAndWatch",
        v1beta1_pb2.Empty.SerializeToString,
        v1beta1_pb2.ListAndWatchResponse.FromString,
    )
    started = time.perf_counter()
    stream = watch(v1beta1_pb2.Empty())
    listed = next(stream)
    took = 1000 * (time.perf_counter() - started)
    stream.cancel()
    assert len(listed.devices) == devices
    return took


def measure(gpus: int, shares: int) -> Measured:
    """A node with every other share taken."""
    with new_node() as node, FakePodResources(node.pods) as pods:
        node.make_nodes(*(f"nvidia{minor}" for minor in range(gpus)))
        node.driver.gpus(gpus)
        with serving(node, shares) as (kubelet, daemon):
            devices = list(kubelet.wait_devices(gpus * shares))
            for number in range(PODS):
                pods.assign("team", f"pod-{number}", "main", devices[1::2][number::PODS])
            pods.wait_heeded()
            free = devices[::2]
            calls = series(lambda: preferred(kubelet, free, min(WANTED, gpus)), CALLS)
            with grpc.insecure_channel(f"unix:{node.socket}", options=CHANNEL_OPTIONS) as channel:
                lists = series(lambda: full_list(node, channel, len(devices)), LISTS)
            churned = []
            end = time.monotonic() + CHURN
            while time.monotonic() < end:
                pods.assign("team", "guest", "main", free[-1:])
                churned.append(preferred(kubelet, free[:-1], min(WANTED, gpus)))
                pods.release("guest", "team")
                churned.append(preferred(kubelet, free[:-1], min(WANTED, gpus)))
            return Measured(calls, sorted(churned), lists, daemon.rss_bytes())


def scrapes() -> list[float]:
    """Milliseconds of each of several scrapes of a node whose every share has a pod of its own, as Prometheus asks."""
    with new_node() as node, FakePodResources(node.pods) as pods, FakeKubelet(node.plugins) as kubelet:
        node.make_nodes(*(f"nvidia{minor}" for minor in range(LARGE_GPUS)))
        node.driver.gpus(LARGE_GPUS)
        with node.daemon("-metrics-address", "127.0.0.1:0", "-sample-interval", INTERVAL) as daemon:
            for number, share in enumerate(kubelet.wait_devices(LARGE_GPUS * SHARES)):
                pods.assign("team", f"inference-server-{number}", "main", [share])
            pods.wait_heeded()
            page = metrics_page(daemon)
            scrape(page)  # the first one loads prometheus_client
            return series(lambda: scrape(page), SCRAPES)


def metrics_page(daemon: DaemonProcess) -> str:
    """Where the daemon's metrics are."""
    return daemon.wait_log("metrics and probes are served on ").text.partition(" served on ")[2] + "/metrics"


def scrape(page: str) -> float:
    headers = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}
    started = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(page, headers=headers)) as answer:
        text = gzip.decompress(answer.read())
    took = 1000 * (time.perf_counter() - started)
    assert text.count(b"sgpu_container_shares{") == LARGE_GPUS * SHARES
    return took


def rows() -> Iterator[tuple[str, str, str]]:
    """The table's rows on this: figure, measured, aim."""
    small, large = measure(GPUS, SHARES), measure(LARGE_GPUS, LARGE_SHARES)
    size = f"{LARGE_GPUS} GPUs × {LARGE_SHARES} shares"
    yield (
        f"`GetPreferredAllocation` of {WANTED}, {size}, median / 99th percentile (ms)",
        f"{statistics.median(large.preferred):.1f} / {percentile(large.preferred, 0.99):.1f}",
        "10 (median)",
    )
    yield (
        "the same while pods come and go, median / worst (ms)",
        f"{statistics.median(large.preferred_in_churn):.1f} / {large.preferred_in_churn[-1]:.1f}",
        "",
    )
    yield (
        f"full list, {size}, median / worst (ms)",
        f"{statistics.median(large.lists):.1f} / {large.lists[-1]:.1f}",
        "50 (median)",
    )
    yield (
        f"resident memory, {GPUS} × {SHARES} shares → {size} (MB)",
        f"{small.resident / 1e6:.1f} → {large.resident / 1e6:.1f}",
        "10 more",
    )
    times = scrapes()
    yield (
        f"scrape of {LARGE_GPUS} GPUs and {LARGE_GPUS * SHARES} pods, median / worst (ms)",
        f"{statistics.median(times):.0f} / {times[-1]:.0f}",
        "100",
    )


if __name__ == "__main__":
    print_table(rows())
