"""What the daemon knows, gathered from those who know it: from memory, and without waiting for anything.

Knows neither NVML nor who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite

import attrs

from sgpu import __version__
from sgpu.catalog import Catalog
from sgpu.device import Device, Health
from sgpu.inventory import Inventory
from sgpu.monitor import Monitor
from sgpu.placement import GpuLoad
from sgpu.record import Record
from sgpu.snapshot import ContainerUse, GpuSnapshot, ResourceSnapshot, Snapshot
from sgpu.usage import Sample, Usage


@attrs.frozen
class Observer:
    """Sees all of it. `monitor` is None where there is no driver; `wall_clock` is in seconds since the epoch."""

    node: Inventory
    catalog: Catalog
    usage: Usage
    record: Record
    monitor: Monitor | None
    wall_clock: Callable[[], float] = time.time

    def snapshot(self) -> Snapshot:
        """The node as it is now."""
        now, wall = self.record.clock(), self.wall_clock()
        offered = {
            device.uuid: (resource, device)
            for resource, inventory in self.catalog.inventories.items()
            for device in inventory.devices
        }
        loads = self.usage.loads(self.node.devices, now)
        samples = self.usage.fresh(now)
        gpus = []
        for device in self.node.devices:
            # One that the operator's rules exclude has no shares.
            resource, shared = offered.get(device.uuid, ("", attrs.evolve(device, shares=0)))
            gpus.append(self._gpu(device, shared, resource, loads[device.uuid], samples.get(device.uuid)))
        return Snapshot(
            version=__version__,
            time=wall,
            # Before it has told of a GPU, the monitor has what the state file says: a driver that may be gone.
            driver_version=self.monitor.driver_version if self.monitor and gpus else "",
            waiting=self.monitor.waiting if self.monitor and not gpus else "",
            sampled_at=wall - (now - self.usage.sampled_at) if isfinite(self.usage.sampled_at) else None,
            holders_known=self.usage.holders is not None,
            processes_trouble=self.usage.processes_trouble,
            resources=tuple(map(self._resource, self.catalog.inventories)),
            gpus=tuple(gpus),
            simulated=self.monitor is None,
        )

    def _resource(self, name: str) -> ResourceSnapshot:
        registration = self.record.registrations.get(name)
        if registration is None:  # it has had no GPU to be registered for
            return ResourceSnapshot(name, registered=False, streams=0)
        return ResourceSnapshot(name, registration.registered, registration.streams)

    def _gpu(self, device: Device, shared: Device, resource: str, load: GpuLoad, sample: Sample | None) -> GpuSnapshot:
        total = sample.memory_total if sample else device.memory_bytes
        free = sample.memory_free if sample else None
        uses = self.usage.uses(device.uuid)
        if self.usage.processes_known and sample is None:
            uses = tuple(_without_figures(use) for use in uses if use.shares)
        return GpuSnapshot(
            uuid=device.uuid,
            name=device.name,
            pci_bus_id=device.pci_bus_id,
            resource=resource,
            healthy=device.health is Health.HEALTHY,
            reason=device.reason,
            since=device.since,
            memory_total=total,
            memory_used=None if total is None or free is None else total - free,
            memory_free=free,
            utilisation=sample.utilisation if sample else None,
            shares=shared.shares,
            allocated=load.allocated,
            withheld=len(shared.withheld),
            containers=uses,
        )


def _without_figures(use: ContainerUse) -> ContainerUse:
    """Of a GPU that no longer tells: what its processes took is as little known as what it has free."""
    return attrs.evolve(use, memory_used=None, utilisation=None, processes=0)
