"""Offers → the ResourceSlices of the node (resource.k8s.io/v1). Pure: knows neither trio, nor HTTP, nor NVML.

Each unit is a device that many claims can have at once. What a claim takes of it are its capacities: `memory` and
`shares`.
"""

from __future__ import annotations

import enum
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from sgpu.lib.sizes import MIB
from sgpu.node.gpu import Gpu, Health
from sgpu.node.offers import Offer, Offers
from sgpu.node.policy import BUS_ID, OffersRefusedError
from sgpu.node.rank import Placement

Object = dict[str, Any]

#: Name of the driver: in slices and claims, in the names of sockets, and the domain of attributes and taints.
DRIVER: Final = "gpu.deepomatic.com"
API_VERSION: Final = "resource.k8s.io/v1"
#: Gives the pod its access to the API server.
MANIFEST: Final = "k8s/overlays/dra"
#: The API server's path of slices.
PATH: Final = f"/apis/{API_VERSION}/resourceslices"
#: The attribute `type` of every device of ours. Device classes select by it.
DEVICE_TYPE: Final = "shared-gpu"
MEMORY: Final = "memory"
SHARES: Final = "shares"
#: Taints of a unit: it is faulty; its memory is above the watermark; an operator has cordoned its GPU.
UNHEALTHY_TAINT: Final = f"{DRIVER}/unhealthy"
FULL_TAINT: Final = f"{DRIVER}/memory-full"
CORDONED_TAINT: Final = f"{DRIVER}/cordoned"

#: Devices in a slice. The API allows 128, but only 64 where one has a taint: with this, a fault moves no device.
MOST_DEVICES: Final = 64
#: The API's limits: characters of an attribute, of a taint's value, of an object's name.
MOST_ATTRIBUTE: Final = 64
MOST_TAINT_VALUE: Final = 63
MOST_NAME: Final = 253


class MemoryDefault(enum.Enum):
    """The memory that a claim takes which names none: nothing, or the fair part of a share."""

    NONE = "none"
    FAIR = "fair"


@attrs.frozen
class SliceOptions:
    """How the node's devices are published.

    `evict`: a GPU that needs a reset ends the pods on it (NoExecute), where it else only gets no new ones. `taints`:
    the API server keeps taints; where it does not, faulty units are left out. `pcie_roots`: by PCI bus id (see `pci`).
    """

    node_name: str
    memory_default: MemoryDefault = MemoryDefault.NONE
    placement: Placement = Placement.SPREAD
    evict: bool = False
    taints: bool = True
    driver_version: str = ""
    pcie_roots: Mapping[str, str] = attrs.Factory(dict)


def device_name(uuid: str) -> str:
    """Return the name of a unit's device, which must be a DNS label: `GPU-4404041a-…` → `gpu-4404041a-…`."""
    return uuid.lower()


def unit_uuid(device: str) -> str:
    """Return the UUID of the unit whose device has this name. NVML writes UUIDs as `GPU-` or `MIG-` and lower case."""
    kind, dash, rest = device.partition("-")
    return f"{kind.upper()}{dash}{rest}"


def slices(offers: Offers, used: Mapping[str, float], options: SliceOptions) -> tuple[Object, ...]:
    """Return the slices of the node: one pool, whose generation is still to be set. Without units there is one, empty.

    `used` has the part of each unit that claims have, by UUID. The scheduler takes the first device that fits, so their
    order is the placement. Raises OffersRefusedError.
    """
    order = 1 if options.placement is Placement.SPREAD else -1
    all_offers = [(resource, offer) for resource, each in offers.items() for offer in each if not offer.unit.gone]
    all_offers.sort(key=lambda pair: order * used.get(pair[1].unit.uuid, 0.0))
    made = [device(resource, offer, options) for resource, offer in all_offers]
    devices = made if options.taints else [each for each in made if "taints" not in each]
    chunks = [devices[start : start + MOST_DEVICES] for start in range(0, len(devices), MOST_DEVICES)] or [[]]
    return tuple(_slice(index, chunk, len(chunks), options.node_name) for index, chunk in enumerate(chunks))


def device(resource: str, offer: Offer, options: SliceOptions) -> Object:
    """Return the device of one unit. Raises OffersRefusedError."""
    made: Object = {
        "name": device_name(offer.unit.uuid),
        "allowMultipleAllocations": True,
        "attributes": _attributes(resource, offer, options),
        "capacity": _capacity(offer, options.memory_default),
    }
    taints = _taints(offer, options.evict)
    return {**made, "taints": taints} if taints else made


def slice_name(index: int, node_name: str) -> str:
    """Return the name of a node's slice. It begins with the index, because the scheduler reads slices in this order.

    A fixed name, not a generated one: creating a slice twice is a conflict and not a second slice.
    """
    name = f"{index:05x}-{DRIVER}-{node_name}"
    if len(name) <= MOST_NAME:
        return name
    return f"{index:05x}-{DRIVER}-{hashlib.sha256(node_name.encode()).hexdigest()}"


