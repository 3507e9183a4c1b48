"""The DRA front-end: the node's slices at the API server, and the plugin that the kubelet calls.

Knows what runs beside what; not what a claim is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu import rpc
from sgpu.config.settings import Settings
from sgpu.dra import registrar
from sgpu.dra.driver import DRAPlugin, ResourceHealth, claim_path
from sgpu.dra.pci import pcie_root
from sgpu.dra.prepared import Places, PreparedClaims
from sgpu.dra.publisher import Publisher
from sgpu.dra.sharers import follow_pods
from sgpu.dra.slices import DRIVER, MANIFEST, MemoryDefault, SliceOptions
from sgpu.driver.fault_file import read_boot_id
from sgpu.kubeapi import ApiServer, ApiServerError, find_access, open_api_server
from sgpu.lib.concurrency import race
from sgpu.lib.logs import OnChange
from sgpu.lib.quantity import parse_quantity
from sgpu.node.claims import used_parts
from sgpu.node.edits import AllocationOptions
from sgpu.node.rank import Placement
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registration, Registrations

logger = logging.getLogger(__name__)

#: Seconds between looks whether a device plugin still has the resource.
BESIDE_INTERVAL: Final = 5.0


async def run(
    node: NodeState,
    settings: Settings,
    options: AllocationOptions,
    registrations: Registrations,
    counters: Counters,
    driver_version: Callable[[], str],
    leaving: trio.Event,
) -> None:
    """Publish the node's units and prepare claims of them, until cancelled.

    From `leaving` on, nothing is published: a daemon that takes over may have other settings.

    Raises ApiServerError outside of a pod, and rpc.AddressInUseError.
    """
    access = find_access(settings.api_server, os.environ, "-api dra", MANIFEST)
    paths = registrar.sockets(Path(settings.dra_plugin_directory), Path(settings.dra_registry_directory))
    places = Places(paths[0].service.parent, Path(settings.cdi_directory))
    sysfs = Path(settings.sysfs_directory)
    claims = PreparedClaims(node, places, read_boot_id(), options)

    def slice_options() -> SliceOptions:
        limited = any(offer.limit_factor for each in node.offers.values() for offer in each)
        return SliceOptions(
            settings.node_name,
            MemoryDefault.FAIR if limited else MemoryDefault(settings.dra_memory_default),
            Placement(settings.placement),
            settings.dra_evict,
            driver_version=driver_version(),
            pcie_roots={gpu.pci_bus_id: pcie_root(sysfs, gpu.pci_bus_id) for gpu in node.gpus if not gpu.simulated},
        )

    def used() -> dict[str, float]:
        return dict(used_parts(node.claims.values(), (offer for each in node.offers.values() for offer in each)))

    async with open_api_server(access) as api:
        await claims.load()
        if not node.claims:  # else this is a restart, and pods that end must not wait for the API server
            await wait_no_device_plugin(api, settings.node_name, node.policy.resources())
        driver = DRAPlugin(
            node, api, claims, settings.node_name, limits_fail_open=settings.memory_limits_failure == "open"
        )
        table = rpc.routes([driver.service, ResourceHealth(node, settings.node_name).service])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(registrar.stay_registered, paths, table, registrations, counters)
            publisher = Publisher(api, node, slice_options, used)
            nursery.start_soon(race, publisher.run, leaving.wait)
            nursery.start_soon(claims.follow)
            nursery.start_soon(follow_pods, api, node, claims, settings.node_name)
            nursery.start_soon(_show, node, registrations, lambda: publisher.published.problem)
            await forget_deleted(api, node, claims)


async def wait_no_device_plugin(api: ApiServer, node_name: str, resources: Iterable[str]) -> None:
    """Return once the kubelet has no device plugin for any of these resources.

    The scheduler prefers a device plugin to DRA, and counts the shares of each by itself.
    """
    problem = OnChange(logger, logging.WARNING)  # no error: seen at each change of a node from a device plugin to DRA
    while True:
        try:
            found = await api.get(f"/api/v1/nodes/{node_name}")
            allocatable = found.get("status", {}).get("allocatable", {})
            live = [name for name in resources if parse_quantity(str(allocatable.get(name, "0")))]
            if not live:
                return
            problem.report(
                f"waiting: {node_name} still lists {', '.join(live)} of a device plugin, and one resource can't be "
                f"offered both ways; one that has ended is gone within about 10 s; stop any other, or use "
                f"-api device-plugin"
            )
        except ApiServerError as error:
            problem.report(f"cannot read the Node {node_name}, trying again: {error}")
        await trio.sleep(BESIDE_INTERVAL)


async def _show(node: NodeState, registrations: Registrations, unpublished: Callable[[], str]) -> NoReturn:
    """Show the driver's registration as that of each resource."""
    registration = registrations.by_resource.setdefault(DRIVER, Registration(changed=registrations.changed))
    registration.unpublished = unpublished
    while True:
        changed = node.changed.next
        registrations.by_resource.update(dict.fromkeys(node.policy.resources(), registration))
        await changed.wait()


async def forget_deleted(api: ApiServer, node: NodeState, claims: PreparedClaims) -> None:
    """Unprepare the claims that were deleted while sgpu was away, and that the kubelet no longer knows either."""
    for claim in list(node.claims.values()):
        try:
            found = await api.get(claim_path(claim.namespace, claim.name))
            gone = found["metadata"]["uid"] != claim.uid
        except ApiServerError as error:
            gone = error.not_found
        if gone:
            logger.info("claim %s does not exist any more: forgetting it", claim)
            await claims.unprepare(claim.uid)
