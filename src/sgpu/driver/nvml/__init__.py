"""libnvidia-ml in Python. Loaded from the host path when asked for, never at import. Knows nothing of Kubernetes."""

from sgpu.driver.nvml.constants import GPU_LOST, NO_ANSWER, Code, EventType
from sgpu.driver.nvml.library import (
    Event,
    EventSet,
    Fabric,
    Handle,
    Library,
    Memory,
    MemoryLimit,
    MigMode,
    NvmlError,
    RemappedRows,
    open_library,
)
from sgpu.driver.nvml.processes import list_processes, utilization_by_process
from sgpu.driver.nvml.search import LibraryNotFoundError

__all__ = [
    "GPU_LOST",
    "NO_ANSWER",
    "Code",
    "Event",
    "EventSet",
    "EventType",
    "Fabric",
    "Handle",
    "Library",
    "LibraryNotFoundError",
    "Memory",
    "MemoryLimit",
    "MigMode",
    "NvmlError",
    "RemappedRows",
    "list_processes",
    "open_library",
    "utilization_by_process",
]
