"""What one sees of the real daemon from outside: its pages asked for with the standard library's HTTP client.

A stub driver is below it, a kubelet and its PodResources above it.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources, wait_until
from node import RESOURCE, Node
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from stub_driver import GIB

pytestmark = pytest.mark.soak

SHARES = 4
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


class StatusConnection(http.client.HTTPConnection):
    """To a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


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

    def status(self) -> Any:  # noqa: ANN401  # JSON
        with closing(StatusConnection(self.status_socket)) as connection:
            connection.request("GET", "/status")
            return json.load(connection.getresponse())

    def wait_series(self, name: str, value: float | None) -> None:
        """Until a series has this value, or is not there (None)."""
        wait_until(lambda: self.series().get(name) == value, f"{name} is {value}")

    def wait_page(self, path: str, status: int, words: str) -> None:
        def there() -> bool:
            seen, text = self.get(path)
            return seen == status and words in text

        wait_until(there, f"{path} says {status}: {words}")


@contextmanager
def seen(node: Node, *flags: str | float) -> Iterator[Seen]:
    """The daemon, on any free port."""
    path = node.state.parent / "status.sock"
    addresses = ("-metrics-address", "127.0.0.1:0", "-status-socket", path)
    often = ("-gpu-duplication-factor", SHARES, "-sample-interval", 0.2)
    with node.daemon(*map(str, addresses), *often, *flags) as daemon:
        line = daemon.wait_log("metrics and probes are served on ").text
        daemon.wait_log("status is told on")
        yield Seen(daemon, line.partition(" served on ")[2], path)


def test_from_start_to_end(node: Node) -> None:
    """Alive all the time; ready when the kubelet has a GPU to give away; and the word why as long as it has not."""
    library = node.driver
    (gpu,) = library.gpus(1)
    library.set(gpus=[])
    with seen(node) as daemon:
        assert daemon.get("/healthz") == (200, "ok\n")
        daemon.wait_page("/readyz", 503, "waiting for the driver: ")
        library.set(gpus=[gpu])
        daemon.wait_page("/readyz", 503, f"{RESOURCE} is not registered with the kubelet")
        with FakeKubelet(node.plugins) as kubelet:
            kubelet.wait_devices(SHARES)
            daemon.wait_page("/readyz", 200, "ok")
            assert daemon.series()[f"sgpu_registered{{resource={RESOURCE}}}"] == 1
        daemon.wait_page("/readyz", 503, RESOURCE)
        assert daemon.get("/healthz") == (200, "ok\n")
        daemon.daemon.terminate()
    assert not daemon.status_socket.exists()


def test_what_the_kubelet_did(node: Node) -> None:
    """Calls by method and status, registrations, and its restarts."""
    with FakeKubelet(node.plugins) as kubelet, seen(node) as daemon:
        share = next(iter(kubelet.wait_devices(SHARES)))
        for _ in range(3):
            kubelet.allocate([share])
        series = daemon.series()
        assert series["sgpu_rpc_duration_seconds_count{code=OK,method=Allocate}"] == 3
        assert 0 < series["sgpu_rpc_duration_seconds_sum{code=OK,method=Allocate}"] < 3
        assert series[f"sgpu_registrations_total{{resource={RESOURCE},result=success}}"] == 1
        assert series["sgpu_kubelet_restarts_total{}"] == 0
        for restarts in (1, 2):
            kubelet.restart()
            kubelet.wait_registrations(1 + restarts)
            daemon.wait_series("sgpu_kubelet_restarts_total{}", restarts)
        daemon.wait_series(f"sgpu_registrations_total{{resource={RESOURCE},result=success}}", 3)


def test_who_uses_which_gpu(node: Node) -> None:
    """Pods are there as long as they have shares; the GPU's figures are the driver's."""
    (gpu,) = node.driver.gpus(1)
    node.driver.change(gpu, used=4 * GIB - gpu.reserved, utilisation=30)
    web = f"sgpu_container_shares{{container=main,namespace=team,pod=web,uuid={gpu.uuid}}}"
    with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods) as pods, seen(node) as daemon:
        kubelet.wait_devices(SHARES)
        pods.assign("team", "web", "main", [f"{gpu.uuid}::0", f"{gpu.uuid}::1"])
        daemon.wait_series(web, 2)
        series = daemon.series()
        assert series[f"sgpu_gpu_memory_used_bytes{{uuid={gpu.uuid}}}"] == 4 * GIB
        assert series[f"sgpu_gpu_utilization_ratio{{uuid={gpu.uuid}}}"] == 0.3
        assert series[f"sgpu_gpu_shares_allocated{{uuid={gpu.uuid}}}"] == 2
        status = daemon.status()
        assert [use["pod"] for use in status["gpus"][0]["containers"]] == ["web"]
        assert status["resources"] == [{"name": RESOURCE, "registered": True, "streams": 1}]
        pods.release("web", "team")
        daemon.wait_series(web, None)


def test_a_gpu_that_goes_down(node: Node) -> None:
    """Its reason is there for as long as it is down, and the log has the pods that it takes with it."""
    (gpu,) = node.driver.gpus(1)
    with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods) as pods, seen(node) as daemon:
        kubelet.wait_devices(SHARES)
        pods.assign("team", "web", "main", [f"{gpu.uuid}::0"])
        pods.assign("team", "train", "main", [f"{gpu.uuid}::1"])
        daemon.wait_series(f"sgpu_gpu_shares_allocated{{uuid={gpu.uuid}}}", 2)
        node.driver.change(gpu, rows_pending=1)
        daemon.wait_series(f"sgpu_gpu_healthy{{uuid={gpu.uuid}}}", 0)
        assert any(name.startswith("sgpu_gpu_unhealthy_info{reason=") for name in daemon.series())
        daemon.daemon.wait_log(f"GPU {gpu.uuid}, which is down, is used by team/train, team/web")
        node.driver.change(gpu, rows_pending=0)
        daemon.wait_series(f"sgpu_gpu_healthy{{uuid={gpu.uuid}}}", 1)
        assert not any(name.startswith("sgpu_gpu_unhealthy_info") for name in daemon.series())
        assert daemon.daemon.logs.count("is used by") == 1


def test_settings_read_again(node: Node) -> None:
    """By whether they could be used."""
    with FakeKubelet(node.plugins), seen(node) as daemon:
        daemon.wait_page("/readyz", 200, "ok")
        assert daemon.series()["sgpu_config_reloads_total{result=success}"] == 0
        daemon.daemon.signal(signal.SIGHUP)
        daemon.wait_series("sgpu_config_reloads_total{result=success}", 1)


def test_a_taken_port_is_no_trouble_for_the_kubelet(node: Node) -> None:
    """The node's shares are offered all the same."""
    with socket.create_server(("127.0.0.1", 0)) as taken, FakeKubelet(node.plugins) as kubelet:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with node.daemon("-metrics-address", address) as daemon:
            kubelet.wait_devices(100)
            daemon.wait_log(f"can't listen on {address}")
            daemon.terminate()


def test_neither_is_wanted(node: Node) -> None:
    """Then nothing of it is loaded."""
    with FakeKubelet(node.plugins) as kubelet, node.daemon() as daemon:
        kubelet.wait_devices(100)
        assert "served" not in daemon.logs
        assert "status is told" not in daemon.logs
