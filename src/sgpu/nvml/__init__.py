"""libnvidia-ml in Python. Loaded from the host path when asked for, never at import. Knows nothing of Kubernetes."""

from sgpu.nvml.constants import Code, EventType
from sgpu.nvml.library import Event, EventSet, Fabric, Handle, Library, Memory, NvmlError, RemappedRows, open_library
from sgpu.nvml.search import LibraryNotFoundError

__all__ = [
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
    "open_library",
]
