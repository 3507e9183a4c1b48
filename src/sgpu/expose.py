"""Where the daemon can be looked at: a unix socket for `status`.

Knows how an address is got hold of; not what a GPU is. Nothing here may disturb what the daemon is there for: an
address that can't be had is tried again, and pages are made in threads, from values that no longer change.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu import rpc, snapshot
from sgpu.logs import OnChange
from sgpu.observer import Observer
from sgpu.retry import growing_delays
from sgpu.web import Request, Response, Routes, serve

logger = logging.getLogger(__name__)

#: Seconds between attempts to listen, growing.
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 30.0
JSON: Final = "application/json"

Bind = Callable[[], AbstractAsyncContextManager[Sequence[trio.SocketListener]]]


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
async def _unix(path: Path) -> AsyncIterator[Sequence[trio.SocketListener]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rpc.listen(path) as listener:
        logger.info("status is told on %s", path)
        yield [listener]
