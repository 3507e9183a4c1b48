"""Which GPU an operator means, and whether a cordoned one is free. Pure: knows neither trio, nor NVML, nor files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sgpu.node.claims import PreparedClaim
from sgpu.node.gpu import MIG_PREFIX, Gpu, Unit, units
from sgpu.node.policy import parse_bus_id
from sgpu.node.shares import Share


class NoSuchGpuError(Exception):
    """A name stands for no GPU, or for several. The message says which there are."""


def find_gpu(name: str, gpus: Sequence[Gpu]) -> Gpu:
    """Return the GPU of this name: its place in the list, from 0, its UUID or the beginning of it, or its PCI address.

    Raises NoSuchGpuError.
    """
    if name.upper().startswith(MIG_PREFIX):
        of = next((gpu for gpu in gpus for each in gpu.instances if each.uuid.lower() == name.lower()), None)
        whose = f", {of.uuid}" if of else ""
        raise NoSuchGpuError(f"{name} is a MIG instance, and only a whole GPU can be cordoned: name its GPU{whose}")
    if name.isascii() and name.isdecimal():
        found = [gpu for index, gpu in enumerate(gpus) if index == int(name)]
    elif address := parse_bus_id(name):
        found = [gpu for gpu in gpus if parse_bus_id(gpu.pci_bus_id) == address]
    else:
        found = [gpu for gpu in gpus if name and gpu.uuid.lower().startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    those = found or gpus
    listed = ", ".join(f"{index}: {gpu.uuid} at {gpu.pci_bus_id}" for index, gpu in enumerate(gpus) if gpu in those)
    what = "stands for several GPUs" if found else "is no GPU of this node"
    raise NoSuchGpuError(f"{name!r} {what}; there is {listed or 'none yet'}")


def is_free(gpu: Gpu, offered: Iterable[Unit], allocated: Collection[Share], claims: Iterable[PreparedClaim]) -> bool:
    """Return whether no container has, or was given moments ago, a share of the GPU or of an instance of it.

    `offered` has the units that containers may still have, also those that are no longer there.
    """
    parts = {
        gpu.uuid,
        *(unit.uuid for unit in units(gpu)),
        *(unit.uuid for unit in offered if unit.gpu.uuid == gpu.uuid),
    }
    claimed = {unit.uuid for claim in claims for unit in claim.units}
    return parts.isdisjoint({share.uuid for share in allocated} | claimed)
