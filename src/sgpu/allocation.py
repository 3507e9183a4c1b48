"""Devices and share ids → what a container gets. Pure: knows neither trio, nor purerpc, nor NVML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

import attrs

from sgpu.device import Device, Health
from sgpu.inventory import Inventory


class UnknownShareError(Exception):
    """An id that names no share of this node."""


class UnhealthyShareError(Exception):
    """A share of a GPU that is not healthy."""


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


def allocate(inventory: Inventory, share_ids: Sequence[str]) -> Allocation:
    """What a container that was given these shares needs. Each device node once, however many shares.

    Raises UnknownShareError or UnhealthyShareError, naming the share.
    """
    devices = tuple(dict.fromkeys(_healthy_device(inventory, share_id) for share_id in share_ids))
    simulated = any(device.simulated for device in devices)
    return Allocation(
        environment={
            "SGPU_SHARES": str(len(share_ids)),
            "SGPU_GPU_UUIDS": ",".join(device.uuid for device in devices),
            **({"SGPU_SIMULATED": "1"} if simulated else {}),
        },
        device_nodes=tuple(dict.fromkeys(node for device in devices for node in device.device_nodes)),
        libraries=not simulated,
    )


def _healthy_device(inventory: Inventory, share_id: str) -> Device:
    device = inventory.find(share_id)
    if device is None:
        raise UnknownShareError(f"share {share_id} is not one of this node's")
    if device.health is not Health.HEALTHY:
        raise UnhealthyShareError(f"share {share_id}: GPU {device.uuid} is unhealthy ({device.reason})")
    return device
