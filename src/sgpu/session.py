"""Keeping one resource registered with the kubelet. Knows what ends a session; not what a GPU is."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu import kubelet, rpc
from sgpu.directory import Directory, open_directory
from sgpu.files import content_identity
from sgpu.kubelet import RegistrationFailedError
from sgpu.logs import OnChange
from sgpu.nurseries import race
from sgpu.plugin import Offer, Streams, options, plugin_routes
from sgpu.record import Record, registration_of
from sgpu.retry import growing_delays
from sgpu.settings import endpoint

logger = logging.getLogger(__name__)

#: Seconds between attempts to register. Growing, so that a kubelet that is just about to listen is not waited for
#: longer than need be, and an absent one costs little.
FIRST_RETRY: Final = 0.001
LAST_RETRY: Final = 5.0
#: Seconds without a ListAndWatch stream after which a registration counts as lost. A kubelet opens it at once.
STREAM_GRACE: Final = 10.0
#: Seconds that the kubelet gets to let go of the old session's connection. Its own clean-up takes milliseconds;
#: a registration before it is done would be cleaned up with it.
DRAIN_TIMEOUT: Final = 2.0
#: Seconds that the longest attempt to register takes: three versions of the API are tried.
ATTEMPT_TIMEOUT: Final = 3 * kubelet.REGISTER_TIMEOUT + LAST_RETRY


async def keep_registered(plugins: Path, resource: str, offer: Offer, record: Record) -> NoReturn:
    """Keep a resource registered in the plugin directory, for ever: one session after the other.

    Each ends when the kubelet restarts or forgets us. Raises rpc.AddressInUseError.
    """
    trouble = OnChange(logger, logging.WARNING)
    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
    while True:
        record.expect(registration_of(resource), ATTEMPT_TIMEOUT)
        try:
            with open_directory(plugins) as directory:
                while True:
                    reason = await session(directory, resource, offer, record, trouble)
                    logger.info("registering %s again: %s", resource, reason)
                    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
                    record.expect(registration_of(resource), ATTEMPT_TIMEOUT)
        except OSError as error:  # the directory is not there yet, or is just being made anew
            trouble.report(f"waiting for {plugins}: {error}; -plugin-directory has to be the kubelet's, and writable")
            await trio.sleep(next(delays))


async def session(directory: Directory, resource: str, offer: Offer, record: Record, trouble: OnChange) -> str:
    """Listen, register, and serve until another registration is due. Returns why it is.

    Raises OSError when the plugin directory can't be used, rpc.AddressInUseError when another instance serves there.
    """
    socket = directory.path / endpoint(resource)
    # The watch comes first, so that no change is missed; a listening socket already queues connections.
    directory.renew()
    with rpc.listen(socket) as listener, record.session(resource) as registration:
        ours = rpc.identity(socket)
        streams = Streams(registration)
        table = plugin_routes(offer, streams)
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(directory.watch)
                handler = partial(rpc.serve_connection, table, ended=record.called)
                nursery.start_soon(partial(trio.serve_listeners, handler, [listener], handler_nursery=connections))
                reason = await race(
                    partial(_socket_gone, directory, socket, ours),
                    partial(_forgotten, resource, directory, streams, record, trouble),
                )
                nursery.cancel_scope.cancel()
            # End the streams and let the kubelet hang up: it then forgets whatever has our name, so that it must not
            # be told of a new registration before.
            streams.ending.set()
            connections.cancel_scope.deadline = trio.current_time() + DRAIN_TIMEOUT
    return reason


async def _socket_gone(directory: Directory, socket: Path, ours: rpc.Identity | None) -> str:
    """A kubelet that starts removes all sockets, ours too, before it makes its own."""
    # It may do so before we have even looked which file is ours.
    await directory.wait_until(lambda: ours is None or rpc.identity(socket) != ours)
    return f"{socket} was removed"


async def _forgotten(resource: str, directory: Directory, streams: Streams, record: Record, trouble: OnChange) -> str:
    """Register, however often it takes, then wait until the kubelet is another or has no stream open."""
    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
    while True:
        record.expect(registration_of(resource), ATTEMPT_TIMEOUT)
        with kubelet.pinned(directory.path / kubelet.SOCKET) as pin:
            met = content_identity(directory.path / kubelet.SOCKET)
            attempt = partial(_register, resource, directory, trouble)
            # Where there was none, whoever answers now is the new one.
            registered = await (race(attempt, partial(_overtaken, directory, pin)) if pin else attempt())
            record.attempted(resource, met, registered)
            if registered:
                record.rest(registration_of(resource))
                return await race(partial(_kubelet_replaced, directory, pin), partial(_stream_lost, streams))
            with trio.move_on_after(next(delays)) as scope:
                await directory.wait_until(lambda: rpc.identity(directory.path / kubelet.SOCKET) != pin)
            if not scope.cancelled_caught:
                # A socket that was just made is about to be listened on.
                delays = growing_delays(FIRST_RETRY, LAST_RETRY)


async def _register(resource: str, directory: Directory, trouble: OnChange) -> bool:
    try:
        version = await kubelet.register(directory.path / kubelet.SOCKET, endpoint(resource), resource, options())
    except RegistrationFailedError as error:
        trouble.report(f"{resource} is not registered: {error}")
        return False
    trouble.clear()
    logger.info("registered %s with the kubelet (%s)", resource, version)
    return True


async def _overtaken(directory: Directory, asked: rpc.Identity | None) -> bool:
    """Until there is another kubelet to ask: the one that was asked may be gone, or going, and never answer."""
    await _kubelet_replaced(directory, asked)
    return False


async def _kubelet_replaced(directory: Directory, registered: rpc.Identity | None) -> str:
    await directory.wait_until(lambda: rpc.identity(directory.path / kubelet.SOCKET) not in (None, registered))
    return "the kubelet restarted"


async def _stream_lost(streams: Streams) -> str:
    await streams.wait_lost(STREAM_GRACE)
    return f"the kubelet has had no ListAndWatch stream open for {STREAM_GRACE:.0f} s"
