"""Measure the daemon as an operator pays for it, and print a table: `tox -e figures`.

The real process, the stub driver with 8 GPUs of 100 shares, and the tests' kubelet on grpcio. Times are wall-clock
and taken on the kubelet's side, so they include its own work (grpcio's part of an Allocate is about 0.3 ms).
"""

from __future__ import annotations

import statistics
import time
import urllib.request
from typing import Final

from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from node import RESOURCE, Node, new_node
from scale import GPUS, SHARES, metrics_page, percentile, print_table, rows, series

STARTS: Final = 7
RESTARTS: Final = 20
ALLOCATIONS: Final = 2000
#: Seconds after which trio has let go of its idle threads, whose time the kernel then no longer shows.
SETTLE: Final = 12
#: Seconds to watch an idle daemon for.
REST: Final = 20


def start_to_listed(node: Node) -> float:
    """Milliseconds from starting the process to the kubelet having all devices."""
    with FakeKubelet(node.plugins) as kubelet, node.daemon() as daemon:
        kubelet.wait_devices(GPUS * SHARES)
        return 1000 * (kubelet.lists[RESOURCE][0].time - daemon.started)


def restart_to_listed(kubelet: FakeKubelet) -> float:
    """Milliseconds from `kubelet.sock` being there again to the kubelet having all devices again."""
    time.sleep(0.2)  # a restart right after a registration waits for grpcio, not for us
    before = len(kubelet.lists[RESOURCE])
    kubelet.restart()
    kubelet.wait_for(lambda: len(kubelet.lists[RESOURCE]) > before)
    kubelet.wait_devices(GPUS * SHARES)
    return 1000 * (kubelet.lists[RESOURCE][-1].time - kubelet.bound)


def allocate(kubelet: FakeKubelet, share: str) -> float:
    """Milliseconds of one Allocate, as the kubelet waits for it."""
    started = time.perf_counter()
    kubelet.allocate([share])
    return 1000 * (time.perf_counter() - started)


def processor_a_minute(daemon: DaemonProcess) -> float:
    """Milliseconds of processor time that an idle minute costs the daemon.

    Its driver process is left out: the stub library spins where NVIDIA's sleeps.
    """
    time.sleep(SETTLE)
    before = daemon.cpu_seconds()
    time.sleep(REST)
    return 1000 * (daemon.cpu_seconds() - before) * 60 / REST


def main() -> None:
    with new_node() as node:
        node.driver.gpus(GPUS)
        starts = series(lambda: start_to_listed(node), STARTS)
        exposed = ("-metrics-address", "127.0.0.1:0", "-status-socket", node.state.with_suffix(".sock"))
        with FakeKubelet(node.plugins) as kubelet, node.daemon("-health-interval", 5, *map(str, exposed)) as daemon:
            share = next(iter(kubelet.wait_devices(GPUS * SHARES)))
            restarts = series(lambda: restart_to_listed(kubelet), RESTARTS)
            allocations = series(lambda: allocate(kubelet, share), ALLOCATIONS)
            with urllib.request.urlopen(metrics_page(daemon)) as scraped:  # from then on it costs what it costs
                assert scraped.status == 200
            processor = processor_a_minute(daemon)
            resident, proportional = daemon.rss_bytes(), daemon.pss_bytes()
    print_table(
        (
            ("process start → devices listed, median (ms)", f"{statistics.median(starts):.0f}", ""),
            (
                "`kubelet.sock` created → listed again, median / worst (ms)",
                f"{statistics.median(restarts):.1f} / {restarts[-1]:.1f}",
                "20",
            ),
            (
                "`Allocate`, median / 99th percentile (ms)",
                f"{statistics.median(allocations):.2f} / {percentile(allocations, 0.99):.2f}",
                "",
            ),
            (
                f"memory at rest, {GPUS} GPUs × {SHARES} shares, scraped: daemon resident / both proportional (MB)",
                f"{resident / 1e6:.1f} / {proportional / 1e6:.1f}",
                "40 (resident)",
            ),
            ("the daemon's processor time at rest (ms a minute)", f"{processor:.0f}", "100"),
            *rows(),
        )
    )


if __name__ == "__main__":
    main()
