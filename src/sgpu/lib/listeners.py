"""Accepting connections, also where the kernel has no descriptor or memory for one more. Knows no protocol."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn

import trio

from sgpu.lib.limits import CONNECTIONS

logger = logging.getLogger(__name__)

#: Seconds until it is tried again: connections may have ended.
RETRY: Final = 0.1


async def serve(
    listeners: Sequence[trio.SocketListener],
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    nursery: trio.Nursery | None = None,
) -> NoReturn:
    """Run `handler`, which closes the connection, in a task for each. Tasks run in `nursery`, or in one of its own.

    As `trio.serve_listeners`, which would log a traceback ten times a second where descriptors run out.
    """
    async with trio.open_nursery() as own:
        for listener in listeners:
            own.start_soon(_accept, listener, handler, nursery or own)
        await trio.sleep_forever()


async def _accept(
    listener: trio.SocketListener, handler: Callable[[trio.SocketStream], Awaitable[None]], nursery: trio.Nursery
) -> NoReturn:
    refused = False
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in CONNECTIONS:
                    raise
                if not refused:
                    logger.warning("cannot accept connections: %s", CONNECTIONS[error.errno])
                refused = True
                await trio.sleep(RETRY)
                continue
            if refused:
                logger.warning("accepting connections again")
            refused = False
            nursery.start_soon(handler, stream)
