"""Takes a snapshot of what the daemon knows, from memory and without waiting. Knows neither NVML nor who asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite

import attrs
import trio

from sgpu import __version__
from sgpu.driver.monitor import Monitor
from sgpu.node.claims import claimed_memory
from sgpu.node.gpu import Gpu, Health, Unit
from sgpu.node.offers import Offer
from sgpu.node.rank import UnitLoad
from sgpu.node.state import NodeState
from sgpu.node.usage import ContainerUse
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations
from sgpu.observe.snapshot import CordonSnapshot, GpuSnapshot, ResourceSnapshot, Snapshot
from sgpu.observe.watchdog import Watchdog


@attrs.frozen
class Observer:
    """Reads all of it. `monitor` is None where there is no driver; `standby` says whether another daemon serves;
    `stale_after` are seconds after which a sample is old.

    `wall_clock` is in seconds since the epoch.
    """

    node: NodeState
    registrations: Registrations
    counters: Counters
    watchdog: Watchdog
    monitor: Monitor | None
    standby: Callable[[], bool] = lambda: False
    stale_after: float = 25.0
    clock: Callable[[], float] = trio.current_time
    wall_clock: Callable[[], float] = time.time

    def snapshot(self) -> Snapshot:
        """Return the node as it is now."""
        now, wall = self.clock(), self.wall_clock()
        usage = self.node.usage
        offered = {
            offer.unit.uuid: (resource, offer) for resource, offers in self.node.offers.items() for offer in offers
        }
        loads = usage.loads((offer for _, offer in offered.values()), now)
        gpus = []
        for unit in self.node.shown():
            resource, offer = offered.get(unit.uuid, ("", None))  # the operator's rules may exclude it
            gpus.append(self._unit(unit, resource, offer, loads.get(unit.uuid), now))
        return Snapshot(
            version=__version__,
            time=wall,
            # Before it has seen a GPU, the monitor has what the state file says: a driver that may be gone.
            driver_version=self.monitor.driver_version if self.monitor and gpus else "",
            waiting=self.monitor.waiting if self.monitor and not gpus else "",
            sampled_at=wall - (now - usage.sampled_at) if isfinite(usage.sampled_at) else None,
            holders_known=usage.holders is not None,
            processes_problem=usage.processes_problem,
            resources=tuple(map(self._resource, self.node.offers if gpus else ())),
            gpus=tuple(gpus),
            simulated=self.monitor is None,
            stale_answers=usage.stale_answers,
            standby=self.standby(),
            stale_after=self.stale_after,
            cordoned_elsewhere=tuple(self.node.cordoned.keys() - {gpu.uuid for gpu in self.node.gpus} if gpus else ()),
            api=self.registrations.api,
            api_reason=self.registrations.api_reason,
        )

    def _resource(self, name: str) -> ResourceSnapshot:
        registration = self.registrations.by_resource.get(name)
        if registration is None:  # it has had no GPU to be registered for
            return ResourceSnapshot(name, registered=False, streams=0)
        unpublished = registration.unpublished() if registration.unpublished else None
        return ResourceSnapshot(name, registration.registered, registration.streams, unpublished)

    def _unit(self, unit: Unit, resource: str, offer: Offer | None, load: UnitLoad | None, now: float) -> GpuSnapshot:
        usage = self.node.usage
        figures = usage.fresh(now).get(unit.uuid)
        total = figures.memory_total if figures else unit.memory_total
        free = figures.memory_free if figures else None
        uses = usage.uses(unit.uuid)
        if usage.processes_known and figures is None:
            uses = tuple(_without_figures(use) for use in uses if use.shares)
        return GpuSnapshot(
            uuid=unit.uuid,
            name=unit.name,
            pci_bus_id=unit.gpu.pci_bus_id,
            resource=resource,
            healthy=unit.health is Health.HEALTHY,
            reason=unit.reason,
            since=unit.since,
            memory_total=total,
            memory_used=None if total is None or free is None else total - free,
            memory_free=free,
            utilization=figures.utilization if figures else None,
            shares=offer.shares if offer else 0,
            allocated=load.allocated if load else None,
            withheld=len(offer.withheld) if offer else 0,
            containers=uses,
            parent=unit.gpu.uuid if unit.instance else "",
            mig_profile=unit.instance.profile if unit.instance else "",
            mig_mode=unit.gpu.mig_mode and not unit.instance,
            cordon=_cordon(unit.gpu),
            memory_claimed=claimed_memory(self.node.claims.values(), unit.uuid)
            if self.registrations.api == "dra"
            else None,
        )


def _cordon(gpu: Gpu) -> CordonSnapshot | None:
    if gpu.cordon is None:
        return None
    problem = gpu.held if gpu.cordon.released else ""
    return CordonSnapshot(gpu.cordon.reason, gpu.cordon.since, gpu.released, problem)


def _without_figures(use: ContainerUse) -> ContainerUse:
    """Return the use without figures: without fresh ones of the GPU, those of its processes are unknown, too."""
    return attrs.evolve(use, memory_used=None, utilization=None, processes=0, exceeded=None)
