"""NVML → devices. Blocks as long as the driver does: run it in a thread. Knows neither gRPC nor the kubelet."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import attrs

from sgpu import nvml
from sgpu.device import Device

#: Without these no CUDA program starts. `nvidia-uvm` appears only when something first asks for it.
REQUIRED_NODES: Final = ("nvidiactl", "nvidia-uvm")
#: Given to containers where the host has them: debuggers and profilers, display.
OPTIONAL_NODES: Final = ("nvidia-uvm-tools", "nvidia-modeset")


class NotReadyError(Exception):
    """There is nothing to offer yet: no library, driver, device nodes or GPU. The message says what is missing."""


@attrs.frozen
class Places:
    """Where to look: the libraries, the device nodes, and what the kernel says of PCI devices."""

    host_path: Path
    dev_directory: Path
    sysfs_directory: Path


@attrs.frozen
class Discovery:
    """What was found. `problems` has a line for each GPU that had to be left out."""

    devices: tuple[Device, ...]
    problems: tuple[str, ...]
    driver_version: str
    library: Path


def discover(places: Places, shares: int) -> Discovery:
    """Every GPU that can be shared now, in NVML's order, each with `shares` shares.

    A GPU that fails to answer is left out, and does not take the others with it. Raises NotReadyError when nothing
    can be offered.
    """
    try:
        with nvml.open_library(places.host_path) as library:
            found = _discover(library, places, shares)
    except nvml.LibraryNotFoundError as error:
        raise NotReadyError(f"{error}; install the driver, or set -host-path to where its libraries are") from error
    except nvml.NvmlError as error:
        raise NotReadyError(f"the NVIDIA driver is not ready: {error}") from error
    if not found.devices:
        raise NotReadyError("; ".join(("the NVIDIA driver has no GPU to offer", *found.problems)))
    return found


def _discover(library: nvml.Library, places: Places, shares: int) -> Discovery:
    shared_nodes = _shared_nodes(places.dev_directory)
    devices, problems = [], []
    for index in range(library.count()):
        try:
            devices.append(_device(library, index, places, shares, shared_nodes))
        except (nvml.NvmlError, NotReadyError) as error:
            problems.append(f"GPU {index} is left out: {error}")
    return Discovery(
        devices=tuple(devices),
        problems=tuple(problems),
        driver_version=library.driver_version(),
        library=library.path,
    )


def _shared_nodes(dev_directory: Path) -> tuple[str, ...]:
    """The device nodes that every container needs, whichever GPU it gets."""
    missing = [name for name in REQUIRED_NODES if not (dev_directory / name).exists()]
    if missing:
        hint = "; `nvidia-modprobe -u -c 0` on the host makes it" if "nvidia-uvm" in missing else ""
        raise NotReadyError(f"{' and '.join(str(dev_directory / name) for name in missing)} not there yet{hint}")
    return REQUIRED_NODES + tuple(name for name in OPTIONAL_NODES if (dev_directory / name).exists())


def _device(library: nvml.Library, index: int, places: Places, shares: int, shared_nodes: tuple[str, ...]) -> Device:
    handle = library.handle(index)
    node = f"nvidia{library.minor_number(handle)}"
    if not (places.dev_directory / node).exists():
        raise NotReadyError(f"{places.dev_directory / node} is not there")
    bus_id = library.pci_bus_id(handle)
    return Device(
        uuid=library.uuid(handle),
        name=library.name(handle),
        pci_bus_id=bus_id,
        shares=shares,
        device_nodes=(node, *shared_nodes),
        memory_bytes=_memory_bytes(library, handle),
        numa_node=numa_node(places.sysfs_directory, bus_id),
    )


def _memory_bytes(library: nvml.Library, handle: nvml.Handle) -> int | None:
    try:
        return library.memory(handle).total
    except nvml.NvmlError as error:
        if error.code in (nvml.Code.NOT_SUPPORTED, nvml.Code.FUNCTION_NOT_FOUND):
            return None  # GPUs that share the machine's memory have none of their own to report
        raise


def numa_node(sysfs_directory: Path, bus_id: str) -> int | None:
    """The NUMA node of a PCI device, from the kernel; None where it does not know (it says -1).

    NVML's own NUMA function tells of GPUs that *are* a node, which is another thing.
    """
    domain, _, rest = bus_id.lower().partition(":")
    try:
        address = f"{int(domain, 16):04x}:{rest}"  # NVML writes the domain in eight digits, the kernel in four
        node = int((sysfs_directory / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
