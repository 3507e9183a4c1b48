"""libnvidia-ml as Python: open, handles, facts, events, and one exception.

Every function here may block for as long as the driver likes: call them from a thread, never from the trio thread.
Knows nothing of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NewType

import attrs

from sgpu.driver.nvml import constants, search
from sgpu.driver.nvml._bindings import ffi
from sgpu.driver.nvml.constants import Code

Handle = NewType("Handle", object)  # an nvmlDevice_t; opaque, dies with the library


class NvmlError(Exception):
    """An NVML function answered something other than success: which one, the code, and NVML's own text."""

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"{function}: {text} (NVML error {code})")
        self.function = function
        self.code = code
        self.text = text


@attrs.frozen
class Memory:
    """Bytes of a GPU's frame buffer. `used` leaves out what the driver reserves; from a driver without NVML's v2 it has
    that, and `reserved` is None.
    """

    total: int
    used: int
    free: int
    reserved: int | None = None


@attrs.frozen
class RemappedRows:
    """Rows of memory that Ampere and later replace by spare ones: one waits for a reset; there were no spare ones."""

    pending: bool
    failed: bool


@attrs.frozen
class Fabric:
    """The NVSwitch fabric as a GPU sees it. `state`: 0 there is none, 1 not started, 2 in progress, 3 completed, and
    only then `status` counts: the `nvmlReturn_t` it completed with.
    """

    state: int
    status: int


@attrs.frozen
class MigMode:
    """Whether MIG is on, and whether it will be after the next reset of the GPU."""

    current: bool
    pending: bool


@attrs.frozen
class Event:
    """One NVML event: the GPU's UUID (empty if it is none that was registered), the `EventType` bit, and for an XID its
    number. The ids of the MIG instance that it is about are None where it is about none, or the GPU as a whole.
    """

    uuid: str
    type: int
    data: int
    gpu_instance: int | None = None
    compute_instance: int | None = None


@attrs.frozen
class MemoryLimit:
    """A cgroup's hard limit on a GPU's memory, and what its processes use, in bytes."""

    hard: int
    used: int


@contextmanager
def open_library(
    host_path: Path, failed: Callable[[str, int], None] = lambda function, code: None
) -> Iterator[Library]:
    """Load and initialize libnvidia-ml from under `host_path`, and shut it down at the end.

    `failed` is called with the function and the code of each error that is not in `constants.EXPECTED`.
    Raises LibraryNotFoundError, or NvmlError when the library loads but can't start (no driver, another version).
    """
    path, lib = search.dlopen(host_path)
    library = Library(path=path, lib=lib, failed=failed)
    library.call("nvmlInit")
    try:
        yield library
    finally:
        # A driver that was unloaded or lost its GPUs refuses this too; there is nothing left to undo then.
        with suppress(NvmlError):
            library.call("nvmlShutdown")


