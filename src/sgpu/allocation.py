"""Devices and share ids → what a container gets. Pure: knows neither trio, nor purerpc, nor NVML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Final

import attrs

from sgpu.device import Device, Health
from sgpu.inventory import Inventory

#: What keeps a framework from taking (nearly) a whole GPU as soon as it starts. A pod's own environment wins.
FRAMEWORK_HINTS: Final = {
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # https://www.tensorflow.org/guide/gpu#limiting_gpu_memory_growth
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # https://docs.jax.dev/en/latest/gpu_memory_allocation.html
}


#: Tells NVIDIA's container runtime to do nothing. Where that is the node's default, an image that says `all` would get
#: every GPU of the node; the kubelet's variables override the image's.
IGNORED_BY_NVIDIA_RUNTIME: Final = {"NVIDIA_VISIBLE_DEVICES": "void"}


class UnknownShareError(Exception):
    """An id that names no share of this node."""


class UnhealthyShareError(Exception):
    """A share of a GPU that is not healthy."""


class NotDistinctError(Exception):
    """Several shares of one GPU for a container, where the operator wants all of different ones."""


@attrs.frozen
class Allocation:
    """What one container gets: environment, device nodes (paths relative to /dev), and whether the libraries."""

    environment: Mapping[str, str]
    device_nodes: tuple[str, ...]
    libraries: bool


@attrs.frozen
class HostPaths:
    """Where things are on the host, and where the libraries appear in a container."""

    libraries: PurePath
    libraries_in_container: PurePath
    devices: PurePath


@attrs.frozen
class Rules:
    """What the operator decided: whether frameworks are kept from taking a whole GPU, and whether a container's
    shares must be of different GPUs.
    """

    framework_hints: bool
    strict_distinct: bool


def allocate(inventory: Inventory, share_ids: Sequence[str], rules: Rules) -> Allocation:
    """What a container that was given these shares needs. Each device node once, however many shares.

    Raises UnknownShareError, UnhealthyShareError or NotDistinctError, naming the share.
    """
    shares = Counter(_healthy_device(inventory, share_id) for share_id in share_ids)
    devices = tuple(shares)
    if rules.strict_distinct and len(devices) < len(share_ids):
        raise NotDistinctError(
            f"shares {', '.join(share_ids)} are not all of different GPUs, which -multi-share strict-distinct asks "
            f"for: ask for fewer, or wait until more GPUs of the node have a free share"
        )
    simulated = any(device.simulated for device in devices)
    return Allocation(
        environment={
            "SGPU_SHARES": str(len(share_ids)),
            "SGPU_GPU_UUIDS": ",".join(device.uuid for device in devices),
            **IGNORED_BY_NVIDIA_RUNTIME,
            **_fair_part(shares),
            **({"SGPU_SIMULATED": "1"} if simulated else {}),
            **(FRAMEWORK_HINTS if rules.framework_hints and not simulated else {}),
        },
        device_nodes=tuple(dict.fromkeys(node for device in devices for node in device.device_nodes)),
        libraries=not simulated,
    )


def _fair_part(shares: Counter[Device]) -> Mapping[str, str]:
    """The memory that the shares stand for, where the driver tells how much there is."""
    if any(device.memory_bytes is None for device in shares):
        return {}
    part = sum((device.memory_bytes or 0) * count // device.shares for device, count in shares.items())
    return {"SGPU_MEMORY_BYTES": str(part)}


def _healthy_device(inventory: Inventory, share_id: str) -> Device:
    device = inventory.find(share_id)
    if device is None:
        raise UnknownShareError(f"share {share_id} is not one of this node's")
    if device.health is not Health.HEALTHY:
        raise UnhealthyShareError(f"share {share_id}: GPU {device.uuid} is unhealthy ({device.reason})")
    return device
