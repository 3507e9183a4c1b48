"""The supervision tree: find the GPUs, keep them registered with the kubelet, stop on a signal.

Knows what runs beside what and what ends what; not what a GPU is.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Final

import trio

from sgpu import __version__, plugin, processes, simulation, state
from sgpu.allocation import HostPaths, Rules
from sgpu.catalog import Catalog
from sgpu.device import Health
from sgpu.driver import watch_driver
from sgpu.inventory import Inventory
from sgpu.load import Loaded
from sgpu.logs import OnChange
from sgpu.monitor import Memory, Monitor
from sgpu.nurseries import race
from sgpu.observer import Observer
from sgpu.placement import MultiShare, Placement
from sgpu.record import Record
from sgpu.reload import keep_configured
from sgpu.report import Orders
from sgpu.sampler import Sampling, sample
from sgpu.session import keep_registered
from sgpu.settings import Settings
from sgpu.usage import NO_POD, Sample, Usage
from sgpu.watchdog import exit_when_stuck

logger = logging.getLogger(__name__)

#: Seconds that a resource which is offered no longer stays registered: time for the kubelet to hear of it.
FAREWELL: Final = 2.0
#: Seconds between looks at the file of simulated faults.
SIMULATION_INTERVAL: Final = 0.2


async def run(loaded: Loaded, reload: Callable[[], Loaded]) -> None:
    """Run until SIGTERM or SIGINT. `reload` reads the settings again and raises UsageError; it may block.

    Raises, in exception groups, listing.TooManySharesError, PolicyConflictError and rpc.AddressInUseError: nothing
    can be done about those from here. All else is waited out.
    """
    settings = loaded.settings
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until `keep_configured` listens, which reads the file once more
    logger.info("sgpu %s offers GPUs from %s", __version__, _source(settings))
    usage = Usage(settings.sample_interval)
    record = Record(trio.current_time)
    catalog = Catalog(loaded.policy)
    places = processes.Places(Path(settings.proc_directory), Path(settings.container_log_directory))
    sampling = Sampling(
        Path(settings.pod_resources_socket), settings.sample_interval, settings.memory_watermark, places
    )
    node = Inventory()
    async with trio.open_nursery() as nursery:
        stop_on_signal(nursery.cancel_scope)
        nursery.start_soon(exit_when_stuck)
        monitor = None
        if settings.simulate:
            nursery.start_soon(simulate, settings, node)
        else:
            memory = await _remembered(settings)
            monitor = Monitor(
                node,
                settings.gpu_duplication_factor,
                loaded.xids,
                memory,
                sampled=partial(_sampled, usage),
                failed=lambda failure: record.nvml_errors.update([(failure.function, str(failure.code))]),
            )
            nursery.start_soon(watch_gpus, settings, monitor, record)
        nursery.start_soon(keep_divided, node, catalog, usage)
        nursery.start_soon(keep_offered, settings, catalog, usage, record)
        nursery.start_soon(sample, sampling, catalog, usage, partial(record.expect, "sampler"))
        nursery.start_soon(keep_configured, loaded, reload, catalog, record.reloaded)
        nursery.start_soon(keep_exposed, settings, Observer(node, catalog, usage, record, monitor))


async def keep_divided(node: Inventory, catalog: Catalog, usage: Usage) -> None:
    """Pass on each change of the node's GPUs, and say whom it hits."""
    await node.wait_filled()
    down: frozenset[str] = frozenset()
    while True:
        changed = node.changed
        catalog.replace(node.devices)
        before, down = down, frozenset(gpu.uuid for gpu in node.devices if gpu.health is Health.UNHEALTHY)
        for uuid in sorted(down - before):
            if pods := [pod or NO_POD for pod in usage.pods(uuid)]:
                logger.warning("GPU %s, which is down, is used by %s", uuid, ", ".join(pods))
        await changed.wait()


async def keep_offered(settings: Settings, catalog: Catalog, usage: Usage, record: Record) -> None:
    """A registration for each resource, side by side: one that fails does not stop the others."""
    offered: set[str] = set()

    async def offer(resource: str) -> None:
        inventory = catalog.inventories[resource]

        async def register() -> None:
            await inventory.wait_filled()
            await keep_registered(Path(settings.plugin_directory), resource, _offer(settings, inventory, usage), record)

        while resource in catalog.policy.resources():  # it can be wanted again while it is being left
            await race(register, partial(_unwanted, catalog, resource))
        offered.remove(resource)
        record.left(resource)
        catalog.drop(resource)

    async with trio.open_nursery() as nursery:
        while True:
            changed = catalog.changed
            for resource in catalog.inventories.keys() - offered:
                offered.add(resource)
                nursery.start_soon(offer, resource)
            await changed.wait()


