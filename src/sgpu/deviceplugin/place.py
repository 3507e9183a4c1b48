"""One daemon for a resource on a node: the place that it has, and the daemons that stand by to take it over.

The place is a socket that the daemon listens on. A standby keeps a connection to it, which ends when the daemon does,
however that ends. A daemon that is told to stop offers its place first. Knows neither kubelet nor GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio

from sgpu import rpc
from sgpu.lib.listeners import serve
from sgpu.lib.retry import growing_delays

logger = logging.getLogger(__name__)

#: Where the socket goes, in the plugin directory: a kubelet that starts removes the sockets there, and no directory.
DIRECTORY: Final = ".sgpu"
#: Seconds between attempts to take a place whose directory is not there or can't be used, growing.
FIRST_RETRY: Final = 0.001
LAST_RETRY: Final = 5.0
#: Seconds that a standby gets to register once it was offered the place. It takes milliseconds.
ACCEPT_TIMEOUT: Final = 3.0
#: What is said on the connection: the daemon offers its place, and the standby has registered.
OFFER: Final = b"o"
ACCEPTED: Final = b"a"


class PlaceTakenError(Exception):
    """Another daemon serves the resource on this node. The message says which."""

    def __init__(self, holder: rpc.AddressInUseError, resource: str) -> None:
        super().__init__(
            f"{holder.who} already serves {resource} with {holder.path.parent.parent}; stop it, "
            "or start this one with -standby, so that it takes over when the other stops"
        )


@attrs.define(eq=False)
class _Standby:
    """A daemon that stands by. `heard` is set when it has registered, or is gone."""

    stream: trio.SocketStream
    registered: bool = False
    heard: trio.Event = attrs.Factory(trio.Event)


class Place:
    """The place of this daemon.

    `decided` is set once it is known whether another has it; `taken` once this one has it, or can't have it because
    the plugin directory is not there, where nobody can be registered.
    """

    def __init__(self, plugin_directory: Path, resource: str, *, standby: bool) -> None:
        self.decided = trio.Event()
        self.taken = trio.Event()
        #: Whether another daemon has the place, and this one waits for it.
        self.waiting = False
        self._path = plugin_directory / DIRECTORY / resource.replace("/", "_")
        self._resource = resource
        self._standby = standby
        self._standbys: list[_Standby] = []
        self._predecessor: trio.SocketStream | None = None
        self._listening = trio.CancelScope()
        self._released = trio.Event()

    @property
    def has_standby(self) -> bool:
        """Return whether a daemon stands by to take it over."""
        return bool(self._standbys)

    async def keep(self) -> NoReturn:
        """Take the place as soon as it is free, and keep it until it is offered.

        Raises PlaceTakenError where another daemon has it, and this one is no standby, or acted as if it had it.
        """
        delays = growing_delays(FIRST_RETRY, LAST_RETRY)
        async with trio.open_nursery() as connections:
            while True:
                try:
                    with self._listen() as listener, trio.CancelScope() as self._listening:
                        self._take()
                        await serve([listener], self._attend, connections)
                except rpc.AddressInUseError as holder:
                    if self.taken.is_set() or not self._standby:
                        raise PlaceTakenError(holder, self._resource) from holder
                    await self._wait_for_offer(holder)
                    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
                except OSError as error:  # the registrations wait for the directory too, and say so
                    logger.debug("no place at %s: %s", self._path, error)
                    self._take()
                if self._listening.cancel_called:
                    self._released.set()
                    await trio.sleep_forever()
                await trio.sleep(next(delays))

    async def offer(self, withdraw: Callable[[], Awaitable[None]]) -> bool:
        """Offer the place to the daemons that stand by, one after the other. Returns whether one has registered.

        `withdraw` is awaited first where there is one.
        """
        if not self._standbys:
            return False
        logger.info("handing over to the daemon that stands by")
        await withdraw()
        self._listening.cancel()
        await self._released.wait()
        for standby in tuple(self._standbys):
            with trio.move_on_after(ACCEPT_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await standby.stream.send_all(OFFER)
                await standby.heard.wait()
            if standby.registered:
                return True
        logger.warning("no daemon took over: the one that stood by has ended, or the kubelet refuses it")
        return False

    async def confirm(self) -> None:
        """Tell the daemon that offered its place that this one has registered."""
        if self._predecessor is not None:
            async with self._predecessor as stream:
                self._predecessor = None
                with suppress(trio.BrokenResourceError):  # it did not wait
                    await stream.send_all(ACCEPTED)

    @contextmanager
    def _listen(self) -> Iterator[trio.SocketListener]:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with rpc.listen(self._path) as listener:
                yield listener
        finally:
            if not self._standbys:
                with suppress(OSError):  # another resource has its place there
                    self._path.parent.rmdir()

    def _take(self) -> None:
        if self.waiting:
            logger.info("taking over %s", self._resource)
        self.waiting = False
        self.decided.set()
        self.taken.set()

    def _wait(self, holder: rpc.AddressInUseError) -> None:
        if not self.waiting:
            logger.info("standing by: %s serves %s; this one takes over when it stops", holder.who, self._resource)
        self.waiting = True
        self.decided.set()

    async def _wait_for_offer(self, holder: rpc.AddressInUseError) -> None:
        """Return when the daemon that has the place offers it, or is gone."""
        try:
            stream = await trio.open_unix_socket(str(self._path))
        except OSError:
            return
        self._wait(holder)
        offer = b""
        with suppress(trio.BrokenResourceError):
            offer = await stream.receive_some(1)
        if offer:
            self._predecessor = stream
        else:
            await stream.aclose()

    async def _attend(self, stream: trio.SocketStream) -> None:
        """Remember whoever connects as a standby, for as long as it is there."""
        standby = _Standby(stream)
        self._standbys.append(standby)
        async with stream:
            with suppress(trio.BrokenResourceError):
                standby.registered = await stream.receive_some(1) == ACCEPTED
        self._standbys.remove(standby)
        standby.heard.set()
