"""The daemon's HTTP endpoints: a port for Prometheus, probes, `kubectl sgpu` and browsers; a unix socket for `status`.

Nothing here may disturb the registrations: an address that can't be bound is tried again, and threads make the pages
from values that no longer change.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from sgpu import __version__, rpc
from sgpu.config.values import split_address
from sgpu.lib.files import make_private_directory
from sgpu.lib.limits import explain
from sgpu.lib.logs import OnChange
from sgpu.lib.retry import growing_delays
from sgpu.lib.threads import run_in_thread
from sgpu.observe import probes, snapshot
from sgpu.observe.cordons import CordonRefusedError, Cordons
from sgpu.observe.counters import Counters
from sgpu.observe.http import Request, Response, Routes, serve, text
from sgpu.observe.observer import Observer
from sgpu.observe.orders import BadOrderError, decode_order, encode
from sgpu.observe.snapshot import Snapshot

if TYPE_CHECKING:
    from sgpu.observe.metrics import Page, Pages

logger = logging.getLogger(__name__)

#: Seconds between attempts to listen, growing.
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 30.0
#: Seconds after which a thread that makes a page lets the event loop go on, where Python's default is 0.005: of 300
#: Allocates while 1600 pods were scraped without pause, the slowest took 8 to 11 ms in place of 20 to 32.
SWITCH_INTERVAL: Final = 0.0005
JSON: Final = "application/json"

Bind = Callable[[], AbstractAsyncContextManager[Sequence[trio.SocketListener]]]


async def run(
    observer: Observer,
    metrics_address: str,
    status_socket: str,
    in_place: trio.Event,
    cordons: Cordons,
    *,
    page: bool = True,
) -> None:
    """Serve both; an empty address or path is left out. `in_place`: no other daemon serves on this node any more.

    `page`: the address has a page for browsers. `cordons` takes the orders of `sgpu cordon`, on the socket alone.
    """
    async with trio.open_nursery() as nursery:
        if metrics_address:
            nursery.start_soon(serve_metrics, metrics_address, observer, in_place, page)
        if status_socket:
            nursery.start_soon(serve_status, Path(status_socket), observer, in_place, cordons)


async def serve_metrics(address: str, observer: Observer, in_place: trio.Event, page: bool) -> NoReturn:
    """Serve metrics, probes and the status on an address as `values.split_address` takes it, a standby's too."""
    host, port = split_address(address) or ("", 0)
    sys.setswitchinterval(SWITCH_INTERVAL)
    one_at_a_time = trio.CapacityLimiter(1)  # or a burst of scrapes would take the processor from the kubelet's calls
    pages = cache(_open_pages)

    async def metrics(request: Request) -> Response:
        accept, encoding = (request.headers.get(name, "") for name in ("accept", "accept-encoding"))
        async with one_at_a_time:
            now = (observer.snapshot(), observer.counters.copy())
            scraped = await run_in_thread(_metrics, pages, *now, accept, encoding)
        headers = {"Content-Encoding": scraped.encoding} if scraped.encoding else {}
        return Response(200, scraped.text, scraped.content_type, {**headers, "Vary": "Accept, Accept-Encoding"})

    async def status(_: Request) -> Response:
        async with one_at_a_time:
            return Response(200, await run_in_thread(snapshot.encode, snapshot.publish(observer.snapshot())), JSON)

    async def show(request: Request) -> Response:
        async with one_at_a_time:
            return await run_in_thread(_page, snapshot.publish(observer.snapshot()), request.query)

    async def healthz(_: Request) -> Response:
        return _probed(probes.stuck(observer.watchdog.expired()))

    async def readyz(_: Request) -> Response:
        now = observer.snapshot()
        return _probed(probes.unready(now), "ok, standing by" if now.standby else "ok")

    async def index(_: Request) -> Response:
        pages = "/metrics  for Prometheus\n/status   for kubectl sgpu\n/healthz  alive?\n/readyz   ready?"
        return text(200, f"sgpu {__version__}\n\n{pages}")

    routes: Routes = {"/metrics": metrics, "/status": status, "/healthz": healthz, "/readyz": readyz}
    routes = {"/": show if page else index, **routes}
    remedy = "stop what has it, or choose another -metrics-address; without it, the kubelet's probes fail"
    await _serve(address, partial(_tcp, host, port), routes, remedy, in_place)


def _open_pages() -> Pages:
    from sgpu.observe.metrics import Pages  # here, in a thread: only who is scraped pays for it

    return Pages()


def _metrics(
    pages: Callable[[], Pages], snapshot: Snapshot, counters: Counters, accept: str, accept_encoding: str
) -> Page:
    return pages().page(snapshot, counters, accept, accept_encoding)


def _page(snapshot: Snapshot, query: str) -> Response:
    from sgpu.observe import page  # here, in a thread: only who is visited pays for it

    return Response(200, page.render(snapshot, refresh=query != page.STILL), page.CONTENT_TYPE, page.HEADERS)


def _probed(problem: str, well: str = "ok") -> Response:
    return text(503, problem) if problem else text(200, well)


async def serve_status(path: Path, observer: Observer, in_place: trio.Event, cordons: Cordons) -> NoReturn:
    """Answer `status`, `cordon` and `uncordon` on a socket that only its owner can connect to, once no other daemon
    does.
    """
    await in_place.wait()

    async def status(_: Request) -> Response:
        return Response(200, await run_in_thread(snapshot.encode, observer.snapshot()), JSON)

    async def order(request: Request) -> Response:
        carry_out = cordons.cordon if request.path == "/cordon" else cordons.uncordon
        try:
            done = await carry_out(decode_order(request.body))
        except BadOrderError as error:
            return text(400, str(error))
        except CordonRefusedError as error:
            return text(409, str(error))
        return Response(200, encode(done), JSON)

    remedy = "`sgpu status` has no answer until then; -status-socket says where, -status-socket= that it is not wanted"
    posts = {"/cordon": order, "/uncordon": order}
    await _serve(str(path), partial(_unix, path), {"/status": status}, remedy, in_place, posts)


async def _serve(
    where: str, bind: Bind, routes: Routes, remedy: str, in_place: trio.Event, posts: Routes | None = None
) -> NoReturn:
    """Listen and serve; try again as long as that fails: less and less often, and once when the daemon is in place."""
    problem = OnChange(logger, logging.WARNING)
    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
    while True:
        try:
            async with bind() as listeners:
                problem.clear()
                delays = growing_delays(FIRST_RETRY, LAST_RETRY)
                await serve(listeners, routes, posts)
        except* (OSError, rpc.AddressInUseError) as group:
            error = group.exceptions[0]
            problem.report(f"cannot listen on {where}, trying again: {explain(error, remedy)}")
        with trio.move_on_after(next(delays)):
            await (trio.Event() if in_place.is_set() else in_place).wait()


@asynccontextmanager
async def _tcp(host: str, port: int) -> AsyncIterator[Sequence[trio.SocketListener]]:
    listeners = await trio.open_tcp_listeners(port, host=host or None)  # all interfaces, of IPv4 and IPv6
    addresses = [listener.socket.getsockname() for listener in listeners]
    urls = ", ".join(f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port, *_ in addresses)
    logger.info("serving metrics and probes on %s", urls)
    yield listeners


@asynccontextmanager
async def _unix(path: Path) -> AsyncIterator[Sequence[trio.SocketListener]]:
    make_private_directory(path.parent)
    with rpc.listen(path) as listener:
        logger.info("serving status on %s", path)
        yield [listener]
