"""The supervision tree: sources that feed the node's state, front-ends that offer it, observers that show it.

Knows what runs beside what and what ends what; not what a GPU is.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
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
from sgpu.config.worker import worker_config
from sgpu.deviceplugin import registrar
from sgpu.deviceplugin.messages import check_size
from sgpu.deviceplugin.place import Place
from sgpu.deviceplugin.succession import Succession, confirm, hand_over
from sgpu.driver import fault_file, limit_file
from sgpu.driver.health import FaultRecord
from sgpu.driver.monitor import Monitor
from sgpu.driver.process import Feed, Worker
from sgpu.driver.simulated import simulate
from sgpu.driver.supervisor import supervise
from sgpu.lib.concurrency import Broadcast
from sgpu.lib.threads import run_in_thread
from sgpu.node.edits import AllocationOptions, HostPaths
from sgpu.node.guard import GuardPolicy, Sample
from sgpu.node.policy import Policy
from sgpu.node.rank import MultiShare, Placement
from sgpu.node.state import NodeState
from sgpu.node.usage import STALE_AFTER
from sgpu.observe.cordons import Cordons
from sgpu.observe.counters import Counters
from sgpu.observe.labels import labels
from sgpu.observe.nfd import keep_feature_file
from sgpu.observe.observer import Observer
from sgpu.observe.registrations import Registrations
from sgpu.observe.watchdog import Watchdog, exit_when_stuck
from sgpu.pods.guard import Guard, GuardOptions
from sgpu.pods.limiter import LimitOptions, limit_containers
from sgpu.pods.processes import Places
from sgpu.pods.watch import WatchOptions, watch_pods

logger = logging.getLogger(__name__)


async def run(
    loaded: Loaded, reload: Callable[[], Loaded], alive: int | None = None, first_worker: Worker | None = None
) -> None:
    """Run until SIGTERM or SIGINT. `reload` reads the settings again and raises UsageError; it may block.

    `alive`: a pipe for signs of life, as long as someone reads it (`parent`). `first_worker`: the driver's process, if
    it runs already.

    Raises, in exception groups, OffersRefusedError, PlaceTakenError, rpc.AddressInUseError and DirectoryRemovedError,
    which the operator has to put right. All else is waited out.
    """
    started, settings = time.time(), loaded.settings
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until `watch_settings` listens, which reads the file once more
    logger.info("sgpu %s offers GPUs from %s", __version__, _source(settings))
    node = NodeState(loaded.policy, settings.sample_interval, check_size)
    counters, watchdog = Counters(), Watchdog()
    registrations = Registrations(counters)
    place = Place(Path(settings.plugin_directory), settings.resource_name, standby=settings.standby)
    succession = Succession()
    # What answers the kubelet outlives the rest, until a daemon that stands by has taken over.
    async with trio.open_nursery() as front_ends:
        async with trio.open_nursery() as nursery:
            stop_on_signal(nursery.cancel_scope, front_ends.cancel_scope)
            nursery.start_soon(partial(exit_when_stuck, alive=partial(_give_sign, alive)))
            nursery.start_soon(_stop_with_parent, alive, nursery.cancel_scope)
            front_ends.start_soon(place.keep)
            await place.decided.wait()
            # Sources
            monitor = None
            boot_id = fault_file.read_boot_id()
            cordons = Cordons(node, _path(settings.cordon_file), boot_id)
            await cordons.load()
            sender = limit_file.LimitSender(node.enforcement, _limit_file(settings), boot_id)
            if settings.simulate:
                nursery.start_soon(simulate, node, settings.simulate, settings.simulate_faults, settings.simulate_mig)
            else:
                record = FaultRecord() if place.waiting else await _load_faults(settings)
                monitor = Monitor(node, loaded.xids, record, counters.nvml_errors)
                # Beside the front-ends: a container that is about to start may wait for a memory limit.
                driver = (settings, monitor, watchdog, sender.feed, node.changed, first_worker)
                front_ends.start_soon(_watch_driver, *driver)
            in_place = trio.Event()
            guard = _guard(settings, node, counters, nursery, in_place)
            nursery.start_soon(watch_pods, _watch_options(settings), node, partial(watchdog.arm, "pods"), guard)
            nursery.start_soon(watch_settings, loaded, reload, partial(_apply, node), counters.reloaded)
            nursery.start_soon(_move_in, place, settings, monitor, sender, cordons, succession, in_place)
            nursery.start_soon(_after, in_place, cordons.save_releases)
            # Front-ends
            leaving = trio.Event()
            nursery.start_soon(_set_at_end, leaving)
            served = (node, settings, _allocation_options(settings), registrations, counters)
            offer: dict[str, Callable[[], Awaitable[None]]] = {
                "device-plugin": partial(registrar.run, *served, watchdog, succession)
            }
            if settings.api != "device-plugin":
                auto, frontend = await run_in_thread(_import_dra)
                offer["dra"] = partial(frontend.run, *served, partial(getattr, monitor, "driver_version", ""), leaving)
                offer["auto"] = partial(_offer, partial(auto.decide, settings, node.policy), offer, registrations)
            registrations.api = settings.api if settings.api != "auto" else ""
            front_ends.start_soon(_after, in_place, offer[settings.api])
            front_ends.start_soon(_after, in_place, partial(limit_containers, _limit_options(settings), node))
            nursery.start_soon(confirm, place, node, registrations)
            # Observers
            sources = (node, registrations, counters, watchdog, monitor)
            stale_after = STALE_AFTER * settings.sample_interval + settings.driver_timeout
            observer = Observer(*sources, lambda: place.waiting, stale_after)
            if settings.node_labels == "nfd":
                directory = Path(settings.node_labels_directory)
                nursery.start_soon(keep_feature_file, directory, lambda: labels(observer.snapshot()), in_place)
            if settings.node_labels == "api":
                node_labels = await run_in_thread(_import_node_labels)
                access = (settings.node_name, settings.api_server)
                kept = (*access, lambda: labels(observer.snapshot()), in_place, lambda: place.has_standby)
                nursery.start_soon(node_labels.keep_node_labels, *kept)
            if settings.events:
                writer = await run_in_thread(_import_event_writer)
                logs = Path(settings.container_log_directory)
                written = (
                    node,
                    settings.node_name,
                    settings.api_server,
                    logs,
                    started,
                    in_place,
                    lambda: place.waiting,
                )
                nursery.start_soon(writer.write_events, *written)
            if settings.metrics_address or settings.status_socket:
                # Imported here, and in a thread: a registration does not wait for it.
                endpoints = await run_in_thread(_import_endpoints)
                addresses = (settings.metrics_address, settings.status_socket)
                serve = partial(endpoints.run, observer, *addresses, in_place, cordons, page=settings.metrics_page)
                nursery.start_soon(serve)
        await hand_over(place, succession, node, registrations)
        front_ends.cancel_scope.cancel()


def stop_on_signal(scope: trio.CancelScope, rest: trio.CancelScope) -> None:
    """Cancel the scope at SIGTERM and SIGINT, however often they come, and the rest too from the second one on.

    trio's own receiver hands a signal that comes twice back to the handler of before, which would end the process
    in the middle of its clean-up.
    """
    token = trio.lowlevel.current_trio_token()

    def stop(number: int) -> None:
        if scope.cancel_called:
            rest.cancel()
        else:
            logger.info("%s: stopping", signal.Signals(number).name)
            scope.cancel()

    def handler(number: int, _: object) -> None:
        with suppress(trio.RunFinishedError):  # stopped already
            token.run_sync_soon(stop, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _give_sign(alive: int | None) -> None:
    if alive is not None:
        with suppress(BrokenPipeError):
            os.write(alive, b".")


async def _stop_with_parent(alive: int | None, scope: trio.CancelScope) -> None:
    """Cancel the scope when the parent process has ended, with which our container or service has, too."""
    if alive is not None:
        await trio.lowlevel.wait_readable(alive)  # a pipe that nobody reads any more is an error, which wakes
        logger.warning("the parent process has ended: stopping")
        scope.cancel()


async def _move_in(
    place: Place,
    settings: Settings,
    monitor: Monitor | None,
    sender: limit_file.LimitSender,
    cordons: Cordons,
    succession: Succession,
    in_place: trio.Event,
) -> None:
    """Take the place, and what a predecessor has recorded by then: cordons, faults and limits, recorded here then."""
    succession.took_over = place.waiting
    await place.taken.wait()
    if succession.took_over:
        await cordons.load()
    if monitor and succession.took_over:
        monitor.adopt(await _load_faults(settings))
    await sender.load()
    in_place.set()
    if monitor and settings.state_file:
        await fault_file.save_changes(Path(settings.state_file), fault_file.read_boot_id(), monitor)


async def _set_at_end(event: trio.Event) -> None:
    """Set the event when this is cancelled."""
    try:
        await trio.sleep_forever()
    finally:
        event.set()


async def _after(event: trio.Event, function: Callable[[], Awaitable[None]]) -> None:
    await event.wait()
    await function()


async def _offer(
    decide: Callable[[], Awaitable[tuple[bool, str, bool]]],
    offer: Mapping[str, Callable[[], Awaitable[None]]],
    registrations: Registrations,
) -> None:
    """Offer the node's units in the way that is chosen once: pods that have something by it need it to end."""
    dra, reason, _ = await decide()
    registrations.api, registrations.api_reason = "dra" if dra else "device-plugin", reason
    logger.info("-api auto: offering GPUs as -api %s does: %s", registrations.api, reason)
    await offer[registrations.api]()