async def _unwanted(catalog: Catalog, resource: str) -> None:
    """Until a resource is offered no longer, and the kubelet has had time to hear that it has no devices any more."""
    while True:
        if resource in catalog.policy.resources():
            await catalog.changed.wait()
        else:
            await trio.sleep(FAREWELL)
            if resource not in catalog.policy.resources():
                return


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


async def _remembered(settings: Settings) -> Memory:
    """What a daemon before this one has kept."""
    if not settings.state_file:
        return Memory()
    return await trio.to_thread.run_sync(state.load, Path(settings.state_file), state.boot_id())


async def watch_gpus(settings: Settings, monitor: Monitor, record: Record) -> None:
    """Keep the monitor told of what the driver says, and what it should not forget on disk."""
    orders = Orders(
        host_path=settings.host_path,
        dev_directory=settings.dev_directory,
        sysfs_directory=settings.sysfs_directory,
        interval=min(settings.health_interval, settings.sample_interval),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_driver, orders, monitor, settings.driver_timeout, partial(record.expect, "driver"))
        if settings.state_file:
            nursery.start_soon(keep_state, Path(settings.state_file), state.boot_id(), monitor)


async def keep_exposed(settings: Settings, observer: Observer) -> None:
    """Let those who want to know look at the daemon."""
    if not (settings.metrics_address or settings.status_socket):
        return
    # Imported here, and in a thread: a registration does not wait for it.
    expose = await trio.to_thread.run_sync(_import_expose)
    async with trio.open_nursery() as nursery:
        if settings.metrics_address:
            nursery.start_soon(expose.expose_metrics, settings.metrics_address, observer)
        if settings.status_socket:
            nursery.start_soon(expose.expose_status, Path(settings.status_socket), observer)


def _import_expose() -> ModuleType:
    from sgpu import expose

    return expose


async def keep_state(path: Path, boot_id: str, monitor: Monitor) -> None:
    """Write the monitor's memory whenever it changes."""
    trouble = OnChange(logger, logging.WARNING)
    while True:
        changed = monitor.memory_changed
        try:
            await trio.to_thread.run_sync(state.save, path, boot_id, monitor.memory)
            trouble.clear()
        except OSError as error:
            trouble.report(f"{path} can't be written, so that a restart forgets what is down: {error}")
        await changed.wait()


async def simulate(settings: Settings, inventory: Inventory) -> None:
    """Offer simulated GPUs, faulty for as long as the file of faults says so."""
    devices = simulation.simulated_devices(settings.simulate, settings.gpu_duplication_factor, time.time())
    inventory.replace(devices)
    while settings.simulate_faults:
        before = {device.uuid: device.health for device in inventory.devices}
        faults = await trio.to_thread.run_sync(simulation.read_faults, Path(settings.simulate_faults))
        inventory.replace(simulation.with_faults(inventory.devices, faults, time.time()))
        for device in inventory.devices:
            if device.health is not before[device.uuid]:
                logger.warning("GPU %s is %s", device.uuid, f"down: {device.reason}" if device.reason else "back")
        await trio.sleep(SIMULATION_INTERVAL)


def _sampled(usage: Usage, samples: Mapping[str, Sample]) -> None:
    usage.sampled(samples, trio.current_time())


def _offer(settings: Settings, inventory: Inventory, usage: Usage) -> plugin.Offer:
    paths = HostPaths(
        libraries=PurePosixPath(settings.host_path),
        libraries_in_container=PurePosixPath(settings.container_path),
        devices=PurePosixPath(settings.dev_directory),
    )
    multi_share = MultiShare(settings.multi_share)
    rules = Rules(settings.framework_hints, strict_distinct=multi_share is MultiShare.STRICT_DISTINCT)
    return plugin.Offer(inventory, usage, paths, Placement(settings.placement), multi_share, rules)


def _source(settings: Settings) -> str:
    if settings.simulate:
        return f"{settings.simulate} SIMULATED GPUs, no driver is used"
    return f"the driver's libraries under {settings.host_path}"
