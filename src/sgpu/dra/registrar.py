"""Stay registered with the kubelet as a DRA plugin: two sockets, one for what it is asked to do and one to say so.

The kubelet looks for the second one, also when it starts, and registers by itself. Knows what ends a session; not what
a GPU is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio

from sgpu import rpc
from sgpu.api import pluginregistration_grpc, pluginregistration_pb2
from sgpu.dra.slices import DRIVER
from sgpu.lib.concurrency import race
from sgpu.lib.files import make_private_directory
from sgpu.lib.inotify import Directory, open_directory
from sgpu.lib.listeners import serve
from sgpu.lib.logs import OnChange
from sgpu.lib.retry import growing_delays
from sgpu.lib.threads import run_in_thread
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registration, Registrations

logger = logging.getLogger(__name__)

#: The services of the driver's socket, of which the kubelet takes the first that it knows. Kubelets older than 1.34
#: know no shares of a device, and find nothing here that they could use.
SERVICES: Final = ("v1.DRAPlugin", "v1alpha1.DRAResourceHealth")
#: Seconds between attempts to listen.
FIRST_RETRY: Final = 0.1
LAST_RETRY: Final = 5.0


@attrs.frozen
class Sockets:
    """The driver's socket and the one for the registration. Both paths must be the kubelet's own."""

    service: Path
    registration: Path


def sockets(plugins: Path, registry: Path) -> tuple[Sockets, Sockets]:
    """Return the sockets in the kubelet's directories: two pairs, so that one daemon can hand over to another.

    The kubelet takes several sockets for a driver, and calls the one that it connected to last.
    """
    first, second = (
        Sockets(plugins / DRIVER / f"dra{suffix}.sock", registry / f"{DRIVER}{suffix}-reg.sock")
        for suffix in ("", "-2")
    )
    return first, second


class PluginRegistration(pluginregistration_grpc.RegistrationServicer):
    """What the kubelet asks a plugin that it found, and what came of it."""

    def __init__(self, endpoint: Path, taken: Callable[[bool], None]) -> None:
        self._endpoint = endpoint
        self._taken = taken
        self._problem = OnChange(logger, logging.WARNING)

    def GetInfo(  # type: ignore[override]  # purerpc's base waits
        self, _: pluginregistration_pb2.InfoRequest
    ) -> pluginregistration_pb2.PluginInfo:
        return pluginregistration_pb2.PluginInfo(
            type="DRAPlugin", name=DRIVER, endpoint=str(self._endpoint), supported_versions=SERVICES
        )

    def NotifyRegistrationStatus(  # type: ignore[override]  # purerpc's base waits
        self, status: pluginregistration_pb2.RegistrationStatus
    ) -> pluginregistration_pb2.RegistrationStatusResponse:
        self._taken(status.plugin_registered)
        if status.plugin_registered:
            self._problem.clear()
            logger.info("registered %s with the kubelet (dra v1)", DRIVER)
        else:
            self._problem.report(
                f"the kubelet does not take {DRIVER}: {status.error}; DRA with shared devices needs Kubernetes 1.36"
            )
        return pluginregistration_pb2.RegistrationStatusResponse()


async def stay_registered(
    choices: Sequence[Sockets], table: Mapping[str, rpc.Route], registrations: Registrations, counters: Counters
) -> NoReturn:
    """Serve the driver's methods and the registration, one session after the other, as long as the sockets are there.

    Raises rpc.AddressInUseError where other daemons have all of them.
    """
    problem = OnChange(logger, logging.WARNING)
    delays = growing_delays(FIRST_RETRY, LAST_RETRY)
    while True:
        try:
            plugin, found = choices[0].service.parent, choices[0].registration.parent
            await run_in_thread(make_private_directory, plugin)
            with open_directory(plugin) as service, open_directory(found) as registry:
                await _session(choices, (service, registry), table, registrations, counters)
                delays = growing_delays(FIRST_RETRY, LAST_RETRY)
        except OSError as error:
            problem.report(
                f"cannot serve {DRIVER}: {error}; -dra-plugin-directory and -dra-registry-directory have to be the "
                f"kubelet's, mounted at the same paths, and writable"
            )
            await trio.sleep(next(delays))


async def _session(
    choices: Sequence[Sockets],
    directories: tuple[Directory, Directory],
    table: Mapping[str, rpc.Route],
    registrations: Registrations,
    counters: Counters,
) -> None:
    """Serve until one of the sockets is gone: somebody removed it, and the kubelet can't find it any more."""
    with registrations.session(DRIVER) as registered:
        with _listen(choices) as (paths, service, register):
            registration = PluginRegistration(paths.service, partial(registrations.attempted, DRIVER, None))
            plugin_table = rpc.routes([registration.service])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, [service], partial(_serve_counted, table, registered, counters))
                nursery.start_soon(
                    serve, [register], partial(rpc.serve_connection, plugin_table, ended=counters.called)
                )
                for directory in directories:
                    nursery.start_soon(directory.watch)
                gone = await race(
                    partial(_wait_gone, directories[0], paths.service),
                    partial(_wait_gone, directories[1], paths.registration),
                )
                logger.info("%s was removed: serving it again", gone)
                nursery.cancel_scope.cancel()


@contextmanager
def _listen(choices: Sequence[Sockets]) -> Iterator[tuple[Sockets, trio.SocketListener, trio.SocketListener]]:
    """Listen on the first pair that no other daemon has, and remove what one that is gone left of the others."""
    paths = next(filter(_is_free, choices), choices[-1])
    # The driver's socket first: the kubelet calls as soon as it knows of it.
    with rpc.listen(paths.service) as service, rpc.listen(paths.registration) as register:
        for other in choices:
            if other is not paths:
                _is_free(other)
        yield paths, service, register


def _is_free(paths: Sockets) -> bool:
    """Return whether no daemon has these sockets. Those of one that is gone are removed."""
    try:
        for path in (paths.registration, paths.service):
            rpc.remove_stale(path)
    except rpc.AddressInUseError:
        return False
    return True


async def _serve_counted(
    table: Mapping[str, rpc.Route], registered: Registration, counters: Counters, stream: trio.SocketStream
) -> None:
    """Serve a connection of the kubelet, which keeps one open for as long as the driver is registered."""
    registered.streams += 1
    registered.changed.notify()
    try:
        await rpc.serve_connection(table, stream, ended=counters.called)
    finally:
        registered.streams -= 1
        registered.changed.notify()


async def _wait_gone(directory: Directory, path: Path) -> Path:
    ours = rpc.identity(path)
    await directory.wait_until(lambda: ours is None or rpc.identity(path) != ours)
    return path
