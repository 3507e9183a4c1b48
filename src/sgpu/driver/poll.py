"""One poll of the driver: NVML's answers as a report. Blocks as long as the driver does: `worker` runs it.

Knows neither gRPC nor the kubelet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs

from sgpu.driver import nvml, plausible
from sgpu.driver.messages import GpuReport, Report
from sgpu.driver.mig import Capabilities, find_instances
from sgpu.driver.nvml import GPU_LOST, NO_ANSWER, Code, Handle, Library, NvmlError
from sgpu.driver.wsl import UNSUPPORTED, is_wsl
from sgpu.node.figures import Figures, ProcessUse

#: It appears only when something first asks for it.
UVM_NODE: Final = "nvidia-uvm"
#: Without these no CUDA program starts.
REQUIRED_NODES: Final = ("nvidiactl", UVM_NODE)
#: What `nvidia-modprobe` takes to make them, where something removed them; of a GPU's own node, its minor number.
_MAKES: Final = {"nvidiactl": "-c 255", UVM_NODE: "-u -c 0"}
#: Where the GPU operator's driver container has its device nodes.
CONTAINER_DEV: Final = Path("/run/nvidia/driver/dev")
#: Given to containers where the host has them: debuggers and profilers, display.
OPTIONAL_NODES: Final = ("nvidia-uvm-tools", "nvidia-modeset")
Answer = TypeVar("Answer")


class NotReadyError(Exception):
    """There is nothing to offer yet: no driver, device nodes or GPU. The message says what is missing."""


class NoDeviceNodeError(Exception):
    """The driver has the GPU, and no container could open it."""


@attrs.frozen
class Places:
    """Directories to look in: libraries, device nodes, and the kernel's PCI devices and MIG capabilities."""

    host_path: Path
    dev_directory: Path
    sysfs_directory: Path
    proc_directory: Path = Path("/proc")


@attrs.frozen
class Identity:
    """What no GPU changes while the library is open: the answers take a quarter of a poll."""

    device_node: str
    name: str
    pci_bus_id: str
    numa_node: int | None


def poll(
    library: Library,
    places: Places,
    *,
    interval: float,
    known: Sequence[str] = (),
    some_hidden: bool = False,
    identities: dict[str, Identity] | None = None,
    skip: Collection[str] = (),
    call_started: Callable[[str], None] = lambda uuid: None,
    found: Callable[[str, Handle], None] = lambda uuid, handle: None,
    ask_for_uvm: Callable[[], str] = lambda: "",
    make_nodes: Callable[[tuple[Path, ...]], str] = lambda files: "",
) -> Report:
    """Ask the driver about all of its GPUs, in NVML's order, except those whose UUID is in `skip`.

    A GPU that fails to answer is reported as a problem and does not stop the others. The utilization of its processes
    covers the last `interval` seconds. `known` has the UUIDs in the order of the last poll, as long as it may hold.
    `some_hidden`: this process can't open some GPUs; drivers may list them all the same.
    `identities` are kept from one poll to the next, as long as the library is open.
    `call_started` is called with the UUID that the next calls are about (empty: the driver), and `found` with each GPU
    before it is asked. `ask_for_uvm` makes the node `nvidia-uvm` where it is missing, and returns what came of it;
    `make_nodes` those of the capability files of MIG instances.
    Raises NotReadyError where no GPU could be used.
    """
    shared_nodes = _shared_nodes(places.dev_directory, ask_for_uvm)
    capabilities = Capabilities(places.proc_directory, places.dev_directory, make_nodes)
    identities = {} if identities is None else identities
    gpus, problems, skipped, nodeless = [], [], [], []
    order: list[str] = []
    answered: dict[str, int] = {}
    call_started("")
    count = library.count()
    for index in range(count):
        uuid = known[index] if len(known) == count else ""
        try:
            if uuid not in skip:  # by its place already, because that call may hang as well
                call_started(uuid)
                handle = library.handle(index)
                uuid = library.uuid(handle)
            if uuid in skip:
                skipped.append(uuid)
                continue
            if uuid in answered:
                problems.append(f"GPU {index} is left out: it has the UUID {uuid} of GPU {answered[uuid]}")
                continue
            answered[uuid] = index
            call_started(uuid)
            found(uuid, handle)
            if uuid not in identities:
                identities[uuid] = _identify(library, handle, places)
            gpu = _gpu(library, handle, uuid, identities[uuid], places, shared_nodes)
            if gpu.mig_mode and not gpu.error:
                gpu, left_out = _with_instances(library, handle, gpu, capabilities)
                problems += left_out
            elif not gpu.error:
                processes = _processes(library, handle, interval, gpu.figures.memory_total)
                gpu = attrs.evolve(gpu, figures=attrs.evolve(gpu.figures, processes=processes))
            gpus.append(gpu)
        except NoDeviceNodeError as error:
            nodeless.append(uuid)
            problems.append(f"GPU {index} is left out: {error}")
        except NvmlError as error:
            if not some_hidden or error.code != Code.NO_PERMISSION:
                problems.append(f"GPU {index} is left out: {error}")
        finally:
            order.append(uuid)
    call_started("")
    return Report(
        gpus=tuple(gpus),
        problems=tuple(problems),
        skipped=tuple(skipped),
        driver_version=library.driver_version(),
        library=str(library.path),
        nodeless=tuple(nodeless),
        order=tuple(order),
    )


