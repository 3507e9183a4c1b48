"""The supervision tree: find the GPUs, keep them registered with the kubelet, stop on a signal.

Knows what runs beside what and what ends what; not what a GPU is.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

import trio

from sgpu import __version__, discovery, kubelet, listing, plugin, rpc, simulation
from sgpu.allocation import HostPaths
from sgpu.inventory import Inventory
from sgpu.kubelet import PluginDirectory, RegistrationFailedError
from sgpu.logs import OnChange
from sgpu.nurseries import race
from sgpu.settings import Settings

logger = logging.getLogger(__name__)

#: Seconds between attempts to find GPUs, and to register. Growing, so that neither a driver that comes up nor a
#: kubelet that is just about to listen is waited for longer than need be, and an absent one costs little.
FIRST_RETRY: Final = 0.001
LAST_RETRY: Final = 5.0
#: Seconds without a ListAndWatch stream after which a registration counts as lost. A kubelet opens it at once.
STREAM_GRACE: Final = 10.0
#: Seconds that the kubelet gets to let go of the old session's connection. Its own clean-up takes milliseconds;
#: a registration before it is done would be cleaned up with it.
DRAIN_TIMEOUT: Final = 2.0
#: Seconds between looks at the file of simulated faults.
SIMULATION_INTERVAL: Final = 0.2


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises, in exception groups, listing.TooManySharesError and rpc.AddressInUseError: nothing can be done about
    those from here. All else is waited out.
    """
    logger.info("sgpu %s offers %s from %s", __version__, settings.resource_name, _source(settings))
    inventory = Inventory()
    async with trio.open_nursery() as nursery:
        stop_on_signal(nursery.cancel_scope)
        if settings.simulate:
            await nursery.start(simulate, settings, inventory)
        else:
            await find_gpus(settings, inventory)
        nursery.start_soon(keep_registered, settings, inventory)


