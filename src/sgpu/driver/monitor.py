"""Reports and events of the driver → the node's GPUs, each with a condition. The verdicts themselves are `health`'s.

Decides at once and waits for nothing; knows neither processes nor gRPC.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import attrs
import trio

from sgpu.driver import health
from sgpu.driver.health import Clearance, Condition, Fault, FaultRecord
from sgpu.driver.instances import InstanceConditions, instances_of, of_instance, unit_figures, with_known_facts
from sgpu.driver.messages import (
    DriverEvent,
    EventKind,
    Failure,
    GpuReport,
    InstanceReport,
    LimitReport,
    NotReady,
    ReleasedGpu,
    Report,
)
from sgpu.driver.xids import XidClass, XidPolicy, describe
from sgpu.lib.concurrency import Broadcast
from sgpu.lib.logs import OnChange
from sgpu.node.figures import Figures
from sgpu.node.gpu import MIG_PREFIX, Gpu, Health, MigInstance, label
from sgpu.node.policy import parse_bus_id
from sgpu.node.state import NodeState

logger = logging.getLogger(__name__)

#: Seconds between two lines about the same ignored XID of a GPU.
LOG_INTERVAL: Final = 60.0
#: Events other than XIDs that are a fault by themselves.
EVENT_FAULTS: Final = {
    EventKind.DOUBLE_BIT_ECC: ("a double-bit ECC error; reset the GPU", Clearance.RESET),
    EventKind.NON_FATAL_POISON: ("poisoned memory was contained; its application was stopped", Clearance.QUARANTINE),
    EventKind.FATAL_POISON: ("poisoned memory was not contained; reset the GPU", Clearance.RESET),
    EventKind.GPU_UNAVAILABLE: ("the GPU is unavailable; reset it, or reboot the node", Clearance.RESET),
}


def boot_time() -> float:
    """Return the seconds since the boot, a clock that nobody sets: quarantines are measured by it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Monitor:
    """All that is known of the node's GPUs, in the order in which they were first seen.

    `errors` counts the calls of libnvidia-ml that failed, by function and code. `clock` gives seconds since the boot.
    """

    def __init__(
        self,
        node: NodeState,
        policy: XidPolicy,
        record: FaultRecord,
        errors: Counter[tuple[str, str]],
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self._node = node
        self._policy = policy
        self._errors = errors
        self._clock = clock
        self._reports: dict[str, GpuReport] = {}
        self._gpus: dict[str, Gpu] = {}
        recorded = {uuid: Condition(faults=faults) for uuid, faults in record.faults.items()}
        self._conditions = {uuid: known for uuid, known in recorded.items() if not uuid.startswith(MIG_PREFIX)}
        self._instances = InstanceConditions({uuid: recorded[uuid] for uuid in recorded.keys() - self._conditions})
        #: Empty as long as no driver was seen.
        self.driver_version = record.driver_version
        #: Why there is no GPU to ask; empty if there is.
        self.waiting = ""
        self._driver_away = False
        self._silent: dict[str, str] = {}  # why a GPU by itself did not answer, until it does
        self._left_alone: frozenset[str] = frozenset()  # the UUIDs of GPUs that the driver's process does not open
        self._held = ""  # why they can't be reset all the same
        self._ignored: dict[tuple[str, int], tuple[float, int]] = {}  # when it was logged, how many since
        self._driver = OnChange(logger, logging.INFO)
        self._waiting = OnChange(logger, logging.WARNING)
        self._problems = OnChange(logger, logging.WARNING)
        self._eventless = OnChange(logger, logging.WARNING)
        self._not_released = OnChange(logger, logging.WARNING)
        #: What should outlive the process, and when it changes.
        self.record = record
        self.record_changed = Broadcast()

    def adopt(self, record: FaultRecord) -> None:
        """Take what another daemon has recorded by now, beside what was seen here."""
        for uuid, faults in record.faults.items():
            conditions = self._instances.conditions if uuid.startswith(MIG_PREFIX) else self._conditions
            condition = conditions.get(uuid, Condition())
            reasons = {fault.reason for fault in faults}
            seen_here = tuple(fault for fault in condition.faults if fault.reason not in reasons)
            adopted = attrs.evolve(condition, faults=(*faults, *seen_here))
            reloaded = "" not in (self.driver_version, record.driver_version) and (
                self.driver_version != record.driver_version
            )
            conditions[uuid] = health.reloaded(adopted) if reloaded else adopted
        self.driver_version = self.driver_version or record.driver_version
        self._publish()

    def report(self, report: Report) -> None:
        """Take a poll that came back."""
        now = self._clock()
        self.waiting = ""
        self._waiting.clear()
        self._problems.update("; ".join(report.problems))
        eventless = ", ".join(report.eventless)
        self._eventless.update(
            f"no events of GPU {eventless}: it or its driver supports none; polls find only faults that last"
            if eventless
            else ""
        )
        restarted = self._driver_away or self.driver_version not in ("", report.driver_version)
        if restarted:
            self._driver.clear()
            self._conditions = {uuid: health.reloaded(known) for uuid, known in self._conditions.items()}
            self._instances.reloaded()
        self._driver.report(f"driver {report.driver_version} ({report.library})")
        self.driver_version, self._driver_away = report.driver_version, False
        self._leave_alone(report)
        gone = set(self._conditions) - {gpu.uuid for gpu in report.gpus} - set(report.skipped) - self._left_alone
        for answer in report.gpus:
            before = self._reports.get(answer.uuid)
            gpu = with_known_facts(answer, before)
            if before is None:
                logger.info("GPU %s: %s at %s", gpu.uuid, gpu.name, gpu.pci_bus_id)
            self._reports[gpu.uuid] = gpu
            self._silent.pop(gpu.uuid, None)
            condition = self._conditions.get(gpu.uuid, Condition())
            self._conditions[gpu.uuid] = health.polled(condition, gpu, now)
            self._instances.polled(gpu, before, now, asked=health.asks(condition))
        # The driver answers, these GPUs still don't.
        for uuid in self._conditions.keys() & self._silent.keys() & set(report.skipped):
            self._conditions[uuid] = health.silent(self._conditions[uuid], self._silent[uuid], gone=False)
        answered = (self._reports[gpu.uuid] for gpu in report.gpus)
        figures = {uuid: known for gpu in answered for uuid, known in unit_figures(gpu).items()}
        self._node.usage.set_figures(figures, trio.current_time())
        for uuid in gone:
            nodeless = uuid in report.nodeless  # a reset does not do that
            reason = "its device node is not there" if nodeless else "the driver no longer lists it"
            self._conditions[uuid] = health.silent(self._conditions[uuid], reason, gone=not nodeless)
            if uuid in self._reports and not nodeless:
                self._instances.gone(self._reports[uuid])
        if not (gone or report.skipped or report.problems or report.released):
            self._instances.forget_others(self._reports.values())
        self._publish()

    def not_ready(self, message: NotReady) -> None:
        """Take that there is no driver to ask, yet or any more."""
        self.waiting = message.reason
        self._waiting.report(f"waiting for a GPU: {message.reason}")
        self._driver_away = self._driver_away or message.gone
        self.unanswered("", "its driver is not there")

    def unanswered(self, uuid: str, reason: str) -> None:
        """Take that a call about this GPU (empty: about the driver as a whole) did not come back."""
        if uuid:
            self._silent[uuid] = reason
        for known in self._reports.keys() - self._left_alone:
            if uuid in ("", known):
                self._conditions[known] = health.silent(self._conditions[known], reason, gone=False)
        self._publish()

    def event(self, event: DriverEvent) -> None:
        """Take an event of a GPU, or of a MIG instance: that one alone is struck, where the event says which."""
        gpu = self._reports.get(event.uuid)
        if gpu and event.kind is EventKind.MIG_CONFIG_CHANGE:
            self._instances.reconfigured(gpu)
        fault = self._fault(event, gpu)
        if fault is None or gpu is None:
            return
        if of_instance(event, gpu):
            self._instances.struck(gpu, event, fault)
        else:
            self._conditions[gpu.uuid] = health.struck(self._conditions[gpu.uuid], fault)
        self._publish()

    def call_failed(self, failure: Failure) -> None:
        """Count a call of libnvidia-ml that failed."""
        self._errors[failure.function, str(failure.code)] += 1

    def limits(self, report: LimitReport) -> None:
        """Take what became of memory limits."""
        self._node.set_limits(report.answers)

    def to_release(self) -> tuple[ReleasedGpu, ...]:
        """Return the GPUs that the driver's process is to leave alone: where they were last, which the card says."""
        gpus = [
            self._gpus.get(uuid, gpu) for uuid, gpu in self._node.cordoned.items() if gpu.cordon and gpu.cordon.released
        ]
        return tuple(ReleasedGpu(gpu.pci_bus_id, "".join(gpu.device_nodes[:1])) for gpu in gpus)

    def replaced(self) -> None:
        """Take that the driver's process is replaced by one that leaves other GPUs alone: what was last heard of them
        is out of date until it reports.
        """
        self._held = "the driver's process is being replaced"
        self._publish()

    def _leave_alone(self, report: Report) -> None:
        """Take which GPUs were left alone. One that this daemon has never seen is as another one saw it."""
        addresses = {parse_bus_id(address) for address in report.released}
        free = frozenset() if self._held else self._left_alone
        # Not only those that are cordoned now: that a GPU was uncordoned meanwhile does not mean that it is gone.
        known = {**self._node.cordoned, **self._gpus}
        self._left_alone = frozenset(uuid for uuid, gpu in known.items() if parse_bus_id(gpu.pci_bus_id) in addresses)
        if unseen := self._left_alone - self._reports.keys():
            self._reports.update((uuid, _last_seen(known[uuid])) for uuid in unseen)
            self._conditions.update((uuid, self._conditions.get(uuid, Condition())) for uuid in unseen)
            self._reports = dict(sorted(self._reports.items(), key=lambda item: item[1].pci_bus_id))  # as NVML has them
        for uuid in frozenset() if report.held else self._left_alone - free:
            logger.info("cordoned %s: no process of sgpu has it open; it can be reset", label(uuid))
        self._held = report.held
        self._not_released.update(report.held and f"cordoned GPUs can't be reset yet: {report.held}")

    def _fault(self, event: DriverEvent, gpu: GpuReport | None) -> Fault | None:
        if event.asks_for_poll:
            return None  # the poll comes at once, and shows what the action is now
        if event.kind is EventKind.XID:
            xid = describe(event.xid)
            xid_class = self._policy.classify(event.xid)
            description = f"XID {event.xid}: {xid.meaning}"
            if xid_class is XidClass.APPLICATION:
                ignored = event.xid in self._policy.ignored
                why = "ignored by -ignore-xids" if ignored else "the application's fault, ignored"
                uuids = [each.uuid for each in instances_of(event, gpu)] if gpu else []
                struck = uuids[0] if len(uuids) == 1 else event.uuid
                self._log_ignored(struck, event.xid, f"{description}; {why}")
                return None
            clearance = Clearance.QUARANTINE if xid_class is XidClass.TRANSIENT else Clearance.RESET
            return Fault(f"{description}; {xid.action}", self._clock(), clearance)
        reason, clearance = EVENT_FAULTS[event.kind]
        return Fault(reason, self._clock(), clearance)

    def _log_ignored(self, uuid: str, xid: int, description: str) -> None:
        """Log an ignored XID, at most once a minute for each GPU and XID: a program can cause thousands."""
        now = self._clock()
        since, count = self._ignored.get((uuid, xid), (float("-inf"), 0))
        if now - since < LOG_INTERVAL:
            self._ignored[uuid, xid] = since, count + 1
            return
        self._ignored[uuid, xid] = now, 0
        more = f" ({count} more since the last line)" if count else ""
        logger.info("%s: %s%s", label(uuid), description, more)

    def _publish(self) -> None:
        self._gpus = {uuid: self._gpu(report) for uuid, report in self._reports.items()}
        self._node.set_gpus(tuple(self._gpus.values()))
        conditions = {**self._conditions, **self._instances.conditions}
        faults = {uuid: condition.faults for uuid, condition in conditions.items() if condition.faults}
        record = FaultRecord(self.driver_version, faults)
        if record != self.record:
            self.record = record
            self.record_changed.notify()

    def _gpu(self, report: GpuReport) -> Gpu:
        reasons = self._conditions[report.uuid].reasons
        before = self._gpus.get(report.uuid)
        reason = "; ".join(reasons)
        known = {instance.uuid: instance for instance in before.instances} if before else {}
        new = Gpu(
            uuid=report.uuid,
            name=report.name,
            pci_bus_id=report.pci_bus_id,
            device_nodes=report.device_nodes,
            # What a card has does not change: a poll that does not say leaves it as it was.
            memory_bytes=report.figures.memory_usable or (before.memory_bytes if before else None),
            memory_total=report.figures.memory_total or (before.memory_total if before else None),
            numa_node=report.numa_node,
            health=Health.UNHEALTHY if reasons else Health.HEALTHY,
            reason=reason,
            since=self._since(self._conditions[report.uuid], before),
            needs_reset=any(fault.clearance is Clearance.RESET for fault in self._conditions[report.uuid].faults),
            mig_mode=report.mig_mode,
            mig_pending=report.mig_pending,
            instances=tuple(self._instance(instance, known.get(instance.uuid)) for instance in report.instances),
            left_alone=report.uuid in self._left_alone,
            held=self._held,
        )
        _log_change(f"GPU {new.uuid} ({new.name})", before.reason if before else "", reason)
        return new

    def _instance(self, report: InstanceReport, before: MigInstance | None) -> MigInstance:
        condition = self._instances.conditions[report.uuid]
        reason = "; ".join(condition.reasons)
        _log_change(f"MIG instance {report.uuid} ({report.name})", before.reason if before else "", reason)
        return MigInstance(
            uuid=report.uuid,
            name=report.name,
            profile=report.profile,
            memory_bytes=report.memory_bytes,
            capability_nodes=report.capability_nodes,
            reason=reason,
            since=self._since(condition, before),
        )

    def _since(self, condition: Condition, before: Gpu | MigInstance | None) -> float:
        """Return when the health last changed, in seconds since the epoch."""
        if before and bool(before.reason) is bool(condition.reasons):
            return before.since
        # A fault that another daemon recorded is older than what this one has seen of the GPU.
        return time.time() - max((self._clock() - fault.since for fault in condition.faults), default=0.0)


def _last_seen(gpu: Gpu) -> GpuReport:
    """Return the report of a GPU of which only the record of its cordon is known."""
    reserved = gpu.memory_total - gpu.memory_bytes if gpu.memory_total and gpu.memory_bytes else None
    return GpuReport(
        uuid=gpu.uuid,
        name=gpu.name,
        pci_bus_id=gpu.pci_bus_id,
        device_nodes=gpu.device_nodes,
        numa_node=gpu.numa_node,
        figures=Figures(memory_total=gpu.memory_total, memory_reserved=reserved),
        mig_mode=gpu.mig_mode,
        mig_pending=gpu.mig_pending,
    )


def _log_change(what: str, before: str, reason: str) -> None:
    if reason and reason != before:
        logger.warning("%s is unhealthy: %s", what, reason)
    elif before and not reason:
        logger.warning("%s is healthy again; it was unhealthy: %s", what, before)