def _shared_nodes(dev_directory: Path, ask_for_uvm: Callable[[], str]) -> tuple[str, ...]:
    """Return the device nodes that every container needs, whichever GPU it gets."""
    if is_wsl(dev_directory):
        raise NotReadyError(UNSUPPORTED)
    outcome = ask_for_uvm() if not (dev_directory / UVM_NODE).exists() else ""
    missing = [name for name in REQUIRED_NODES if not (dev_directory / name).exists()]
    if missing:
        names = " and ".join(str(dev_directory / name) for name in missing)
        hints = "; ".join(dict.fromkeys(how_to_make(dev_directory, name) for name in missing))
        raise NotReadyError(f"{names} not there yet; {hints}{outcome and f' ({outcome})'}")
    return REQUIRED_NODES + tuple(name for name in OPTIONAL_NODES if (dev_directory / name).exists())


def how_to_make(dev_directory: Path, name: str) -> str:
    """Say what to do about a device node that is not there."""
    if dev_directory != CONTAINER_DEV and (CONTAINER_DEV / name).exists():
        return f"the driver container has its device nodes in {CONTAINER_DEV}: set -dev-directory to that"
    flags = _MAKES.get(name) or f"-c {name.removeprefix('nvidia')}"
    return f"`nvidia-modprobe {flags}` on the host makes it"


def _identify(library: Library, handle: Handle, places: Places) -> Identity:
    bus_id = library.pci_bus_id(handle)
    numa = numa_node(places.sysfs_directory, bus_id)
    return Identity(f"nvidia{library.minor_number(handle)}", library.name(handle), bus_id, numa)


def _gpu(
    library: Library, handle: Handle, uuid: str, identity: Identity, places: Places, shared_nodes: tuple[str, ...]
) -> GpuReport:
    """Report one GPU. Without its device node it can't be offered; an answer about its state that fails is reported."""
    node = identity.device_node
    if not (places.dev_directory / node).exists():
        hint = how_to_make(places.dev_directory, node)
        raise NoDeviceNodeError(f"{places.dev_directory / node} is not there; {hint}")
    gpu = GpuReport(uuid, identity.name, identity.pci_bus_id, (node, *shared_nodes), identity.numa_node)
    try:
        return _with_answers(gpu, library, handle)
    except NvmlError as error:
        return attrs.evolve(gpu, error=str(error))


def _with_answers(gpu: GpuReport, library: Library, handle: Handle) -> GpuReport:
    """Return the report with the GPU's state, as far as the GPU and its driver support the calls."""
    answers: dict[str, Any] = {"figures": _figures(library, handle)}
    if mode := _ask(library.mig_mode, handle):
        answers |= {"mig_mode": mode.current, "mig_pending": mode.pending}
    if rows := _ask(library.remapped_rows, handle):
        answers |= {"rows_pending": rows.pending, "rows_failed": rows.failed}
    else:  # a GPU that remaps rows (Ampere and later) retires no pages; asking all the same costs 0.4 ms
        answers["pages_pending"] = _ask(library.retired_pages_pending, handle)
    if fabric := _ask(library.fabric, handle):
        answers |= {"fabric_state": fabric.state, "fabric_status": fabric.status}
    return attrs.evolve(gpu, recovery_action=_ask(library.recovery_action, handle), **answers)


