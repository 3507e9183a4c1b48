"""A GPU, which is healthy or not as a whole, and a unit, the part of it that can be shared. Values only."""

from __future__ import annotations

import enum

import attrs


class Health(enum.Enum):
    """The kubelet's two values for health, in its spelling."""

    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"


@attrs.frozen
class Gpu:
    """A physical GPU.

    `device_nodes` are the nodes that a container needs to use it, relative to /dev. `memory_total` is the card's
    memory and `memory_bytes` what programs can use of it: without the driver's own part. These and `numa_node` are None
    where the driver or the kernel does not say. `reason` says why it is unhealthy. `since` is when its health last
    changed, in seconds since the epoch.
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


@attrs.frozen
class Unit:
    """A part of a GPU that can be shared: today all of it. Its health is the GPU's."""

    gpu: Gpu
    uuid: str
    name: str
    device_nodes: tuple[str, ...]
    memory_bytes: int | None

    @property
    def health(self) -> Health:
        return self.gpu.health


def units(gpu: Gpu) -> tuple[Unit, ...]:
    """Return what can be shared of a GPU."""
    return (Unit(gpu, gpu.uuid, gpu.name, gpu.device_nodes, gpu.memory_bytes),)
