"""What containers have of GPUs: sgpu's shares, and devices that other plugins gave out. Pure: ids in, values out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

import attrs

from sgpu.node.container import Container, OtherUse
from sgpu.node.gpu import Gpu
from sgpu.node.shares import Share

#: By resource, the container that has each share.
Holders = Mapping[str, Mapping[Share, Container]]

#: A GPU in an id: UUIDs are NVIDIA's, the names of device nodes Google's and Deepomatic's.
_NAME: Final = re.compile(r"(?:GPU|MIG)-[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|nvidia[0-9]+")


class OtherDevice(NamedTuple):
    """A device that is no share, or of a resource that is not sgpu's."""

    resource: str
    device_id: str


@attrs.frozen
class Held:
    """The container that has each share, by resource, and each device of other plugins that may be a GPU.

    `claimants`: all containers that have a share, of one that they have by a claim.
    """

    shares: Holders
    others: Mapping[OtherDevice, Container] = attrs.field(factory=dict)
    claimants: Mapping[Share, tuple[Container, ...]] = attrs.field(factory=dict)

    def has(self, resource: str, device_id: str) -> bool:
        """Return whether a container has this device."""
        share = Share.parse(device_id) if resource in self.shares else None
        return share in self.shares[resource] if share else OtherDevice(resource, device_id) in self.others

    def merge(self, found: Held) -> Held:
        """Return both together."""
        shares = {resource: {**each, **found.shares[resource]} for resource, each in self.shares.items()}
        return Held(shares, {**self.others, **found.others}, {**self.claimants, **found.claimants})


def collect(devices: Iterable[tuple[str, Iterable[str], Container]], resources: Collection[str]) -> Held:
    """Sort the ids that a container has of a resource. `resources` are sgpu's; what is no GPU is left out."""
    shares: dict[str, dict[Share, Container]] = {resource: {} for resource in resources}
    others = {}
    for resource, device_ids, container in devices:
        for device_id in gpus_in(device_ids):
            share = Share.parse(device_id) if resource in shares else None
            if share:
                shares[resource][share] = container
            else:
                others[OtherDevice(resource, device_id)] = container
    return Held(shares, others)


def gpus_in(device_ids: Iterable[str]) -> list[str]:
    """Return those that may be GPUs or shares of them. Quick: there can be a hundred thousand ids of other devices."""
    return [each for each in device_ids if "GPU-" in each or "MIG-" in each or "nvidia" in each]


def other_uses(others: Mapping[OtherDevice, Container], gpus: Iterable[Gpu]) -> Mapping[str, tuple[OtherUse, ...]]:
    """Return, by UUID of these GPUs and their MIG instances, the containers to which other plugins gave it.

    An id that is only the UUID or the GPU's device node is all of it; one that goes on (`GPU-…::3`, `nvidia0-_-1`,
    `MIG-GPU-…/7/0`) is a part.
    """
    names = {}
    for gpu in gpus:
        names.update(dict.fromkeys((gpu.uuid, *gpu.device_nodes[:1]), gpu.uuid))
        names.update({instance.uuid: instance.uuid for instance in gpu.instances})
    uses = defaultdict(list)
    for (resource, device_id), container in others.items():
        name = _NAME.search(device_id)
        if name and name[0] in names:
            uses[names[name[0]]].append(OtherUse(container, resource, whole=name[0] == device_id))
    return {uuid: tuple(each) for uuid, each in uses.items()}
