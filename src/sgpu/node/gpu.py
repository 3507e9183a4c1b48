"""A GPU, and a unit, the part of it that can be shared: all of it, or a MIG instance. Values only."""

from __future__ import annotations

import enum
from typing import Final

import attrs

#: What the UUIDs of MIG instances begin with, and those of GPUs do not.
MIG_PREFIX: Final = "MIG-"


class Health(enum.Enum):
    """The kubelet's two values for health, in its spelling."""

    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"


@attrs.frozen
class MigInstance:
    """A MIG instance: a part of a GPU with memory and processors of its own.

    `profile` is NVIDIA's name of its size (`1g.5gb`). `capability_nodes` are the device nodes that a container needs
    beside the GPU's, relative to /dev. `reason` says why it is unhealthy by itself. `since` is as a GPU's.
    """

    uuid: str
    name: str
    profile: str
    memory_bytes: int | None
    capability_nodes: tuple[str, ...] = ()
    reason: str = ""
    since: float = attrs.field(default=0.0, eq=False)


@attrs.frozen
class Cordon:
    """An operator's order to give out no more of a GPU, why, and since when, in seconds since the epoch.

    `released`: no container has a share of it any more, so that the driver's process is to let go of it.
    """

    reason: str
    since: float
    released: bool = False

    def __str__(self) -> str:
        return f"cordoned: {self.reason}" if self.reason else "cordoned"


@attrs.frozen
class Gpu:
    """A physical GPU.

    `device_nodes` are the nodes that a container needs to use it, relative to /dev. `memory_total` is the card's
    memory and `memory_bytes` what programs can use of it: without the driver's own part. These and `numa_node` are None
    where the driver or the kernel does not say. `reason` says why it is unhealthy, and `needs_reset` that an event
    said so after which only a reset helps. `since` is when its health last changed, in seconds since the epoch. In
    `mig_mode` only its `instances` can be used; `mig_pending` says whether it will be in MIG mode after its next reset.

    `left_alone`: it was cordoned, and the driver's process was told not to open it; `held` says why a process of sgpu
    may have it open all the same.
    """

    uuid: str
    name: str
    pci_bus_id: str
    device_nodes: tuple[str, ...]
    memory_bytes: int | None = None
    memory_total: int | None = None
    numa_node: int | None = None
    health: Health = Health.HEALTHY
    reason: str = ""
    since: float = attrs.field(default=0.0, eq=False)  # it never changes alone
    simulated: bool = False
    mig_mode: bool = False
    mig_pending: bool = False
    instances: tuple[MigInstance, ...] = ()
    needs_reset: bool = False
    cordon: Cordon | None = None
    left_alone: bool = False
    held: str = ""

    @property
    def released(self) -> bool:
        """Return whether no process of sgpu has it open, so that it can be reset."""
        return self.left_alone and not self.held

    @property
    def closed(self) -> str:
        """Return why no container may get a share of it, healthy as it may be; empty: any may."""
        return str(self.cordon or ("not looked at since it was uncordoned" if self.left_alone else ""))


@attrs.frozen
class Unit:
    """What can be shared: a GPU, or a MIG `instance` of it.

    `gone` says why it is no longer there, while containers still have shares of it, and `gone_since` since when.
    """

    gpu: Gpu
    uuid: str
    name: str
    device_nodes: tuple[str, ...]
    memory_bytes: int | None
    instance: MigInstance | None = None
    gone: str = ""
    gone_since: float = attrs.field(default=0.0, eq=False)

    @property
    def memory_total(self) -> int | None:
        """Return its memory, with the part of a card that is the driver's own."""
        return self.instance.memory_bytes if self.instance else self.gpu.memory_total

    @property
    def reason(self) -> str:
        """Return why it is unhealthy: the faults of its GPU, and its own; empty when it is healthy."""
        own = self.instance.reason if self.instance else ""
        return self.gone or "; ".join(filter(None, (self.gpu.reason, own)))

    @property
    def health(self) -> Health:
        return Health.UNHEALTHY if self.reason else self.gpu.health

    @property
    def since(self) -> float:
        """Return when its health last changed."""
        if self.gone:
            return self.gone_since
        if self.instance is None or self.gpu.reason:
            return self.gpu.since
        return self.instance.since if self.instance.reason else max(self.gpu.since, self.instance.since)

    def __str__(self) -> str:
        return label(self.uuid)


def label(uuid: str) -> str:
    """Return what a message calls the unit with this UUID."""
    return f"{'MIG instance' if uuid.startswith(MIG_PREFIX) else 'GPU'} {uuid}"


def units(gpu: Gpu) -> tuple[Unit, ...]:
    """Return what can be shared of a GPU: in MIG mode its instances, which may be none."""
    if gpu.mig_mode:
        return tuple(_instance_unit(gpu, instance) for instance in gpu.instances)
    return (_whole(gpu),)


def units_or_whole(gpu: Gpu) -> tuple[Unit, ...]:
    """Return the units of a GPU, or all of it where it has none, for those who want to speak of it."""
    return units(gpu) or (_whole(gpu),)


def without(unit: Unit, now: float) -> Unit:
    """Return a unit that is no longer there, at this time in seconds since the epoch."""
    if unit.gone:
        return unit
    reason = "it was destroyed, or MIG mode was turned off" if unit.instance else "MIG mode was turned on"
    return attrs.evolve(unit, gone=reason, gone_since=now)


def _whole(gpu: Gpu) -> Unit:
    return Unit(gpu, gpu.uuid, gpu.name, gpu.device_nodes, gpu.memory_bytes)


def _instance_unit(gpu: Gpu, instance: MigInstance) -> Unit:
    first, *others = gpu.device_nodes or ("",)
    nodes = tuple(filter(None, (first, *instance.capability_nodes, *others)))
    return Unit(gpu, instance.uuid, instance.name, nodes, instance.memory_bytes, instance)