def _slice(index: int, devices: Sequence[Object], count: int, node_name: str) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": "ResourceSlice",
        "metadata": {"name": slice_name(index, node_name)},
        "spec": {
            "driver": DRIVER,
            "nodeName": node_name,
            "pool": {"name": node_name, "generation": 0, "resourceSliceCount": count},
            "devices": list(devices),
        },
    }


def _attributes(resource: str, offer: Offer, options: SliceOptions) -> Object:
    unit, gpu = offer.unit, offer.unit.gpu
    if len(resource) > MOST_ATTRIBUTE:
        raise OffersRefusedError(
            f"the resource name {resource} is longer than {MOST_ATTRIBUTE} characters, which DRA does not allow; "
            "choose a shorter one"
        )
    attributes: Object = {
        "type": {"string": DEVICE_TYPE},
        "resource": {"string": resource},
        "uuid": {"string": unit.uuid},
        "gpuUUID": {"string": gpu.uuid},
        "productName": {"string": unit.name[:MOST_ATTRIBUTE]},
        "memoryLimits": {"bool": offer.limit_factor > 0},
    }
    if unit.instance:
        attributes["migProfile"] = {"string": unit.instance.profile}
    if gpu.numa_node is not None:
        attributes["numaNode"] = {"int": gpu.numa_node}
    if bus_id := _bus_id(gpu):
        attributes["resource.kubernetes.io/pciBusID"] = {"string": bus_id}
        if root := options.pcie_roots.get(gpu.pci_bus_id):
            attributes["resource.kubernetes.io/pcieRoot"] = {"string": root}
    if version := re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", options.driver_version):
        # As semantic versions have it: three numbers, without leading zeros (580.95.05 would be refused).
        numbers = [int(part or 0) for part in version.groups()]
        attributes["driverVersion"] = {"version": ".".join(map(str, numbers))}
        attributes["driverBranch"] = {"int": numbers[0]}
    return attributes


def _bus_id(gpu: Gpu) -> str:
    """Return the PCI address as the kernel and Kubernetes write it: NVML's 00000000:3B:00.0 → 0000:3b:00.0."""
    found = BUS_ID.fullmatch(gpu.pci_bus_id)
    if not found:
        return ""
    domain, bus, slot, function = (int(part or "0", 16) for part in found.groups())
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"


def _capacity(offer: Offer, memory_default: MemoryDefault) -> Object:
    """Return the capacities, each with a default: of one without, a claim that does not name it would take all.

    Memory that is unknown is not offered. That programs use more than their claims is not subtracted here: the
    scheduler subtracts what claims have, and the same memory would count twice.
    """
    capacity: Object = {SHARES: _policed(str(offer.shares), "1", "1", "1")}
    mebibytes = (offer.unit.memory_bytes or 0) // MIB
    if mebibytes and memory_default is MemoryDefault.NONE:
        capacity[MEMORY] = _policed(f"{mebibytes}Mi", "0", "0", "1Mi")
    elif mebibytes:
        # At least the step: else who asks for nothing would be left out of the sum that the limits keep.
        capacity[MEMORY] = _policed(f"{mebibytes}Mi", f"{max(mebibytes // offer.shares, 1)}Mi", "1Mi", "1Mi")
    return capacity


def _policed(value: str, default: str, least: str, step: str) -> Object:
    return {"value": value, "requestPolicy": {"default": default, "validRange": {"min": least, "step": step}}}


def _taints(offer: Offer, evict: bool) -> list[Object]:
    """Return why no further claim should get the unit. Pods that have it stay, unless they are to be evicted."""
    unit = offer.unit
    taints: list[Object] = []
    if unit.health is not Health.HEALTHY:
        taint = {"key": UNHEALTHY_TAINT, "value": label_value(unit.reason), "effect": "NoSchedule"}
        if evict and unit.gpu.needs_reset:
            taint["effect"] = "NoExecute"
        # Else the server would set the time of each update.
        taints.append({**taint, "timeAdded": _time(unit.since)})
    if unit.gpu.closed:
        taint = {"key": CORDONED_TAINT, "effect": "NoSchedule"}
        if cordon := unit.gpu.cordon:
            taint["timeAdded"] = _time(cordon.since)
            if value := label_value(cordon.reason):  # the server leaves out an empty one
                taint["value"] = value
        taints.append(taint)
    elif offer.withheld:
        taints.append({"key": FULL_TAINT, "effect": "NoSchedule"})
    return taints


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def label_value(text: str) -> str:
    """Return the text in the characters that a taint's value may have: `XID 79: off the bus` → `XID-79-off-the-bus`."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", text)[: MOST_TAINT_VALUE + 1].strip("-")
    return words[:MOST_TAINT_VALUE].strip("-")
