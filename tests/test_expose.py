"""Where the daemon can be looked at, on real sockets: who is answered, and what happens when a place is taken."""

from __future__ import annotations

import gzip
import logging
import socket
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import h11
import pytest
import trio
import trio.testing
from daemon_process import short_directory

from sgpu import expose, rpc
from sgpu.catalog import Catalog
from sgpu.expose import expose_metrics, expose_status
from sgpu.inventory import Inventory
from sgpu.metrics import Page
from sgpu.observer import Observer
from sgpu.policy import Policy
from sgpu.record import GRACE, Record
from sgpu.simulation import simulated_devices
from sgpu.snapshot import decode
from sgpu.usage import Usage

#: Seconds after which something is taken to hang.
TIMEOUT = 10.0


def observer() -> Observer:
    """Of a node with two simulated GPUs."""
    devices = simulated_devices(2, 4)
    catalog = Catalog(Policy("example.com/gpu", 4))
    catalog.replace(devices)
    return Observer(Inventory(devices), catalog, Usage(5.0), Record(trio.current_time), monitor=None)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expose, "FIRST_RETRY", 0.01)
    monkeypatch.setattr(expose, "LAST_RETRY", 0.01)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(TIMEOUT):
            await main()

    trio.run(bounded)


@attrs.frozen
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


async def get(stream: trio.abc.Stream, path: str, **headers: str) -> Answer:
    """Ask with another implementation's words: h11's client side."""
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
async def running(function: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function)
        yield
        nursery.cancel_scope.cancel()


async def wait_until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # nobody tells
        await trio.sleep(0.002)


@pytest.fixture
def port(caplog: pytest.LogCaptureFixture) -> Callable[[], Awaitable[int]]:
    """The port of 127.0.0.1 that metrics are served on, once they are."""
    caplog.set_level(logging.INFO, "sgpu")

    async def find() -> int:
        words = "metrics and probes are served on http://127.0.0.1:"
        while True:
            for record in caplog.records:
                if record.getMessage().startswith(words):
                    return int(record.getMessage().removeprefix(words))
            await trio.sleep(0.002)

    return find


Port = Callable[[], Awaitable[int]]
LOCAL = "127.0.0.1:0"