def stop_on_signal(scope: trio.CancelScope) -> None:
    """Cancel the scope when the process is told to stop, however often it is told.

    trio's own receiver hands a signal that comes twice back to the handler of before, which would end the process
    in the middle of its clean-up.
    """
    token = trio.lowlevel.current_trio_token()

    def stop(number: int) -> None:
        if not scope.cancel_called:
            logger.info("%s: stopping", signal.Signals(number).name)
            scope.cancel()

    def handler(number: int, _: object) -> None:
        with suppress(trio.RunFinishedError):  # stopped already
            token.run_sync_soon(stop, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


async def find_gpus(settings: Settings, inventory: Inventory) -> None:
    """Return once the inventory has GPUs. Until then, try again and again, and say so when the reason changes."""
    places = discovery.Places(
        host_path=Path(settings.host_path),
        dev_directory=Path(settings.dev_directory),
        sysfs_directory=Path(settings.sysfs_directory),
    )
    waiting = OnChange(logger, logging.WARNING)
    delays = _growing_delays()
    while True:
        try:
            # Abandoned when we are told to stop: the driver may never answer.
            found = await trio.to_thread.run_sync(
                discovery.discover, places, settings.gpu_duplication_factor, abandon_on_cancel=True
            )
            break
        except discovery.NotReadyError as error:
            waiting.report(f"waiting for a GPU: {error}")
        await trio.sleep(next(delays))
    for problem in found.problems:
        logger.warning("%s", problem)
    listing.check_size(found.devices)
    logger.info("driver %s (%s)", found.driver_version, found.library)
    for device in found.devices:
        logger.info("GPU %s: %s at %s, %d shares", device.uuid, device.name, device.pci_bus_id, device.shares)
    inventory.replace(found.devices)


async def simulate(
    settings: Settings, inventory: Inventory, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Offer simulated GPUs, faulty for as long as the file of faults says so."""
    devices = simulation.simulated_devices(settings.simulate, settings.gpu_duplication_factor)
    listing.check_size(devices)
    inventory.replace(devices)
    task_status.started()
    while settings.simulate_faults:
        before = {device.uuid: device.health for device in inventory.devices}
        faults = await trio.to_thread.run_sync(simulation.read_faults, Path(settings.simulate_faults))
        inventory.replace(simulation.with_faults(devices, faults))
        for device in inventory.devices:
            if device.health is not before[device.uuid]:
                logger.warning("GPU %s is %s", device.uuid, f"down: {device.reason}" if device.reason else "back")
        await trio.sleep(SIMULATION_INTERVAL)


async def keep_registered(settings: Settings, inventory: Inventory) -> None:
    """One session after the other: each ends when the kubelet restarts or forgets us."""
    trouble = OnChange(logger, logging.WARNING)
    delays = _growing_delays()
    while True:
        try:
            reason = await session(settings, inventory, trouble)
        except OSError as error:  # the directory is not there yet, or is just being made anew
            trouble.report(f"waiting for {settings.plugin_directory}: {error}")
            await trio.sleep(next(delays))
        else:
            logger.info("registering again: %s", reason)
            delays = _growing_delays()


async def session(settings: Settings, inventory: Inventory, trouble: OnChange) -> str:
    """Listen, register, and serve until another registration is due. Returns why it is.

    Raises OSError when the plugin directory can't be used, rpc.AddressInUseError when another instance serves there.
    """
    streams = plugin.Streams()
    table = plugin.plugin_routes(inventory, _host_paths(settings), streams)
    socket = Path(settings.plugin_directory) / settings.endpoint
    # The watch comes first, so that no change is missed; a listening socket already queues connections.
    with kubelet.open_directory(socket.parent) as directory, rpc.listen(socket) as listener:
        ours = rpc.identity(socket)
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(directory.watch)
                handler = partial(rpc.serve_connection, table)
                nursery.start_soon(partial(trio.serve_listeners, handler, [listener], handler_nursery=connections))
                reason = await race(
                    partial(_socket_gone, directory, socket, ours),
                    partial(_forgotten, settings, directory, streams, trouble),
                )
                nursery.cancel_scope.cancel()
            # End the streams and let the kubelet hang up: it then forgets whatever has our name, so that it must not
            # be told of a new registration before.
            streams.ending.set()
            connections.cancel_scope.deadline = trio.current_time() + DRAIN_TIMEOUT
    return reason


async def _socket_gone(directory: PluginDirectory, socket: Path, ours: rpc.Identity | None) -> str:
    """A kubelet that starts removes all sockets, ours too, before it makes its own."""
    await directory.wait_until(lambda: rpc.identity(socket) != ours)
    return f"{socket} was removed"


async def _forgotten(settings: Settings, directory: PluginDirectory, streams: plugin.Streams, trouble: OnChange) -> str:
    """Register, however often it takes, then wait until the kubelet is another or has no stream open."""
    delays = _growing_delays()
    while True:
        with kubelet.pinned(directory.kubelet_socket) as pin:
            if await _register(settings, directory, trouble):
                return await race(partial(_kubelet_replaced, directory, pin), partial(_stream_lost, streams))
            with trio.move_on_after(next(delays)) as scope:
                await directory.wait_until(lambda: rpc.identity(directory.kubelet_socket) != pin)
            if not scope.cancelled_caught:
                delays = _growing_delays()  # a socket that was just made is about to be listened on


async def _register(settings: Settings, directory: PluginDirectory, trouble: OnChange) -> bool:
    try:
        version = await kubelet.register(
            directory.kubelet_socket, settings.endpoint, settings.resource_name, plugin.options()
        )
    except RegistrationFailedError as error:
        trouble.report(f"not registered: {error}")
        return False
    trouble.clear()
    logger.info("registered %s with the kubelet (%s)", settings.resource_name, version)
    return True


async def _kubelet_replaced(directory: PluginDirectory, registered: rpc.Identity | None) -> str:
    await directory.wait_until(lambda: rpc.identity(directory.kubelet_socket) not in (None, registered))
    return "the kubelet restarted"


async def _stream_lost(streams: plugin.Streams) -> str:
    await streams.wait_lost(STREAM_GRACE)
    return f"the kubelet has had no ListAndWatch stream open for {STREAM_GRACE:.0f} s"


def _growing_delays() -> Iterator[float]:
    delay = FIRST_RETRY
    while True:
        yield delay
        delay = min(2 * delay, LAST_RETRY)


def _host_paths(settings: Settings) -> HostPaths:
    return HostPaths(
        libraries=PurePosixPath(settings.host_path),
        libraries_in_container=PurePosixPath(settings.container_path),
        devices=PurePosixPath(settings.dev_directory),
    )


def _source(settings: Settings) -> str:
    if settings.simulate:
        return f"{settings.simulate} SIMULATED GPUs, no driver is used"
    return f"the driver's libraries under {settings.host_path}"