@attrs.frozen
class Library:
    """An initialized libnvidia-ml. Each method raises NvmlError; a missing symbol is FUNCTION_NOT_FOUND."""

    path: Path
    lib: Any = attrs.field(repr=False)
    failed: Callable[[str, int], None] = attrs.field(repr=False)

    def call(self, function: str, *arguments: object) -> None:
        """Call the newest variant of `function` that this driver has."""
        for name in constants.VARIANTS.get(function, (function,)):
            symbol = self._symbol(name)
            code = Code.FUNCTION_NOT_FOUND if symbol is None else symbol(*arguments)
            if code == Code.SUCCESS:
                return
            if code != Code.FUNCTION_NOT_FOUND:
                raise self._error(name, code)
        raise NvmlError(function, Code.FUNCTION_NOT_FOUND, "Function Not Found: this driver's library lacks it")

    def driver_version(self) -> str:
        return self._text("nvmlSystemGetDriverVersion")

    def count(self) -> int:
        return self._unsigned("nvmlDeviceGetCount")

    def handle(self, index: int) -> Handle:
        handle = ffi.new("nvmlDevice_t *")
        self.call("nvmlDeviceGetHandleByIndex", index, handle)
        return Handle(handle[0])

    def uuid(self, handle: Handle) -> str:
        return self._text("nvmlDeviceGetUUID", handle)

    def name(self, handle: Handle) -> str:
        return self._text("nvmlDeviceGetName", handle)

    def minor_number(self, handle: Handle) -> int:
        """Return the N of /dev/nvidiaN, which need not be the index."""
        return self._unsigned("nvmlDeviceGetMinorNumber", handle)

    def pci_bus_id(self, handle: Handle) -> str:
        """Return it as NVML writes it, e.g. `00000000:3B:00.0`."""
        pci = ffi.new("nvmlPciInfo_t *")
        self.call("nvmlDeviceGetPciInfo", handle, pci)
        # Put together here, because the older variants fill a structure that has no `busId`.
        return f"{pci.domain:08X}:{pci.bus:02X}:{pci.device:02X}.0"

    def memory(self, handle: Handle) -> Memory:
        memory = ffi.new("nvmlMemory_v2_t *")
        memory.version = ffi.sizeof("nvmlMemory_v2_t") | 2 << 24  # NVML_STRUCT_VERSION(Memory, 2)
        try:
            self.call("nvmlDeviceGetMemoryInfo_v2", handle, memory)
        except NvmlError as error:  # drivers lack it, or have it and fail in it
            if error.code in constants.GPU_LOST:
                raise
        else:
            return Memory(memory.total, memory.used, memory.free, memory.reserved)
        memory = ffi.new("nvmlMemory_t *")
        self.call("nvmlDeviceGetMemoryInfo", handle, memory)
        return Memory(memory.total, memory.used, memory.free)

    def memory_limit(self, handle: Handle, cgroup: str) -> MemoryLimit | None:
        """Return the limit of a cgroup directory; None where it has none (R615 and later)."""
        name = ffi.new("char[]", cgroup.encode(errors="surrogateescape"))
        limits = ffi.new("nvmlGetMemoryLimits_v1_t *", {"nameSpace": name})
        try:
            self.call("nvmlDeviceGetMemoryLimits_v1", handle, limits)
        except NvmlError as error:
            # With the misc backend NOT_SUPPORTED means this as well as "can't": only a limit that was set tells.
            if error.code in (Code.NOT_FOUND, Code.NOT_SUPPORTED):
                return None
            raise
        if limits.hardLimit == constants.NO_LIMIT:
            return None
        return MemoryLimit(hard=int(limits.hardLimit), used=int(limits.currentUsed))

    def set_memory_limit(self, handle: Handle, cgroup: str, limit: int | None) -> None:
        """Set the hard limit of a cgroup directory to so many bytes, or remove it (None). Needs root and R615.

        There is no soft limit: only an MPS v3 server acts on one, and it outlives the cgroup in its ancestors.
        """
        name = ffi.new("char[]", cgroup.encode(errors="surrogateescape"))
        hard = constants.NO_LIMIT if limit is None else limit
        limits = ffi.new("nvmlSetMemoryLimits_v1_t *", {"nameSpace": name, "softLimit": 0, "hardLimit": hard})
        self.call("nvmlDeviceSetMemoryLimits_v1", handle, limits)

    def utilization(self, handle: Handle) -> int:
        """Return the percent of the last sample period (up to a second) in which the GPU was busy."""
        rates = ffi.new("nvmlUtilization_t *")
        self.call("nvmlDeviceGetUtilizationRates", handle, rates)
        return int(rates.gpu)

    def recovery_action(self, handle: Handle) -> int:
        """Return what the driver wants done: 0 nothing, 1 reset, 2 reboot, 3 drain peer traffic, 4 drain and reset."""
        value = ffi.new("nvmlFieldValue_t *", {"fieldId": constants.FIELD_RECOVERY_ACTION})
        self.call("nvmlDeviceGetFieldValues", handle, 1, value)
        if value.nvmlReturn != Code.SUCCESS:  # each field has an answer of its own
            raise self._error("nvmlDeviceGetFieldValues", value.nvmlReturn)
        return int(value.value.uiVal)

    def remapped_rows(self, handle: Handle) -> RemappedRows:
        counts = ffi.new("unsigned int[4]")
        self.call("nvmlDeviceGetRemappedRows", handle, counts, counts + 1, counts + 2, counts + 3)
        return RemappedRows(pending=bool(counts[2]), failed=bool(counts[3]))

    def retired_pages_pending(self, handle: Handle) -> bool:
        """Return whether a page of memory will be retired at the next reset (GPUs before Ampere)."""
        pending = ffi.new("int *")
        self.call("nvmlDeviceGetRetiredPagesPendingStatus", handle, pending)
        return bool(pending[0])

    def fabric(self, handle: Handle) -> Fabric:
        info = ffi.new("nvmlGpuFabricInfo_v2_t *")
        info.version = ffi.sizeof("nvmlGpuFabricInfo_v2_t") | 2 << 24  # NVML_STRUCT_VERSION(GpuFabricInfo, 2)
        self.call("nvmlDeviceGetGpuFabricInfoV", handle, info)
        return Fabric(state=int(info.state), status=int(info.status))

    def mig_mode(self, handle: Handle) -> MigMode:
        current, pending = ffi.new("unsigned int *"), ffi.new("unsigned int *")
        self.call("nvmlDeviceGetMigMode", handle, current, pending)
        return MigMode(current[0] == constants.MIG_ENABLED, pending[0] == constants.MIG_ENABLED)

    def mig_count(self, handle: Handle) -> int:
        """Return how many MIG instances the GPU can have at most: their indices are below, with holes."""
        return self._unsigned("nvmlDeviceGetMaxMigDeviceCount", handle)

    def mig_handle(self, handle: Handle, index: int) -> Handle | None:
        """Return the handle of a MIG instance, None where there is none at the index.

        It turns invalid, or another instance's, when an instance is destroyed: ask anew each time.
        """
        found = ffi.new("nvmlDevice_t *")
        try:
            self.call("nvmlDeviceGetMigDeviceHandleByIndex", handle, index, found)
        except NvmlError as error:
            if error.code == Code.NOT_FOUND:
                return None
            raise
        return Handle(found[0])

    def gpu_instance(self, handle: Handle) -> int:
        return self._unsigned("nvmlDeviceGetGpuInstanceId", handle)

    def compute_instance(self, handle: Handle) -> int:
        return self._unsigned("nvmlDeviceGetComputeInstanceId", handle)

    def mig_memory(self, handle: Handle) -> int:
        """Return the bytes of memory that a MIG instance of this profile has."""
        attributes = ffi.new("nvmlDeviceAttributes_t *")
        self.call("nvmlDeviceGetAttributes_v2", handle, attributes)
        return int(attributes.memorySizeMB) << 20

    @contextmanager
    def event_set(self) -> Iterator[EventSet]:
        """Open an event set; it is freed at the end."""
        event_set = ffi.new("nvmlEventSet_t *")
        self.call("nvmlEventSetCreate", event_set)
        try:
            yield EventSet(self, event_set[0])
        finally:
            with suppress(NvmlError):  # as in open_library
                self.call("nvmlEventSetFree", event_set[0])

    def _symbol(self, name: str) -> Any:  # noqa: ANN401  # a C function
        """Return the function of that name; None where this driver's library lacks it."""
        try:
            return getattr(self.lib, name)
        except ffi.error:
            return None

    def _unsigned(self, function: str, *arguments: object) -> int:
        value = ffi.new("unsigned int *")
        self.call(function, *arguments, value)
        return int(value[0])

    def _text(self, function: str, *arguments: object) -> str:
        buffer = ffi.new("char[]", constants.TEXT_SIZE)
        self.call(function, *arguments, buffer, constants.TEXT_SIZE)
        return self._decode(buffer)

    def _decode(self, buffer: object) -> str:
        return str(ffi.string(buffer).decode("utf-8", "replace"))

    def _error(self, function: str, code: int) -> NvmlError:
        if code not in constants.EXPECTED:
            self.failed(function, code)
        describe = self._symbol("nvmlErrorString")
        return NvmlError(function, code, f"error {code}" if describe is None else self._decode(describe(code)))


