"""The real daemon from outside: its pages, and what reaches them from end to end.

A stub driver is below it, a kubelet and its PodResources above it.
"""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from containers import containers
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import RESOURCE, Node
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from stub_driver import GIB
from watching import wait_until

from sgpu.node.container import Container
from sgpu.observe.client import fetch

pytestmark = pytest.mark.soak

SHARES = 4
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


@attrs.frozen
class Seen:
    """A daemon that is looked at."""

    daemon: DaemonProcess
    url: str
    status_socket: Path

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and text of a page."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def series(self) -> dict[str, float]:
        """Values by name and labels as people write them."""
        status, text = self.get("/metrics", Accept=OPENMETRICS)
        assert status == 200
        families: Any = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        return {
            f"{sample.name}{{{','.join(f'{key}={sample.labels[key]}' for key in sorted(sample.labels))}}}": sample.value
            for family in families
            for sample in family.samples
        }

    def wait_series(self, name: str, value: float | None) -> None:
        """Until a series has this value, or is not there (None)."""
        wait_until(lambda: self.series().get(name) == value, f"{name} is {value}")

    def wait_page(self, path: str, status: int, fact: str) -> None:
        def there() -> bool:
            seen, text = self.get(path)
            return seen == status and fact in text

        wait_until(there, f"{path} says {status}: {fact}")


@contextmanager
def seen(node: Node, *flags: str | float) -> Iterator[Seen]:
    """The daemon, on any free port."""
    path = node.state.parent / "status.sock"
    addresses = ("-metrics-address", "127.0.0.1:0", "-status-socket", str(path))
    often = ("-gpu-duplication-factor", SHARES, "-sample-interval", 0.2)
    with node.daemon(*addresses, *often, *flags) as daemon:
        line = daemon.wait_log("http://127.0.0.1:").text
        daemon.wait_log(str(path))
        yield Seen(daemon, line[line.index("http://") :], path)


def test_probes(node: Node) -> None:
    """Be alive all the time, and ready when the kubelet has a GPU to hand out; say why as long as it has not."""
    library = node.driver
    (gpu,) = library.gpus(1)
    library.set(gpus=[])
    with seen(node) as daemon:
        assert daemon.get("/healthz")[0] == 200
        daemon.wait_page("/readyz", 503, "driver")
        library.set(gpus=[gpu])
        daemon.wait_page("/readyz", 503, RESOURCE)
        with FakeKubelet(node.plugins) as kubelet:
            kubelet.wait_devices(SHARES)
            daemon.wait_page("/readyz", 200, "")
            assert daemon.series()[f"sgpu_registered{{resource={RESOURCE}}}"] == 1
        daemon.wait_page("/readyz", 503, RESOURCE)
        assert daemon.get("/healthz")[0] == 200
        daemon.daemon.terminate()
    assert not daemon.status_socket.exists()


def test_counters(node: Node) -> None:
    """Count calls by method and status, registrations, restarts of the kubelet, and reads of the settings."""
    with FakeKubelet(node.plugins) as kubelet, seen(node) as daemon:
        share = next(iter(kubelet.wait_devices(SHARES)))
        for _ in range(3):
            kubelet.allocate([share])
        daemon.wait_series("sgpu_rpc_duration_seconds_count{code=OK,method=Allocate}", 3)
        series = daemon.series()
        assert 0 < series["sgpu_rpc_duration_seconds_sum{code=OK,method=Allocate}"] < 3
        assert series[f"sgpu_registrations_total{{resource={RESOURCE},result=success}}"] == 1
        assert series["sgpu_kubelet_restarts_total{}"] == 0
        assert series["sgpu_config_reloads_total{result=success}"] == 0
        daemon.daemon.signal(signal.SIGHUP)
        daemon.wait_series("sgpu_config_reloads_total{result=success}", 1)
        for restarts in (1, 2):
            kubelet.restart()
            kubelet.wait_registrations(1 + restarts)
            daemon.wait_series("sgpu_kubelet_restarts_total{}", restarts)
        daemon.wait_series(f"sgpu_registrations_total{{resource={RESOURCE},result=success}}", 3)


