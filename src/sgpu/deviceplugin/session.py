"""Stay registered with the kubelet for one resource. Knows what ends a session; not what a GPU is."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu import rpc
from sgpu.config.settings import endpoint
from sgpu.deviceplugin import registration
from sgpu.deviceplugin.registration import RegistrationFailedError
from sgpu.deviceplugin.servicer import PluginContext, Streams, has_limits, options, plugin_routes
from sgpu.deviceplugin.succession import Succession
from sgpu.lib.concurrency import race, wait_until
from sgpu.lib.files import content_identity
from sgpu.lib.inotify import Directory, open_directory
from sgpu.lib.limits import explain
from sgpu.lib.listeners import serve
from sgpu.lib.logs import OnChange
from sgpu.lib.retry import growing_delays
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations
from sgpu.observe.watchdog import Watchdog

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
#: Seconds after a registration in which a stream that ends is taken to be the old one's fault: a kubelet that sees the
#: end of a predecessor's stream late disconnects whoever has the resource by then.
PREDECESSOR_GRACE: Final = 5.0
#: Seconds that the longest attempt to register takes: three versions of the API are tried.
ATTEMPT_TIMEOUT: Final = 3 * registration.REGISTER_TIMEOUT + LAST_RETRY


class DirectoryRemovedError(Exception):
    """The plugin directory was removed under its mount, and a new one on the host is not seen from here."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} was removed on the host, and this container keeps seeing the removed one: only a restart helps"
        )


def is_removed(path: Path) -> bool:
    """Return whether a directory can be opened and is in no directory any more, as below a mount."""
    try:
        return os.stat(path).st_nlink == 0
    except OSError:
        return False


def loop_name(resource: str) -> str:
    """Return what the watchdog calls the loop that keeps a resource registered."""
    return f"registration of {resource}"


async def stay_registered(
    plugins: Path,
    context: PluginContext,
    registrations: Registrations,
    counters: Counters,
    watchdog: Watchdog,
    succession: Succession,
) -> NoReturn:
    """Keep a resource registered in the plugin directory, one session after the other.

    A session ends when the kubelet restarts or forgets the plugin. When the daemon leaves, it withdraws.

    Raises rpc.AddressInUseError or DirectoryRemovedError.
    """
    session = Session(context, registrations, counters, watchdog, succession)
    problem = OnChange(logger, logging.WARNING)
    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
    while True:
        session.expect_attempt()
        try:
            with open_directory(plugins) as directory:
                while True:
                    reason = await session.run(directory)
                    logger.info("registering %s again: %s", context.resource, reason)
                    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
                    session.expect_attempt()
        except OSError as error:  # the directory is not there yet, or is just being replaced
            if is_removed(plugins):
                raise DirectoryRemovedError(plugins) from error
            cure = "-plugin-directory has to be the kubelet's, and writable"
            problem.report(f"waiting for {plugins}: {explain(error, cure)}")
            await trio.sleep(next(delays))


