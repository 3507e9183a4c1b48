"""What happened to a GPU or a container, for whoever makes it known outside of the log. Knows no API server.

Kept here until it is taken, because those who notice it do not know who listens.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final

import attrs

from sgpu.lib.concurrency import Broadcast

#: Notices that are kept: where nobody takes them, the newest. A pod for each share of a GPU, at the default.
MOST: Final = 100


class Reason(enum.Enum):
    """What happened, as an Event names it."""

    GPU_UNHEALTHY = "GPUUnhealthy"
    GPU_HEALTHY = "GPUHealthy"
    MEMORY_FULL = "GPUMemoryFull"
    MEMORY_EXCEEDED = "GPUMemoryExceeded"
    PROCESS_TERMINATED = "GPUProcessTerminated"
    PROCESS_KILLED = "GPUProcessKilled"
    ANSWER_STALE = "GPUAnswerStale"


@attrs.frozen
class Notice:
    """What happened to the GPU or MIG instance with this UUID, or by it to a pod.

    `pod` is its namespace and name, as `team/a`; empty where it concerns the node. `container` may be unknown.
    """

    reason: Reason
    uuid: str
    message: str
    pod: str = ""
    container: str = ""


class Notices:
    """The latest ones. `changed` notifies of new ones."""

    def __init__(self) -> None:
        self.changed = Broadcast()
        self._kept: deque[Notice] = deque(maxlen=MOST)

    def add(self, notice: Notice) -> None:
        """Keep one until it is taken."""
        self._kept.append(notice)
        self.changed.notify()

    def take(self) -> list[Notice]:
        """Return those since the last call, the oldest first."""
        taken = list(self._kept)
        self._kept.clear()
        return taken