def _figures(library: Library, handle: Handle) -> Figures:
    """Return memory and utilization. A figure that can't be had, or can't be true, is unknown, which is no fault."""
    memory, busy = _figure(library.memory, handle), _figure(library.utilization, handle)
    total = plausible.total_memory(memory.total) if memory else None
    return Figures(
        memory_total=total,
        memory_free=plausible.free_memory(memory.free, memory.used, total) if memory else None,
        utilization=None if busy is None else plausible.percent(busy),
        memory_reserved=plausible.reserved_memory(memory.reserved, total) if memory else None,
    )


def _figure(call: Callable[[Handle], Answer], handle: Handle) -> Answer | None:
    """Return the answer, or None where the call fails. Raises NvmlError where the error says that the GPU is lost."""
    try:
        return call(handle)
    except NvmlError as error:
        if error.code in GPU_LOST:
            raise
        return None


def _with_instances(
    library: Library, handle: Handle, gpu: GpuReport, capabilities: Capabilities
) -> tuple[GpuReport, tuple[str, ...]]:
    """Return the report with the GPU's MIG instances, and a line for each that can't be offered."""

    def measure(instance: Handle) -> Figures:
        figures = attrs.evolve(_figures(library, instance), utilization=None)  # no driver knows it of an instance
        return attrs.evolve(figures, processes=_processes(library, instance, None, figures.memory_total))

    minor = int(gpu.device_nodes[0].removeprefix("nvidia"))
    try:
        instances, problems = find_instances(library, handle, minor, capabilities, measure)
        refused = gpu.figures.memory_total is None and _is_refused(library.memory, handle)
    except NvmlError as error:
        return attrs.evolve(gpu, error=str(error)), ()
    return attrs.evolve(gpu, instances=instances, memory_refused=refused), problems


def _is_refused(question: Callable[[Handle], object], handle: Handle) -> bool:
    """Return whether the driver answers this for want of permission."""
    try:
        question(handle)
    except NvmlError as error:
        return error.code == Code.NO_PERMISSION
    return False


def _processes(
    library: Library, handle: Handle, interval: float | None, total: int | None
) -> tuple[ProcessUse, ...] | None:
    """Return the processes that use the GPU; None where unknown. A failure here says nothing about the GPU.

    Without an interval, nothing is asked about their utilization.
    """
    try:
        listed = nvml.list_processes(library, handle)
    except NvmlError:
        return None
    busy: Mapping[int, int] | None = None
    if listed and interval is not None:  # the call takes longer than all others together
        with suppress(NvmlError):
            since = max(int((time.time() - interval) * 1e6), 0)  # a node whose clock is not set yet is at the epoch
            busy = nvml.utilization_by_process(library, handle, since)
    return tuple(
        ProcessUse(
            pid,
            plausible.process_memory(process.memory, total),
            None if busy is None else busy.get(pid, None if process.is_mps_client else 0),
        )
        for pid, process in sorted(listed.items())
    )


def _ask(question: Callable[[Handle], Answer], handle: Handle) -> Answer | None:
    """Return the answer, or None from a GPU or driver that does not support the call."""
    try:
        return question(handle)
    except nvml.NvmlError as error:
        if error.code in NO_ANSWER:
            return None
        raise


def numa_node(sysfs_directory: Path, bus_id: str) -> int | None:
    """Return the NUMA node of a PCI device, by the kernel; None where it is unknown (the kernel says -1).

    NVML's own NUMA function is about GPUs that *are* a node, which is something else.
    """
    domain, _, rest = bus_id.lower().partition(":")
    try:
        address = f"{int(domain, 16):04x}:{rest}"  # NVML writes the domain in eight digits, the kernel in four
        node = int((sysfs_directory / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