async def _watch_driver(
    settings: Settings,
    monitor: Monitor,
    watchdog: Watchdog,
    feed: Feed,
    changed: Broadcast,
    first: Worker | None,
) -> None:
    config, expect = worker_config(settings), partial(watchdog.arm, "driver")
    await supervise(config, monitor, settings.driver_timeout, expect, feed, monitor.to_release, changed, first)


async def _load_faults(settings: Settings) -> FaultRecord:
    if not settings.state_file:
        return FaultRecord()
    return await run_in_thread(fault_file.load, Path(settings.state_file), fault_file.read_boot_id())


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _limit_file(settings: Settings) -> Path | None:
    return Path(settings.state_file).with_name(limit_file.NAME) if settings.state_file else None


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
    settings: Settings, node: NodeState, counters: Counters, nursery: trio.Nursery, in_place: trio.Event
) -> Callable[[Sample | None], None]:
    """Return the memory guard, which is called with each sample, and ends processes in the nursery, once in place."""
    if settings.memory_guard == "off":
        return lambda sample: None
    part, fixed = parse_tolerance(settings.memory_guard_tolerance)
    exempt = frozenset(split_names(settings.memory_guard_exempt_namespaces))
    policy = GuardPolicy(settings.memory_guard_threshold, part, fixed, exempt)
    options = GuardOptions(policy, settings.memory_guard == "terminate", settings.memory_guard_grace)
    guard = Guard(options, _places(settings), node, counters.guard_actions, nursery)
    return lambda sample: guard.look(sample) if in_place.is_set() else None


