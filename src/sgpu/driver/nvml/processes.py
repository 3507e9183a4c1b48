"""The processes that use a GPU: what memory each has, and how much of the time it keeps the GPU busy.

Process ids are those of the caller's pid namespace (older drivers: of the host's). Knows nothing of containers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from sgpu.driver.nvml._bindings import ffi
from sgpu.driver.nvml.constants import NO_ANSWER, Code
from sgpu.driver.nvml.library import Handle, Library, NvmlError

COMPUTE: Final = "nvmlDeviceGetComputeRunningProcesses"
GRAPHICS: Final = "nvmlDeviceGetGraphicsRunningProcesses"
MPS: Final = "nvmlDeviceGetMPSComputeRunningProcesses"
#: Newest variant first, and what it fills.
LAYOUTS: Final = (("_v3", "nvmlProcessInfo_v2_t"), ("_v2", "nvmlProcessInfo_v2_t"), ("", "nvmlProcessInfo_v1_t"))
#: Entries to begin with (drivers ask for room for 100 samples even when there are few), and at most.
FIRST_ROOM: Final = 128
MOST_ROOM: Final = 1 << 16
#: `usedGpuMemory` of a process where it is unknown.
NOT_AVAILABLE: Final = (1 << 64) - 1
#: Bytes of an entry, as drivers write them, whatever the variant: 550.127 (Hopper) writes v1's 16 into `_v3`, 535.43
#: to 535.86 write 32.
STRIDES: Final = (16, 24, 32)
#: What room that was not written to is recognized by.
UNTOUCHED: Final = b"\xaa"


class ListedProcess(NamedTuple):
    """A process that uses a GPU: bytes of memory (None: unknown), and whether it is a client of MPS."""

    memory: int | None
    is_mps_client: bool = False


def list_processes(library: Library, handle: Handle) -> Mapping[int, ListedProcess]:
    """Return the processes by id. Raises NvmlError."""
    found = {pid: ListedProcess(memory) for pid, memory in _listed(library, COMPUTE, handle)}
    for function in (GRAPHICS, MPS):
        try:
            for pid, memory in _listed(library, function, handle):
                # A process can be in several lists, with all of its memory in each.
                before = found.get(pid, ListedProcess(None)).memory
                most = max(before, memory, key=lambda known: -1 if known is None else known)
                found[pid] = ListedProcess(most, is_mps_client=function == MPS)
        except NvmlError as error:
            if error.code not in NO_ANSWER:
                raise
    return found


def utilization_by_process(library: Library, handle: Handle, since: int) -> Mapping[int, int]:
    """Return the percent of the time since `since` (microseconds since the epoch) by process id; zeros may be left out.

    What clients of MPS do counts for their server. Raises NvmlError.
    """
    size = ffi.sizeof("nvmlProcessUtilizationSample_t")

    def call(count: Any, room: Any) -> None:  # noqa: ANN401  # cffi's
        samples = ffi.cast("nvmlProcessUtilizationSample_t *", room)
        library.call("nvmlDeviceGetProcessUtilization", handle, samples, count, since)

    try:
        count, room = _fill(call, size)
    except NvmlError as error:
        if error.code == Code.NOT_FOUND:  # nothing was busy
            return {}
        raise
    percents = defaultdict(list)
    for sample in ffi.cast("nvmlProcessUtilizationSample_t *", room)[0:count]:
        # Drivers return more entries than they fill. What is in those is no percentage, or from long ago.
        if sample.pid and sample.smUtil <= 100 and sample.timeStamp > since:
            percents[int(sample.pid)].append(int(sample.smUtil))
    return {pid: round(sum(values) / len(values)) for pid, values in percents.items()}


def _listed(library: Library, function: str, handle: Handle) -> Iterator[tuple[int, int | None]]:
    """Yield one list, by the newest variant that this driver has."""
    for suffix, layout in LAYOUTS:

        def call(count: Any, room: Any, name: str = function + suffix, layout: str = layout) -> None:  # noqa: ANN401
            library.call(name, handle, count, ffi.cast(f"{layout} *", room))

        try:
            count, room = _fill(call, STRIDES[-1])
        except NvmlError as error:
            if error.code == Code.FUNCTION_NOT_FOUND and suffix:
                continue
            raise
        stride = _stride(bytes(ffi.buffer(room, count * STRIDES[-1])), count)
        for number in range(count):
            info = ffi.cast("nvmlProcessInfo_v1_t *", room + number * stride)  # its fields come first in all layouts
            yield int(info.pid), None if info.usedGpuMemory == NOT_AVAILABLE else int(info.usedGpuMemory)
        return


def _stride(written: bytes, count: int) -> int:
    """Return how long an entry is, by how much of the room was written: drivers don't keep to a variant's layout."""
    return next(stride for stride in STRIDES if not written[stride * count :].strip(UNTOUCHED))


def _fill(call: Callable[[Any, Any], None], size: int) -> tuple[int, Any]:
    """Return how many entries `call` wrote, and where. Each retry makes room for more."""
    entries = FIRST_ROOM
    while True:
        count = ffi.new("unsigned int *", entries)
        room = ffi.new("char[]", UNTOUCHED * (entries * size))
        try:
            call(count, room)
        except NvmlError as error:
            if error.code != Code.INSUFFICIENT_SIZE or entries == MOST_ROOM:
                raise
            entries = min(2 * max(entries, count[0]), MOST_ROOM)
            continue
        return min(count[0], entries), room
