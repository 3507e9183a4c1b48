"""The daemon's HTTP endpoints, on real sockets: what they answer, and what happens when an address is taken."""

from __future__ import annotations

import functools
import gzip
import logging
import re
import socket
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import attrs
import h11
import pytest
import trio
from daemon_process import short_directory
from virtual_clock import real, until, virtual

from sgpu import rpc
from sgpu.driver.simulated import simulated_gpus
from sgpu.node.container import StaleAnswer
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState
from sgpu.observe import endpoints
from sgpu.observe.client import OrderRefusedError, send
from sgpu.observe.cordons import Cordons
from sgpu.observe.counters import Counters
from sgpu.observe.endpoints import FIRST_RETRY, LAST_RETRY, SWITCH_INTERVAL, serve_status
from sgpu.observe.metrics import Page
from sgpu.observe.observer import Observer
from sgpu.observe.orders import Done, Order
from sgpu.observe.registrations import Registrations
from sgpu.observe.snapshot import decode
from sgpu.observe.watchdog import GRACE, Watchdog

#: Seconds after which something is taken to hang.
TIMEOUT = 10.0
RESOURCE = "example.com/gpu"


@pytest.fixture
def observer() -> Observer:
    """Of a node with two simulated GPUs."""
    node = NodeState(Policy(RESOURCE, 4), 5.0)
    node.set_gpus(simulated_gpus(2))
    counters = Counters()
    return Observer(node, Registrations(counters), counters, Watchdog(), monitor=None)


def in_place() -> trio.Event:
    """No other daemon serves."""
    event = trio.Event()
    event.set()
    return event


@pytest.fixture
def path() -> Iterator[Path]:
    """Where the status socket goes, in a directory that is not there yet."""
    with short_directory() as directory:
        yield directory / "run" / "status.sock"


Log = Callable[[], list[str]]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Log:
    """Gives the warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def urls(caplog: pytest.LogCaptureFixture) -> Log:
    """Gives the URLs that were logged so far."""
    caplog.set_level(logging.INFO, "sgpu")
    return lambda: re.findall(r"http://[^ ,]+:\d+", caplog.text)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_RETRY", 0.01)
    monkeypatch.setattr(endpoints, "LAST_RETRY", 0.01)


@attrs.frozen
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


async def get(stream: trio.abc.Stream, path: str, **headers: str) -> Answer:
    """Fetch a page with another implementation: h11's client side."""
    client = h11.Connection(h11.CLIENT)
    fields = [("Host", "x"), *((name.replace("_", "-"), value) for name, value in headers.items())]
    await stream.send_all(client.send(h11.Request(method="GET", target=path, headers=fields)) or b"")
    body, response = b"", None
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            client.receive_data(bytes(await stream.receive_some()))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            body += event.data
    assert response is not None
    return Answer(response.status_code, {k.decode(): v.decode() for k, v in response.headers}, body)


@asynccontextmanager
async def running(
    observer: Observer,
    metrics_address: str,
    status_socket: Path | str,
    place: trio.Event | None = None,
    page: bool = True,
    cordons: Cordons | None = None,
) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        addresses = (metrics_address, str(status_socket))
        event = in_place() if place is None else place
        cordons = cordons or Cordons(observer.node, None, "")
        nursery.start_soon(functools.partial(endpoints.run, observer, *addresses, event, cordons, page=page))
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(observer: Observer, urls: Log, *, page: bool = True) -> AsyncIterator[trio.SocketStream]:
    """Metrics are served, and there is a connection to them."""
    before = len(urls())
    async with running(observer, "127.0.0.1:0", "", page=page):
        await until(lambda: len(urls()) > before)
        async with await trio.open_tcp_stream("127.0.0.1", int(urls()[-1].rpartition(":")[2])) as stream:
            yield stream


