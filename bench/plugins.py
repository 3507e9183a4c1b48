"""The plugins that are measured side by side, each on a node of its own: sgpu, a bare reference, and anyone's."""

from __future__ import annotations

import shlex
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import grpc
from daemon_process import LoggedProcess
from fake_kubelet import CHANNEL_OPTIONS, FakeKubelet
from fake_pod_resources import FakePodResources
from node import RESOURCE, Node, new_node
from stub_driver import StubGpu

from sgpu.driver.nvml import EventType

EVENTS: Final = EventType.XID_CRITICAL | EventType.DOUBLE_BIT_ECC | EventType.RECOVERY_ACTION
#: Seconds after which something that is measured is taken not to happen.
TIMEOUT: Final = 60.0


@attrs.frozen
class Size:
    """Of a node: so many GPUs of so many shares each."""

    gpus: int
    shares: int

    @property
    def devices(self) -> int:
        return self.gpus * self.shares

    def __str__(self) -> str:
        return f"{self.devices} shares"


@attrs.frozen
class Plugin:
    """One of those that are compared. What one can't do is not measured of it."""

    name: str
    resource: str
    start: Callable[[Node, Size], LoggedProcess]
    #: Whether it serves metrics.
    is_scraped: bool = False


@attrs.frozen
class Running:
    """A plugin at work."""

    plugin: Plugin
    size: Size
    node: Node
    kubelet: FakeKubelet
    pods: FakePodResources
    process: LoggedProcess

    @property
    def shares(self) -> list[str]:
        """The ids of all its devices."""
        return list(self.kubelet.devices(self.plugin.resource))

    def wait_listed(self) -> None:
        """Until the kubelet has all its devices."""
        self.kubelet.wait_devices(self.size.devices, TIMEOUT, resource=self.plugin.resource)

    def wait_unhealthy(self, gpus: int) -> float:
        """Until the shares of so many GPUs are unhealthy; returns when the kubelet was told."""
        self.kubelet.wait_for(
            lambda: (
                list(self.kubelet.devices(self.plugin.resource).values()).count("Unhealthy") == gpus * self.size.shares
            ),
            TIMEOUT,
            f"{gpus} GPUs down",
        )
        return self.kubelet.lists[self.plugin.resource][-1].time

    def hears_events(self) -> bool:
        """Return whether it waits for the stub driver's."""
        return self.node.driver.calls("nvmlEventSetWait") > 0

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A connection to it beside the kubelet's own."""
        path = self.kubelet.directory / self.kubelet.registrations[-1].request.endpoint
        with grpc.insecure_channel(f"unix:{path}", options=CHANNEL_OPTIONS) as channel:
            yield channel

    def scrape(self, page: str = "/metrics") -> bytes:
        """One page, as Prometheus asks for it."""
        url = next(word for word in self.process.wait_log("http://").text.split() if word.startswith("http://"))
        headers = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}
        with urllib.request.urlopen(urllib.request.Request(url + page, headers=headers)) as answer:
            text: bytes = answer.read()
        return text


@contextmanager
def running(plugin: Plugin, size: Size) -> Iterator[Running]:
    """The plugin on a new node of that size, with a driver, a kubelet and its PodResources; just started."""
    with new_node() as node, FakePodResources(node.pods) as pods, FakeKubelet(node.plugins) as kubelet:
        node.make_nodes(*(f"nvidia{minor}" for minor in range(size.gpus)))
        node.driver.set(gpus=[StubGpu(number, event_types=EVENTS, recovery_action=0) for number in range(size.gpus)])
        with plugin.start(node, size) as process:
            yield Running(plugin, size, node, kubelet, pods, process)


def sgpu(sample_interval: float = 5) -> Plugin:
    """With everything switched on, at the intervals of the defaults."""

    def start(node: Node, size: Size) -> LoggedProcess:
        served = ("-metrics-address", "127.0.0.1:0", "-status-socket", str(node.state.with_name("status.sock")))
        intervals = ("-health-interval", 5, "-sample-interval", sample_interval)
        return node.daemon("-gpu-duplication-factor", size.shares, *intervals, *served)

    return Plugin("sgpu", RESOURCE, start, is_scraped=True)


def _reference(node: Node, size: Size) -> LoggedProcess:
    script = str(Path(__file__).with_name("reference.py"))
    return LoggedProcess([sys.executable, script, str(node.plugins), REFERENCE, str(size.gpus), str(size.shares)])


REFERENCE: Final = "example.com/reference"
BARE: Final = Plugin("grpcio", REFERENCE, _reference)


def other(command: str, resource: str, name: str = "other", environment: Mapping[str, str] | None = None) -> Plugin:
    """A plugin by its command line, with `{plugins}` for the kubelet's directory and `{host}` for one that has the
    driver's library in `lib64`; `{dev}`, `{gpus}` and `{shares}` are known as well.
    """

    def start(node: Node, size: Size) -> LoggedProcess:
        places = {"plugins": node.plugins, "host": node.host, "dev": node.dev, **attrs.asdict(size)}
        library = {"LD_LIBRARY_PATH": str(node.driver.path.parent), **(environment or {})}
        return LoggedProcess([word.format(**places) for word in shlex.split(command)], env=library)

    return Plugin(name, resource, start)