@attrs.frozen
class EventSet:
    """A set of events, for which GPUs are registered."""

    library: Library
    pointer: object = attrs.field(repr=False)
    #: By handle: a GPU whose event says that it is lost can't be asked any more.
    _uuids: dict[object, str] = attrs.Factory(dict)

    def register(self, handle: Handle, wanted: int) -> int:
        """Register for those of the `wanted` EventType bits that this GPU supports; returns them (0: none)."""
        supported = ffi.new("unsigned long long *")
        self.library.call("nvmlDeviceGetSupportedEventTypes", handle, supported)
        types = int(supported[0]) & wanted
        if types:
            self._uuids[handle] = self.library.uuid(handle)
            self.library.call("nvmlDeviceRegisterEvents", handle, types, self.pointer)
        return types

    def wait(self, milliseconds: int) -> Event | None:
        """Return the next event, or None when none came in time."""
        # Drivers from before MIG do not write the ids.
        none = constants.NO_INSTANCE
        data = ffi.new("nvmlEventData_t *", {"gpuInstanceId": none, "computeInstanceId": none})
        try:
            self.library.call("nvmlEventSetWait", self.pointer, data, milliseconds)
        except NvmlError as error:
            if error.code == Code.TIMEOUT:
                return None
            raise
        return Event(
            uuid=self._uuids.get(data.device, ""),
            type=int(data.eventType),
            data=int(data.eventData),
            gpu_instance=_instance(data.gpuInstanceId),
            compute_instance=_instance(data.computeInstanceId),
        )


def _instance(number: int) -> int | None:
    return None if number == constants.NO_INSTANCE else number