class TestMetrics:
    @pytest.mark.parametrize(
        ("path", "status", "fact"),
        [
            ("/", 200, "simulated GPU 1"),
            ("/metrics", 200, "# TYPE sgpu_gpu_healthy gauge"),
            ("/healthz", 200, "ok"),
            ("/readyz", 503, RESOURCE),
            ("/status", 200, '"stale_answers": null'),
            ("/state", 404, "/, /healthz, /metrics, /readyz, /status"),
        ],
    )
    @real
    async def test_pages(self, observer: Observer, urls: Log, warnings: Log, path: str, status: int, fact: str) -> None:
        """Answer Prometheus, the kubelet, `kubectl sgpu` and browsers, but not what is for root only."""
        observer.node.usage.set_holders({})
        observer.node.usage.stale_answers = (StaleAnswer("team/web", ("/dev/nvidia0",), ("/dev/nvidia1",)),)
        async with connected(observer, urls) as stream:
            answer = await get(stream, path)
        assert answer.status == status
        assert fact in answer.body.decode()
        assert b"/dev/nvidia" not in answer.body
        assert "content-encoding" not in answer.headers
        assert warnings() == []  # of the status socket, which is left out

    @real
    async def test_page(self, observer: Observer, urls: Log) -> None:
        """Say in the query whether the page loads itself again; let it load nothing.

        List the paths in its place where -metrics-page is false.
        """
        async with connected(observer, urls) as stream:
            answer, still = await get(stream, "/"), await get(stream, "/?refresh=off")
        assert b'http-equiv="refresh"' in answer.body
        assert b'http-equiv="refresh"' not in still.body
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
        async with connected(observer, urls, page=False) as stream:
            answer = await get(stream, "/")
        assert answer.headers["content-type"].startswith("text/plain")
        assert b"/metrics" in answer.body

    @real
    async def test_probes(self, observer: Observer, urls: Log) -> None:
        """Follow the registrations and the watchdog."""
        async with connected(observer, urls) as stream:
            with observer.registrations.session(RESOURCE) as registration:
                observer.registrations.attempted(RESOURCE, "kubelet", success=True)
                registration.streams += 1
                assert (await get(stream, "/readyz")).status == 200
            assert (await get(stream, "/readyz")).status == 503
            observer.watchdog.arm("pods", -10 * GRACE)
            answer = await get(stream, "/healthz")
            assert (answer.status, b"pods" in answer.body) == (503, True)
            observer.watchdog.disarm("pods")
            assert (await get(stream, "/healthz")).status == 200

    @real
    async def test_formats(self, observer: Observer, urls: Log) -> None:
        """Send the format and the encoding that the scraper asks for."""
        async with connected(observer, urls) as stream:
            accept = "application/openmetrics-text;version=1.0.0"
            answer = await get(stream, "/metrics", Accept=accept, Accept_Encoding="gzip")
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["vary"] == "Accept, Accept-Encoding"
        assert gzip.decompress(answer.body).endswith(b"# EOF\n")

    @real
    async def test_scraping_keeps_nobody_waiting(
        self, observer: Observer, urls: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Answer other pages while one is made in a thread, and make only one at a time."""
        making, go = threading.Semaphore(0), threading.Semaphore(0)

        def make(*_: object) -> Page:
            making.release()
            assert go.acquire(timeout=TIMEOUT)
            return Page(b"made", "text/plain", "")

        async def scrape(host: str, port: int) -> None:
            async with await trio.open_tcp_stream(host, port) as stream:
                assert (await get(stream, "/metrics")).status == 200

        monkeypatch.setattr(endpoints, "_metrics", make)
        async with connected(observer, urls) as stream, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(scrape, *stream.socket.getpeername())
            await trio.to_thread.run_sync(making.acquire)
            assert (await get(stream, "/healthz")).status == 200
            assert not making.acquire(blocking=False)
            assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
            go.release(3)

    @pytest.mark.usefixtures("_impatient")
    @real
    async def test_a_taken_port(self, observer: Observer, urls: Log, warnings: Log) -> None:
        """Log what has to be done, and serve as soon as the port is free."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            async with running(observer, address, ""):
                await until(warnings)
                taken.close()
                await until(urls)
        assert urls() == [f"http://{address}"]
        (warning,) = warnings()
        assert all(fact in warning for fact in (address, "Address already in use", "-metrics-address"))

    @real
    async def test_a_port_of_the_daemon_before(
        self, observer: Observer, urls: Log, warnings: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A standby serves at once when it is in place, as with hostNetwork."""
        monkeypatch.setattr(endpoints, "FIRST_RETRY", 2 * TIMEOUT)
        place = trio.Event()
        with socket.create_server(("127.0.0.1", 0)) as taken:
            async with running(observer, f"127.0.0.1:{taken.getsockname()[1]}", "", place):
                await until(warnings)
                taken.close()
                place.set()
                await until(urls)

    @real
    async def test_all_interfaces(self, observer: Observer, urls: Log) -> None:
        """Serve on all interfaces without a host, of IPv4 and, where there is any, of IPv6, and log on which."""
        async with running(observer, ":0", ""):
            await until(urls)
        hosts = {url.rpartition(":")[0] for url in urls()}
        assert hosts == {"http://0.0.0.0", *(["http://[::]"] if socket.has_dualstack_ipv6() else [])}


class TestStatus:
    @real
    async def test_snapshot(self, observer: Observer, urls: Log, path: Path) -> None:
        """Answer with the snapshot on a socket for its owner alone, in a new directory; remove it at the end."""
        async with running(observer, "", path):
            await until(path.exists)
            await until(lambda: stat.S_IMODE(path.stat().st_mode) == 0o600)
            async with await trio.open_unix_socket(str(path)) as stream:
                answer = await get(stream, "/status")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert [gpu.name for gpu in decode(answer.body).gpus] == ["simulated GPU 0", "simulated GPU 1"]
        assert rpc.identity(path) is None
        assert urls() == []  # of metrics, which are left out

    @pytest.mark.usefixtures("_impatient")
    @real
    async def test_another_daemon(self, observer: Observer, warnings: Log, path: Path) -> None:
        """Leave a socket alone on which another daemon listens, log it, and take it once that has ended."""
        path.parent.mkdir()
        async with running(observer, "", path):
            with rpc.listen(path):
                before = rpc.identity(path)
                await until(warnings)
                assert rpc.identity(path) == before
            await until(path.exists)
        (warning,) = warnings()
        assert str(path) in warning
        assert "-status-socket" in warning


@real
async def test_orders(observer: Observer, path: Path, urls: Log) -> None:
    """Take orders to cordon a GPU on the socket, refuse those that are bad or can't be carried out, and no others."""
    file = path.with_name("cordon.json")
    recorded = Cordons(observer.node, file, "boot")

    async def order(verb: str, order: Order) -> Done:
        return await trio.to_thread.run_sync(send, str(path), verb, order)

    async with running(observer, "127.0.0.1:0", path, cordons=recorded):
        await until(lambda: urls() and path.exists())
        assert (await order("cordon", Order("0", "bad row"))).uuid == observer.node.gpus[0].uuid
        assert observer.node.gpus[0].cordon
        for name, reason in (("7", ""), ("0", "two\nlines")):
            with pytest.raises(OrderRefusedError):
                await order("cordon", Order(name, reason))
        assert (await order("uncordon", Order("0"))).changed
        host, port = urls()[0].removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"POST /cordon HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert b" 404 " in await stream.receive_some()
    assert not observer.node.cordoned


class TestRetries:
    @virtual
    async def test_delays(self, observer: Observer, warnings: Log, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Try again less and less often, and log the same problem once."""
        attempts = []

        def fail(_: Path) -> None:
            attempts.append(trio.current_time())
            raise OSError("read-only file system")

        monkeypatch.setattr(endpoints, "make_private_directory", fail)
        with trio.move_on_after(200):
            await serve_status(path, observer, in_place(), Cordons(observer.node, None, ""))
        delays = [later - time for time, later in pairwise(attempts)]
        assert delays[:3] == pytest.approx([FIRST_RETRY, 2 * FIRST_RETRY, 4 * FIRST_RETRY])
        assert delays[-2:] == pytest.approx([LAST_RETRY] * 2)
        (warning,) = warnings()
        assert str(path) in warning
        assert "read-only file system" in warning

    @virtual
    async def test_anew(self, observer: Observer, warnings: Log, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start anew after it listened: with the shortest delay, and with a line in the log for the same problem."""
        served = []

        async def lose(*_: object) -> None:
            served.append(trio.current_time())
            raise OSError("the listener is lost")

        monkeypatch.setattr(endpoints, "serve", lose)
        with trio.move_on_after(5):
            await serve_status(path, observer, in_place(), Cordons(observer.node, None, ""))
        assert len(served) > 5
        assert all(later - time == pytest.approx(FIRST_RETRY) for time, later in pairwise(served))
        assert len(warnings()) == len(served)