def test_pods(node: Node) -> None:
    """Show pods as long as they have shares, the driver's figures, and a fault, whose log names the pods once."""
    (gpu,) = node.driver.gpus(1)
    gpu = node.driver.change(gpu, used=4 * GIB - gpu.reserved, utilization=30)
    web = f"sgpu_container_shares{{container=main,namespace=team,pod=web,uuid={gpu.uuid}}}"
    with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods) as pods, seen(node) as daemon:
        kubelet.wait_devices(SHARES)
        pods.assign("team", "web", "main", [f"{gpu.uuid}::0", f"{gpu.uuid}::1"])
        daemon.wait_series(web, 2)
        series = daemon.series()
        assert series[f"sgpu_gpu_memory_used_bytes{{uuid={gpu.uuid}}}"] == 4 * GIB
        assert series[f"sgpu_gpu_utilization_ratio{{uuid={gpu.uuid}}}"] == 0.3
        assert series[f"sgpu_gpu_shares_allocated{{uuid={gpu.uuid}}}"] == 2
        status = fetch(str(daemon.status_socket))
        assert [use.pod for use in status.gpus[0].containers] == ["web"]
        assert [(resource.name, resource.streams) for resource in status.resources] == [(RESOURCE, 1)]
        for pending in (1, 0):
            node.driver.change(gpu, rows_pending=pending)
            daemon.wait_series(f"sgpu_gpu_healthy{{uuid={gpu.uuid}}}", 1 - pending)
            reasons = [name for name in daemon.series() if name.startswith("sgpu_gpu_unhealthy_info{reason=")]
            assert len(reasons) == pending
        assert gpu.uuid in daemon.daemon.wait_log("team/web").text
        assert daemon.daemon.logs.count("team/web") == 1
        pods.release("web", "team")
        daemon.wait_series(web, None)


def test_memory_guard(node: Node) -> None:
    """Name the container that uses too much of a full GPU, then end its process; spare the one within its part."""
    (gpu,) = node.driver.gpus(1)
    big, small = Container("team", "big", "main"), Container("team", "small", "main")
    labels = f"container=main,namespace=team,pod=big,uuid={gpu.uuid}"
    guard = ("-memory-guard-tolerance", "1GiB", "-memory-guard-threshold", 0.8)
    with (
        FakeKubelet(node.plugins) as kubelet,
        FakePodResources(node.pods) as pods,
        containers(node.proc.parent) as host,
    ):
        children = {owner: host.start(owner) for owner in (big, small)}
        for number, owner in enumerate(children):
            pods.assign(owner.namespace, owner.pod, owner.container, [f"{gpu.uuid}::{number}"])
        memory = [(child.pid, size * GIB) for child, size in zip(children.values(), (9, 4), strict=True)]
        node.driver.change(gpu, used=13 * GIB, compute=tuple(memory))
        with seen(node, "-memory-guard", "warn", *guard) as daemon:
            kubelet.wait_devices(SHARES)
            daemon.wait_series(f"sgpu_guard_actions_total{{action=warn,{labels}}}", 1)
            uses = {use.pod: use.exceeded for use in fetch(str(daemon.status_socket)).gpus[0].containers}
            assert uses == {"big": (gpu.total - gpu.reserved) // SHARES, "small": None}
            assert children[big].poll() is None
        with seen(node, "-memory-guard", "terminate", *guard) as daemon:
            assert children[big].wait(30) == -signal.SIGTERM
            daemon.wait_series(f"sgpu_guard_actions_total{{action=terminate,{labels}}}", 1)
            node.driver.change(gpu, used=4 * GIB, compute=(memory[1],))
            daemon.daemon.wait_log("ended after SIGTERM")
            assert str(children[big].pid) in daemon.daemon.wait_log("sent SIGTERM").text
        assert children[small].poll() is None
