"""The device-plugin front-end: one registration with the kubelet for each resource, side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu.config.settings import Settings
from sgpu.deviceplugin.servicer import PluginContext
from sgpu.deviceplugin.session import loop_name, stay_registered
from sgpu.deviceplugin.succession import Succession
from sgpu.lib.concurrency import race, wait_until
from sgpu.node.edits import AllocationOptions
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations
from sgpu.observe.watchdog import Watchdog

#: Seconds that a resource which is no longer offered stays registered: time for the kubelet to receive the empty list.
FAREWELL: Final = 2.0


async def run(
    node: NodeState,
    settings: Settings,
    options: AllocationOptions,
    registrations: Registrations,
    counters: Counters,
    watchdog: Watchdog,
    succession: Succession,
) -> NoReturn:
    """Keep each resource registered as soon as there is a GPU for it. Raises rpc.AddressInUseError.

    A resource that fails to register does not stop the others.
    """
    running: set[str] = set()

    async def keep(resource: str) -> None:
        while resource in node.resources():  # it can be wanted again while it is being left
            await race(partial(register, resource), partial(_wait_unwanted, node, resource))
        running.remove(resource)
        registrations.remove(resource)
        watchdog.disarm(loop_name(resource))

    async def register(resource: str) -> None:
        await wait_until(lambda: bool(node.offered(resource)), node.changed)
        context = PluginContext(node, resource, options)
        plugins = Path(settings.plugin_directory)
        await stay_registered(plugins, context, registrations, counters, watchdog, succession)

    async with trio.open_nursery() as nursery:
        while True:
            changed = node.changed.next
            if node.gpus:
                for resource in set(node.resources()) - running:
                    running.add(resource)
                    nursery.start_soon(keep, resource)
            await changed.wait()


async def _wait_unwanted(node: NodeState, resource: str) -> None:
    """Wait until a resource is no longer offered, and the kubelet has had time to receive the empty list."""
    while True:
        await wait_until(lambda: resource not in node.resources(), node.changed)
        await trio.sleep(FAREWELL)
        if resource not in node.resources():
            return
