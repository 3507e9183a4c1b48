"""The driver's figures of a unit's use at one moment. Values only: the driver's process imports this, too."""

from __future__ import annotations

import attrs


@attrs.frozen
class ProcessUse:
    """A process that uses a GPU: bytes of memory, and percent of the time since the last poll. None: unknown."""

    pid: int
    memory: int | None
    utilization: int | None


@attrs.frozen
class Figures:
    """Memory in bytes, utilization in percent of the last sample period, and the processes. None: unknown.

    `memory_reserved` is the driver's own, which no program can use. Process ids are those that libnvidia-ml's own
    process sees.
    """

    memory_total: int | None = None
    memory_free: int | None = None
    utilization: int | None = None
    processes: tuple[ProcessUse, ...] | None = None
    memory_reserved: int | None = None

    @property
    def memory_used(self) -> int | None:
        """Return the memory that is used, the driver's own included."""
        if self.memory_total is None or self.memory_free is None:
            return None
        return self.memory_total - self.memory_free

    @property
    def memory_usable(self) -> int | None:
        """Return the memory that programs can use: what CUDA reports as the total."""
        return None if self.memory_total is None else self.memory_total - (self.memory_reserved or 0)
