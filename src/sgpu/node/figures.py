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

    Process ids are those that libnvidia-ml's own process sees.
    """

    memory_total: int | None = None
    memory_free: int | None = None
    utilization: int | None = None
    processes: tuple[ProcessUse, ...] | None = None
