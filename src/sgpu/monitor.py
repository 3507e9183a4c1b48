"""Reports and events of the driver → what the node offers: one condition for each GPU, and the inventory.

Decides at once and waits for nothing; knows neither processes nor gRPC. The verdicts themselves are `health`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

import attrs
import trio

from sgpu import health
from sgpu.device import Device, Health
from sgpu.health import Condition, Cure, Fault
from sgpu.inventory import Inventory
from sgpu.logs import OnChange
from sgpu.report import DriverEvent, EventKind, Failure, GpuReport, NotReady, Report
from sgpu.usage import Sample
from sgpu.xids import XidClass, XidPolicy, describe

logger = logging.getLogger(__name__)

#: Events other than XIDs that are a fault by themselves.
EVENT_FAULTS: Final = {
    EventKind.DOUBLE_BIT_ECC: ("a double-bit ECC error; reset the GPU", Cure.RESET),
    EventKind.NON_FATAL_POISON: ("poisoned memory was contained; its application was stopped", Cure.QUARANTINE),
    EventKind.FATAL_POISON: ("poisoned memory was not contained; reset the GPU", Cure.RESET),
    EventKind.GPU_UNAVAILABLE: ("the GPU is unavailable; reset it, or reboot the node", Cure.RESET),
}


@attrs.frozen
class Memory:
    """What outlives the process: the faults that only evidence ends, and the driver they happened under."""

    driver_version: str = ""
    faults: Mapping[str, tuple[Fault, ...]] = attrs.Factory(dict)


def boot_time() -> float:
    """Seconds since the node was started, which nobody sets: what a quarantine goes by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Monitor:
    """All that is known of the node's GPUs, kept in the order in which they were first seen."""

    def __init__(
        self,
        inventory: Inventory,
        shares: int,
        policy: XidPolicy,
        memory: Memory,
        clock: Callable[[], float] = boot_time,
        sampled: Callable[[Mapping[str, Sample]], None] = lambda samples: None,
        failed: Callable[[Failure], None] = lambda failure: None,
    ) -> None:
        self._sampled = sampled
        #: Told of each.
        self.failed = failed
        self._inventory = inventory
        self._shares = shares
        self._policy = policy
        self._clock = clock
        self._reports: dict[str, GpuReport] = {}
        self._conditions = {uuid: Condition(faults=faults) for uuid, faults in memory.faults.items()}
        #: Empty as long as none was seen.
        self.driver_version = memory.driver_version
        #: Why there is no GPU to ask; empty if there is.
        self.waiting = ""
        self._driver_away = False
        self._driver = OnChange(logger, logging.INFO)
        self._waiting = OnChange(logger, logging.WARNING)
        self._problems = OnChange(logger, logging.WARNING)
        #: Set, and replaced, whenever `memory` is another.
        self.memory_changed = trio.Event()
        self.memory = memory

    def report(self, report: Report) -> None:
        """A poll that came back."""
        now = self._clock()
        self.waiting = ""
        self._waiting.clear()
        self._problems.report("; ".join(report.problems)) if report.problems else self._problems.clear()
        restarted = self._driver_away or self.driver_version not in ("", report.driver_version)
        if restarted:
            self._driver.clear()
            self._conditions = {uuid: health.reloaded(known) for uuid, known in self._conditions.items()}
        self._driver.report(f"driver {report.driver_version} ({report.library})")
        self.driver_version, self._driver_away = report.driver_version, False
        gone = set(self._conditions) - {gpu.uuid for gpu in report.gpus} - set(report.unasked)
        for gpu in report.gpus:
            if gpu.uuid not in self._reports:
                logger.info("GPU %s: %s at %s", gpu.uuid, gpu.name, gpu.pci_bus_id)
            self._reports[gpu.uuid] = gpu
            condition = self._conditions.get(gpu.uuid, Condition())
            self._conditions[gpu.uuid] = health.polled(condition, gpu, now)
        self._sampled(
            {gpu.uuid: Sample(gpu.memory_total, gpu.memory_free, gpu.utilisation, gpu.processes) for gpu in report.gpus}
        )
        for uuid in gone:
            nodeless = uuid in report.nodeless  # which no reset brings about
            reason = "its device node is not there" if nodeless else "the driver no longer answers for it"
            self._conditions[uuid] = health.silent(self._conditions[uuid], reason, gone=not nodeless)
        self._publish()

    def not_ready(self, trouble: NotReady) -> None:
        """There is no driver to ask, yet or any more."""
        self.waiting = trouble.reason
        self._waiting.report(f"waiting for a GPU: {trouble.reason}")
        self._driver_away = self._driver_away or trouble.gone
        self.unanswered("", "its driver is not there")

    def unanswered(self, uuid: str, reason: str) -> None:
        """A call about this GPU, or about the driver as a whole if empty, did not come back."""
        for known in self._reports:
            if uuid in ("", known):
                self._conditions[known] = health.silent(self._conditions[known], reason, gone=False)
        self._publish()

    def event(self, event: DriverEvent) -> None:
        """Something happened to a GPU."""
        fault = self._fault(event)
        if fault is None or event.uuid not in self._reports:
            return
        self._conditions[event.uuid] = health.struck(self._conditions[event.uuid], fault)
        self._publish()

    def _fault(self, event: DriverEvent) -> Fault | None:
        if event.asks_for_poll:
            return None  # the poll comes at once, and tells what the action is now
        if event.kind is EventKind.XID:
            xid = describe(event.xid)
            xid_class = self._policy.classify(event.xid)
            words = f"XID {event.xid}: {xid.meaning}"
            if xid_class is XidClass.APPLICATION:
                logger.info("GPU %s: %s; an application's fault, ignored", event.uuid, words)
                return None
            cure = Cure.QUARANTINE if xid_class is XidClass.TRANSIENT else Cure.RESET
            return Fault(f"{words}; {xid.action}", self._clock(), cure)
        reason, cure = EVENT_FAULTS[event.kind]
        return Fault(reason, self._clock(), cure)

    def _publish(self) -> None:
        devices = tuple(self._device(report) for report in self._reports.values())
        self._inventory.replace(devices)
        self._remember()

    def _remember(self) -> None:
        faults = {uuid: condition.faults for uuid, condition in self._conditions.items() if condition.faults}
        memory = Memory(self.driver_version, faults)
        if memory != self.memory:
            self.memory = memory
            self.memory_changed.set()
            self.memory_changed = trio.Event()

    def _device(self, report: GpuReport) -> Device:
        reasons = self._conditions[report.uuid].reasons
        before = self._inventory.find_device(report.uuid)
        new = Device(
            uuid=report.uuid,
            name=report.name,
            pci_bus_id=report.pci_bus_id,
            shares=self._shares,
            device_nodes=report.device_nodes,
            memory_bytes=report.memory_total,
            numa_node=report.numa_node,
            health=Health.UNHEALTHY if reasons else Health.HEALTHY,
            reason="; ".join(reasons),
            since=time.time(),
        )
        _log_change(before, new)
        return attrs.evolve(new, since=before.since) if before and before.health is new.health else new


def _log_change(old: Device | None, new: Device) -> None:
    before = old.reason if old else ""
    if new.reason and new.reason != before:
        logger.warning("GPU %s (%s): all its shares are unhealthy: %s", new.uuid, new.name, new.reason)
    elif before and not new.reason:
        logger.warning("GPU %s (%s): healthy again (it was down: %s)", new.uuid, new.name, before)
