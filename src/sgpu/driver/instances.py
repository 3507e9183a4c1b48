"""The conditions of MIG instances: faults of their own, beside those of their GPUs, which `monitor` has. Pure.

Knows neither trio, nor NVML's functions, nor Kubernetes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import attrs

from sgpu.driver import health
from sgpu.driver.health import Condition, Fault
from sgpu.driver.messages import DriverEvent, GpuReport, InstanceReport
from sgpu.node.figures import Figures

logger = logging.getLogger(__name__)


class InstanceConditions:
    """The condition of each instance by UUID."""

    def __init__(self, conditions: Mapping[str, Condition]) -> None:
        self.conditions = dict(conditions)
        #: By GPU, the events since its last poll: an instance that the next one finds may be what they are about.
        self._events: dict[str, list[tuple[DriverEvent, Fault]]] = {}

    def polled(self, gpu: GpuReport, before: GpuReport | None, now: float, *, asked: bool) -> None:
        """Take a poll of a GPU. `before` is the one before it; `asked`: the driver asked for something in it."""
        events = self._events.pop(gpu.uuid, [])
        known = {instance.uuid for instance in before.instances} if before else set()
        for instance in gpu.instances:
            if instance.uuid not in known:
                logger.info("MIG instance %s: %s, of GPU %s", instance.uuid, instance.name, gpu.uuid)
            condition = self.conditions.get(instance.uuid, Condition())
            for event, fault in events:
                if instance.uuid not in known and _is_about(event, instance):
                    condition = health.struck(condition, fault)
            self.conditions[instance.uuid] = health.instance_polled(condition, instance.problem, gpu, now, asked=asked)
        for uuid in known - {instance.uuid for instance in gpu.instances}:
            logger.info("MIG instance %s of GPU %s is gone", uuid, gpu.uuid)
            self.conditions.pop(uuid, None)

    def reconfigured(self, gpu: GpuReport) -> None:
        """Take that instances of this GPU are created or destroyed: events from before are about those known before."""
        events = self._events.get(gpu.uuid, [])
        events[:] = [(event, fault) for event, fault in events if not instances_of(event, gpu)]

    def struck(self, gpu: GpuReport, event: DriverEvent, fault: Fault) -> None:
        """Take an event that is about an instance of this GPU."""
        events = self._events.setdefault(gpu.uuid, [])
        events[:] = [(other, known) for other, known in events if _place(other) != _place(event)]
        events.append((event, fault))
        for instance in instances_of(event, gpu):
            self.conditions[instance.uuid] = health.struck(self.conditions[instance.uuid], fault)

    def gone(self, gpu: GpuReport) -> None:
        """Take that a GPU is gone: an instance that is there afterwards was reset with it."""
        self._events.pop(gpu.uuid, None)
        for instance in gpu.instances:
            self.conditions[instance.uuid] = health.reloaded(self.conditions[instance.uuid])

    def reloaded(self) -> None:
        """Take that the driver was reloaded."""
        self._events.clear()
        self.conditions = {uuid: health.reloaded(known) for uuid, known in self.conditions.items()}

    def forget_others(self, gpus: Iterable[GpuReport]) -> None:
        """Forget the instances that none of all GPUs has: they were destroyed while nobody looked."""
        there = {instance.uuid for gpu in gpus for instance in gpu.instances}
        self.conditions = {uuid: known for uuid, known in self.conditions.items() if uuid in there}


def of_instance(event: DriverEvent, gpu: GpuReport) -> bool:
    """Return whether an event is about a part of the GPU, and not all of it."""
    return gpu.mig_mode and event.gpu_instance is not None


def instances_of(event: DriverEvent, gpu: GpuReport) -> list[InstanceReport]:
    """Return the instances that an event is about, as the last poll found them."""
    if not of_instance(event, gpu):
        return []
    return [instance for instance in gpu.instances if _is_about(event, instance)]


def with_known_facts(gpu: GpuReport, before: GpuReport | None) -> GpuReport:
    """Return the report of a GPU with what the one before had and this one does not say.

    Where a GPU failed to answer, its instances are unknown, which does not mean that there are none.
    """
    if before is None or not gpu.error:
        return gpu
    instances = tuple(attrs.evolve(instance, figures=Figures()) for instance in before.instances)
    return attrs.evolve(gpu, mig_mode=before.mig_mode, mig_pending=before.mig_pending, instances=instances)


def unit_figures(gpu: GpuReport) -> Mapping[str, Figures]:
    """Return the figures of what can be shared of a GPU, by UUID."""
    if gpu.mig_mode:
        return {instance.uuid: instance.figures for instance in gpu.instances}
    return {gpu.uuid: gpu.figures}


def _place(event: DriverEvent) -> tuple[object, ...]:
    return event.kind, event.xid, event.gpu_instance, event.compute_instance


def _is_about(event: DriverEvent, instance: InstanceReport) -> bool:
    if event.gpu_instance != instance.gpu_instance:
        return False
    return event.compute_instance in (None, instance.compute_instance)
