"""The supervision tree: sources that feed the node's state, front-ends that offer it, observers that show it.

Knows what runs beside what and what ends what; not what a GPU is.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import trio

from sgpu import __version__
from sgpu.config.load import Loaded
from sgpu.config.settings import Settings
from sgpu.config.values import parse_tolerance, split_names
from sgpu.config.watch import watch_settings
from sgpu.deviceplugin import registrar
from sgpu.deviceplugin.messages import check_size
from sgpu.driver import fault_file, limit_file
from sgpu.driver.health import FaultRecord
from sgpu.driver.messages import WorkerConfig
from sgpu.driver.monitor import Monitor
from sgpu.driver.simulated import simulate
from sgpu.driver.supervisor import supervise
from sgpu.node.guard import GuardPolicy, Sample
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters
from sgpu.observe.observer import Observer
from sgpu.observe.registrations import Registrations
from sgpu.observe.watchdog import Watchdog, exit_when_stuck
from sgpu.pods.guard import Guard, GuardOptions
from sgpu.pods.limiter import LimitOptions, limit_containers
from sgpu.pods.processes import Places
from sgpu.pods.watch import WatchOptions, watch_pods

logger = logging.getLogger(__name__)


async def run(loaded: Loaded, reload: Callable[[], Loaded]) -> None:
    """Run until SIGTERM or SIGINT. `reload` reads the settings again and raises UsageError; it may block.

    Raises, in exception groups, OffersRefusedError and rpc.AddressInUseError, which the operator has to put right.
    All else is waited out.
    """
    settings = loaded.settings
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until `watch_settings` listens, which reads the file once more
    logger.info("sgpu %s offers GPUs from %s", __version__, _source(settings))
    node = NodeState(loaded.policy, settings.sample_interval, check_size)
    counters, watchdog = Counters(), Watchdog()
    registrations = Registrations(counters)
    async with trio.open_nursery() as nursery:
        stop_on_signal(nursery.cancel_scope)
        nursery.start_soon(exit_when_stuck)
        # Sources
        monitor = None
        if settings.simulate:
            nursery.start_soon(simulate, node, settings.simulate, settings.simulate_faults)
        else:
            monitor = Monitor(node, loaded.xids, await _load_faults(settings), counters.nvml_errors)
            nursery.start_soon(_watch_driver, settings, monitor, node, watchdog)
        nursery.start_soon(limit_containers, _limit_options(settings), node)
        guard = _guard(settings, node, counters, nursery)
        nursery.start_soon(watch_pods, _watch_options(settings), node, partial(watchdog.arm, "pods"), guard)
        nursery.start_soon(watch_settings, loaded, reload, partial(_apply, node), counters.reloaded)
        # Front-ends
        nursery.start_soon(registrar.run, node, settings, registrations, counters, watchdog)
        # Observers
        if settings.metrics_address or settings.status_socket:
            # Imported here, and in a thread: a registration does not wait for it.
            endpoints = await trio.to_thread.run_sync(_import_endpoints)
            observer = Observer(node, registrations, counters, watchdog, monitor)
            nursery.start_soon(endpoints.run, observer, settings.metrics_address, settings.status_socket)


def stop_on_signal(scope: trio.CancelScope) -> None:
    """Cancel the scope at SIGTERM and SIGINT, however often they come.

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


async def _watch_driver(settings: Settings, monitor: Monitor, node: NodeState, watchdog: Watchdog) -> None:
    config = WorkerConfig(
        host_path=settings.host_path,
        dev_directory=settings.dev_directory,
        sysfs_directory=settings.sysfs_directory,
        interval=settings.sample_interval,
    )
    boot_id = fault_file.read_boot_id()
    file = Path(settings.state_file).with_name(limit_file.NAME) if settings.state_file else None
    sender = limit_file.LimitSender(node.enforcement, file, boot_id)
    await sender.load()
    async with trio.open_nursery() as nursery:
        expect = partial(watchdog.arm, "driver")
        nursery.start_soon(supervise, config, monitor, settings.driver_timeout, expect, sender.feed)
        if settings.state_file:
            nursery.start_soon(fault_file.save_changes, Path(settings.state_file), boot_id, monitor)


async def _load_faults(settings: Settings) -> FaultRecord:
    if not settings.state_file:
        return FaultRecord()
    return await trio.to_thread.run_sync(fault_file.load, Path(settings.state_file), fault_file.read_boot_id())


def _watch_options(settings: Settings) -> WatchOptions:
    return WatchOptions(
        Path(settings.pod_resources_socket),
        settings.sample_interval,
        settings.memory_watermark,
        _places(settings),
        Path(settings.plugin_directory),
    )


def _limit_options(settings: Settings) -> LimitOptions:
    return LimitOptions(
        Path(settings.cgroup_directory),
        Path(settings.plugin_directory),
        Path(settings.container_log_directory),
        settings.sample_interval,
    )


def _places(settings: Settings) -> Places:
    return Places(Path(settings.proc_directory), Path(settings.container_log_directory))


def _guard(
    settings: Settings, node: NodeState, counters: Counters, nursery: trio.Nursery
) -> Callable[[Sample | None], None]:
    """Return the memory guard, which is called with each sample, and ends processes in the nursery."""
    if settings.memory_guard == "off":
        return lambda sample: None
    part, fixed = parse_tolerance(settings.memory_guard_tolerance)
    exempt = frozenset(split_names(settings.memory_guard_exempt_namespaces))
    policy = GuardPolicy(settings.memory_guard_threshold, part, fixed, exempt)
    options = GuardOptions(policy, settings.memory_guard == "terminate", settings.memory_guard_grace)
    return Guard(options, _places(settings), node, counters.guard_actions, nursery).look


def _apply(node: NodeState, policy: Policy) -> str:
    """Apply a policy, and say what is offered now."""
    node.set_policy(policy)
    shares = {resource: sum(offer.shares for offer in node.offered(resource)) for resource in policy.resources()}
    if not node.gpus:
        return "nothing, as there is no GPU yet"
    return ", ".join(f"{count} x {resource}" for resource, count in shares.items())


def _import_endpoints() -> ModuleType:
    from sgpu.observe import endpoints

    return endpoints


def _source(settings: Settings) -> str:
    if settings.simulate:
        return f"{settings.simulate} SIMULATED GPUs, no driver is used"
    return f"the driver's libraries under {settings.host_path}"
