"""Where the daemon can be looked at: a port for Prometheus and the kubelet's probes, a unix socket for `status`.

Knows how an address is got hold of; not what a GPU is. Nothing here may disturb what the daemon is there for: an
address that can't be had is tried again, and pages are made in threads, from values that no longer change.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from sgpu import __version__, probes, rpc, snapshot
from sgpu.files import make_private_directory
from sgpu.logs import OnChange
from sgpu.observer import Observer
from sgpu.record import Record
from sgpu.retry import growing_delays
from sgpu.settings import split_address
from sgpu.snapshot import Snapshot
from sgpu.web import Request, Response, Routes, serve, text

if TYPE_CHECKING:
    from sgpu.metrics import Page

logger = logging.getLogger(__name__)

#: Seconds between attempts to listen, growing.
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 30.0
#: Seconds after which a thread that makes a page lets the event loop go on, where Python's default is 0.005: of 300
#: Allocates while 1600 pods were scraped without pause, the slowest took 8 to 11 ms in place of 20 to 32.
SWITCH_INTERVAL: Final = 0.0005
JSON: Final = "application/json"

Bind = Callable[[], AbstractAsyncContextManager[Sequence[trio.SocketListener]]]


async def expose_metrics(address: str, observer: Observer) -> NoReturn:
    """Serve metrics and probes on an address as `settings.split_address` has it."""
    host, port = split_address(address) or ("", 0)
    sys.setswitchinterval(SWITCH_INTERVAL)
    one_at_a_time = trio.CapacityLimiter(1)  # or a burst of scrapes would take the processor from the kubelet's calls

    async def metrics(request: Request) -> Response:
        accept, encoding = (request.headers.get(name, "") for name in ("accept", "accept-encoding"))
        async with one_at_a_time:
            page = await trio.to_thread.run_sync(_page, observer.snapshot(), observer.record.copy(), accept, encoding)
        headers = {"Content-Encoding": page.encoding} if page.encoding else {}
        return Response(200, page.text, page.content_type, {**headers, "Vary": "Accept, Accept-Encoding"})

    async def healthz(_: Request) -> Response:
        return _probed(probes.ailing(observer.record.overdue()))

    async def readyz(_: Request) -> Response:
        return _probed(probes.unready(observer.snapshot()))

    async def index(_: Request) -> Response:
        return text(200, f"sgpu {__version__}\n\n/metrics  for Prometheus\n/healthz  alive?\n/readyz   ready?")

    routes: Routes = {"/": index, "/metrics": metrics, "/healthz": healthz, "/readyz": readyz}
    remedy = "stop what has it, or choose another -metrics-address; without it, the kubelet's probes fail"
    await _keep_served(address, partial(_tcp, host, port), routes, remedy)


def _page(snapshot: Snapshot, record: Record, accept: str, accept_encoding: str) -> Page:
    from sgpu import metrics  # here, in a thread: only who is scraped pays for it

    return metrics.page(snapshot, record, accept, accept_encoding)


def _probed(trouble: str) -> Response:
    return text(503, trouble) if trouble else text(200, "ok")


async def expose_status(path: Path, observer: Observer) -> NoReturn:
    """Answer `status` on a socket that only its owner can connect to."""

    async def status(_: Request) -> Response:
        return Response(200, await trio.to_thread.run_sync(snapshot.encode, observer.snapshot()), JSON)

    remedy = "`sgpu status` has no answer until then; -status-socket says where, -status-socket= that it is not wanted"
    await _keep_served(str(path), partial(_unix, path), {"/status": status}, remedy)


async def _keep_served(where: str, bind: Bind, routes: Routes, remedy: str) -> NoReturn:
    trouble = OnChange(logger, logging.WARNING)
    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
    while True:
        try:
            async with bind() as listeners:
                await serve(listeners, routes)
        except (OSError, rpc.AddressInUseError) as error:
            trouble.report(f"can't listen on {where}, and tries again: {error}; {remedy}")
        await trio.sleep(next(delays))


@asynccontextmanager
async def _tcp(host: str, port: int) -> AsyncIterator[Sequence[trio.SocketListener]]:
    listeners = await trio.open_tcp_listeners(port, host=host or None)  # all interfaces, of IPv4 and IPv6
    addresses = [listener.socket.getsockname() for listener in listeners]
    words = ", ".join(f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port, *_ in addresses)
    logger.info("metrics and probes are served on %s", words)
    yield listeners


@asynccontextmanager
async def _unix(path: Path) -> AsyncIterator[Sequence[trio.SocketListener]]:
    make_private_directory(path.parent)
    with rpc.listen(path) as listener:
        logger.info("status is told on %s", path)
        yield [listener]