def _apply(node: NodeState, policy: Policy) -> str:
    """Apply a policy, and say what is offered now."""
    node.set_policy(policy)
    shares = {resource: sum(offer.shares for offer in node.offered(resource)) for resource in node.resources()}
    if not node.gpus:
        return "nothing, as there is no GPU yet"
    return ", ".join(f"{count} x {resource}" for resource, count in shares.items())


def _allocation_options(settings: Settings) -> AllocationOptions:
    return AllocationOptions(
        HostPaths(
            libraries=settings.host_path,
            libraries_in_container=settings.container_path,
            devices=settings.dev_directory,
        ),
        framework_hints=settings.framework_hints,
        placement=Placement(settings.placement),
        multi_share=MultiShare(settings.multi_share),
        limits_fail_open=settings.memory_limits_failure == "open",
    )


def _import_dra() -> tuple[ModuleType, ModuleType]:
    """Import it only where it is used: a daemon with a device plugin should not pay for HTTP and TLS."""
    from sgpu.dra import auto, frontend

    return auto, frontend


def _import_event_writer() -> ModuleType:
    from sgpu.observe import event_writer

    return event_writer


def _import_node_labels() -> ModuleType:
    from sgpu.observe import node_labels

    return node_labels


def _import_endpoints() -> ModuleType:
    from sgpu.observe import endpoints

    return endpoints


def _source(settings: Settings) -> str:
    if settings.simulate:
        instances = f" with MIG instances {settings.simulate_mig}" if settings.simulate_mig else ""
        return f"{settings.simulate} SIMULATED GPUs{instances}, no driver is used"
    return f"the driver's libraries under {settings.host_path}"