class Session:
    """State that the sessions of one resource share."""

    def __init__(
        self,
        context: PluginContext,
        registrations: Registrations,
        counters: Counters,
        watchdog: Watchdog,
        succession: Succession,
    ) -> None:
        self._context = context
        self._resource = context.resource
        self._registrations = registrations
        self._counters = counters
        self._watchdog = watchdog
        self._succession = succession
        self._problem = OnChange(logger, logging.WARNING)
        self._streams = Streams()
        # Once, not in each session: it takes 0.3 ms, in which a kubelet that has restarted would wait.
        self._table = plugin_routes(context, self._streams)

    def expect_attempt(self) -> None:
        """Let the watchdog expect the end of an attempt to register."""
        self._watchdog.arm(loop_name(self._resource), ATTEMPT_TIMEOUT)

    async def run(self, directory: Directory) -> str:
        """Listen, register, and serve until another registration is due. Returns why it is.

        Raises OSError when the plugin directory can't be used, rpc.AddressInUseError when another process serves there.
        """
        socket = directory.path / endpoint(self._resource)
        # The watch comes first, so that no change is missed; a listening socket already queues connections.
        directory.renew()
        with rpc.listen(socket) as listener, self._registrations.session(self._resource) as registered:
            ours = rpc.identity(socket)
            streams = self._streams
            streams.begin(registered)
            leaving = self._succession.leaving
            async with trio.open_nursery() as connections:
                with self._succession.session():
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(directory.watch)
                        handler = partial(rpc.serve_connection, self._table, ended=self._counters.called)
                        nursery.start_soon(serve, [listener], handler, connections)
                        reason = await race(
                            partial(_wait_socket_gone, directory, socket, ours),
                            partial(self._stay_registered, directory, streams),
                            partial(_wait_leaving, leaving),
                        )
                        if leaving.is_set():
                            await self._withdraw(directory.path / registration.SOCKET, streams)
                        nursery.cancel_scope.cancel()
                if leaving.is_set():  # calls are answered until all is over; the socket's name is the successor's
                    await self._succession.staying.wait()
                # End the streams and let the kubelet hang up: it then forgets whatever has this resource's name, so it
                # must not receive a new registration before.
                streams.ending.set()
                patience = 0.0 if leaving.is_set() else DRAIN_TIMEOUT
                connections.cancel_scope.deadline = trio.current_time() + patience
        return reason

    async def _stay_registered(self, directory: Directory, streams: Streams) -> str:
        """Register, however often it takes, then wait until the kubelet was replaced or has no stream open."""
        path = directory.path / registration.SOCKET
        delays = growing_delays(FIRST_RETRY, LAST_RETRY)
        while True:
            self.expect_attempt()
            with registration.pinned(path) as pin:
                kubelet = content_identity(path)
                limited = has_limits(self._context)
                attempt = partial(self._register, path)
                registered = await race(attempt, partial(_overtaken, directory, pin)) if pin else self._missing(path)
                self._registrations.attempted(self._resource, kubelet, registered)
                if registered:
                    self._watchdog.disarm(loop_name(self._resource))
                    return await race(
                        partial(_wait_kubelet_replaced, directory, pin),
                        partial(_wait_no_stream, streams),
                        partial(_wait_limits_switched, self._context, limited=limited),
                        partial(self._wait_dropped, streams),
                    )
                with trio.move_on_after(next(delays)) as scope:
                    await directory.wait_until(lambda: rpc.identity(path) != pin)
                if not scope.cancelled_caught:
                    # A socket that was just made is about to be listened on.
                    delays = growing_delays(FIRST_RETRY, LAST_RETRY)

    async def _withdraw(self, kubelet_socket: Path, streams: Streams) -> None:
        """Let the kubelet forget this registration without a consequence.

        From 1.25 on the kubelet disconnects whoever has the resource when a stream ends, and marks all devices
        unhealthy. But it forgets a resource's plugin, and nothing else, when a registration of the resource fails: then
        the end of the stream concerns nobody, the devices stay as they were, and calls still come over the connection.
        """
        if not streams.asked:  # up to 1.24, the end of a stream concerns its own registration alone: it may last
            return
        streams.refusing = True
        with suppress(RegistrationFailedError):
            await self._attempt(kubelet_socket)
        streams.ending.set()

    async def _wait_dropped(self, streams: Streams) -> str:
        if self._succession.took_over:
            with trio.move_on_after(PREDECESSOR_GRACE):
                await streams.wait_dropped()
                return "the kubelet disconnected it with the daemon before it"
        await trio.sleep_forever()

    async def _attempt(self, kubelet_socket: Path) -> str:
        offered = options(self._context)
        return await registration.register(kubelet_socket, endpoint(self._resource), self._resource, offered)

    def _missing(self, kubelet_socket: Path) -> bool:
        """Report that there was no socket to pin. One that is there by now is asked once it is pinned.

        Else its kubelet would be taken for another one that came later, and registered with twice.
        """
        error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._report(registration.unanswered(kubelet_socket, error))
        return False

    def _report(self, problem: object) -> None:
        self._problem.report(f"{self._resource} is not registered: {problem}")

    async def _register(self, kubelet_socket: Path) -> bool:
        try:
            version = await self._attempt(kubelet_socket)
        except RegistrationFailedError as error:
            self._report(error)
            return False
        self._problem.clear()
        logger.info("registered %s with the kubelet (%s)", self._resource, version)
        return True


async def _wait_socket_gone(directory: Directory, socket: Path, ours: rpc.Identity | None) -> str:
    """Wait until our socket is gone: a kubelet that starts removes all sockets before it makes its own."""
    # It may do so before we have even looked which file is ours.
    await directory.wait_until(lambda: ours is None or rpc.identity(socket) != ours)
    return f"{socket} was removed"


async def _overtaken(directory: Directory, asked: rpc.Identity | None) -> bool:
    """Wait until there is another kubelet to ask: the one that was asked may be gone, or going, and never answer."""
    await _wait_kubelet_replaced(directory, asked)
    return False


async def _wait_leaving(leaving: trio.Event) -> str:
    await leaving.wait()
    return "no daemon took over"


async def _wait_kubelet_replaced(directory: Directory, registered: rpc.Identity | None) -> str:
    path = directory.path / registration.SOCKET
    await directory.wait_until(lambda: rpc.identity(path) not in (None, registered))
    return "the kubelet restarted"


async def _wait_limits_switched(context: PluginContext, *, limited: bool) -> str:
    """Wait until the kubelet should call PreStartContainer and does not, or the other way round."""
    await wait_until(lambda: has_limits(context) != limited, context.node.changed)
    return f"memory limits were switched {'off' if limited else 'on'}"


async def _wait_no_stream(streams: Streams) -> str:
    await streams.wait_lost(STREAM_GRACE)
    return f"the kubelet has had no ListAndWatch stream open for {STREAM_GRACE:.0f} s"