class TestMetrics:
    @pytest.mark.parametrize(
        ("path", "status", "words"),
        [
            ("/", 200, "/metrics  for Prometheus"),
            ("/metrics", 200, "# TYPE sgpu_gpu_healthy gauge"),
            ("/healthz", 200, "ok"),
            ("/readyz", 503, "example.com/gpu is not registered with the kubelet"),
            ("/status", 404, "there is no '/status' here, but /, /healthz, /metrics, /readyz"),
        ],
    )
    def test_pages(self, port: Port, path: str, status: int, words: str) -> None:
        """What Prometheus, the kubelet and the curious ask for; not what is for root only."""

        async def main() -> None:
            async with (
                running(partial(expose_metrics, LOCAL, observer())),
                await trio.open_tcp_stream("127.0.0.1", await port()) as stream,
            ):
                for _ in range(2):
                    answer = await get(stream, path)
                    assert answer.status == status
                    assert words in answer.body.decode()

        run(main)

    def test_probes(self, port: Port) -> None:
        """They follow what they are about."""
        known = observer()

        async def main() -> None:
            async with (
                running(partial(expose_metrics, LOCAL, known)),
                await trio.open_tcp_stream("127.0.0.1", await port()) as stream,
            ):
                with known.record.session("example.com/gpu") as registration:
                    known.record.attempted("example.com/gpu", "kubelet", success=True)
                    registration.streams += 1
                    assert (await get(stream, "/readyz")).status == 200
                assert (await get(stream, "/readyz")).status == 503
                known.record.expect("sampler", -10 * GRACE)
                answer = await get(stream, "/healthz")
                assert (answer.status, answer.body[:8]) == (503, b"sampler:")
                known.record.rest("sampler")
                assert (await get(stream, "/healthz")).status == 200

        run(main)

    def test_formats(self, port: Port) -> None:
        """As the scraper asks."""

        async def main() -> None:
            async with (
                running(partial(expose_metrics, LOCAL, observer())),
                await trio.open_tcp_stream("127.0.0.1", await port()) as stream,
            ):
                accept = "application/openmetrics-text;version=1.0.0"
                answer = await get(stream, "/metrics", Accept=accept, Accept_Encoding="gzip")
                assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
                assert answer.headers["content-encoding"] == "gzip"
                assert answer.headers["vary"] == "Accept, Accept-Encoding"
                assert gzip.decompress(answer.body).endswith(b"# EOF\n")

        run(main)

    def test_scraping_keeps_nobody_waiting(self, port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
        """Other pages are answered while one is made, and only one is made at a time."""
        making, go = threading.Semaphore(0), threading.Semaphore(0)

        def make(*_: object) -> Page:
            making.release()
            assert go.acquire(timeout=TIMEOUT)
            return Page(b"made", "text/plain", "")

        monkeypatch.setattr(expose, "_page", make)

        async def ask(path: str) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", await port()) as stream:
                assert (await get(stream, path)).status == 200

        async def main() -> None:
            async with running(partial(expose_metrics, LOCAL, observer())), trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(ask, "/metrics")
                await trio.to_thread.run_sync(making.acquire)
                await ask("/healthz")
                assert not making.acquire(blocking=False)
                go.release(3)

        run(main)

    def test_a_taken_port(self, port: Port, caplog: pytest.LogCaptureFixture) -> None:
        """It is said once, with what to do, and had as soon as it is free."""

        async def main() -> None:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                address = f"127.0.0.1:{taken.getsockname()[1]}"
                async with running(partial(expose_metrics, address, observer())):
                    await wait_until(lambda: caplog.records)
                    await trio.sleep(0.1)
                    taken.close()
                    assert f"127.0.0.1:{await port()}" == address

        run(main)
        (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
        assert warning.startswith("can't listen on 127.0.0.1:")
        assert "Address already in use; stop what has it, or choose another -metrics-address" in warning

    def test_an_address_that_is_not_here(self, caplog: pytest.LogCaptureFixture) -> None:
        """Tried again, too: interfaces come late, sometimes."""
        address = "192.0.2.1:2112"

        async def main() -> None:
            async with running(partial(expose_metrics, address, observer())):
                await wait_until(lambda: caplog.records)

        run(main)
        assert f"can't listen on {address}, and tries again" in caplog.text

    def test_all_interfaces(self, caplog: pytest.LogCaptureFixture) -> None:
        """Without a host, of IPv4 and, where there is any, of IPv6; the log says which."""
        caplog.set_level(logging.INFO, "sgpu")

        async def main() -> None:
            async with running(partial(expose_metrics, ":0", observer())):
                await wait_until(lambda: caplog.records)

        run(main)
        assert "served on http://0.0.0.0:" in caplog.text
        assert ("http://[::]:" in caplog.text) is socket.has_dualstack_ipv6()


class TestStatus:
    def test_what_it_says(self, directory: Path) -> None:
        """The snapshot, on a socket for its owner alone, in a directory that need not be there; gone at the end."""
        path = directory / "run" / "status.sock"

        async def main() -> None:
            async with running(partial(expose_status, path, observer())):
                await wait_until(path.exists)
                await wait_until(lambda: stat.S_IMODE(path.stat().st_mode) == 0o600)
                async with await trio.open_unix_socket(str(path)) as stream:
                    answer = await get(stream, "/status")
                assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
                assert [gpu.name for gpu in decode(answer.body).gpus] == ["simulated GPU 0", "simulated GPU 1"]

        run(main)
        assert not path.exists()

    def test_a_live_one_keeps_its_socket(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It is said once who has it, and had when that one is gone."""
        path = directory / "status.sock"
        caplog.set_level(logging.INFO, "sgpu")

        def said(words: str) -> int:
            return sum(words in record.getMessage() for record in caplog.records)

        async def main() -> None:
            with rpc.listen(path):
                before = rpc.identity(path)
                async with running(partial(expose_status, path, observer())):
                    await wait_until(lambda: said("already listens on"))
                    await trio.sleep(0.1)
                    assert rpc.identity(path) == before
            async with running(partial(expose_status, path, observer())):
                await wait_until(lambda: said("status is told on"))

        run(main)
        assert said("already listens on") == 1
        assert said("-status-socket") == 1

    def test_a_stale_one_is_replaced(self, directory: Path) -> None:
        """Left by a daemon that was killed."""
        path = directory / "status.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))

        async def main() -> None:
            async with running(partial(expose_status, path, observer())):
                await trio.testing.wait_all_tasks_blocked(0.05)
                async with await trio.open_unix_socket(str(path)) as stream:
                    assert (await get(stream, "/status")).status == 200

        run(main)

    def test_where_it_can_t_be(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A file in its way, until it is not."""
        path = directory / "run" / "status.sock"
        path.parent.touch()

        async def main() -> None:
            async with running(partial(expose_status, path, observer())):
                await wait_until(lambda: caplog.records)
                path.parent.unlink()
                await wait_until(path.exists)

        run(main)
        (record,) = caplog.records
        assert f"can't listen on {path}, and tries again" in record.getMessage()
