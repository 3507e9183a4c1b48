"""libnvidia-ml in Python. Loaded from the host path when asked for, never at import. Knows nothing of Kubernetes."""

from sgpu.nvml.constants import NO_ANSWER, Code, EventType
from sgpu.nvml.library import Event, EventSet, Fabric, Handle, Library, Memory, NvmlError, RemappedRows, open_library
from sgpu.nvml.processes import memory_by_process, utilisation_by_process
from sgpu.nvml.search import LibraryNotFoundError

__all__ = [
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
    "NvmlError",
    "RemappedRows",
    "memory_by_process",
    "open_library",
    "utilisation_by_process",
]
