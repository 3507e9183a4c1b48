"""Containers of pods, and the processes in them. Values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs


@attrs.frozen(cache_hash=True)
class Container:
    """A container that has a share, or uses a GPU without one."""

    namespace: str
    pod: str
    container: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}" if self.namespace else self.pod


@attrs.frozen(cache_hash=True)
class Process:
    """A process, also where its id is another's later: `start` is in clock ticks from the boot."""

    pid: int
    start: int


@attrs.frozen
class Owners:
    """The container of each process that still runs, by process id; None: it is in no pod.

    `unknown` are processes of some pod, in none of its known containers: in its pause container, or in a sandbox (Kata,
    gVisor) whose cgroup is the pod's. `mps` are servers of NVIDIA's MPS. `processes` are those in `containers`.
    """

    containers: Mapping[int, Container | None]
    unknown: frozenset[int]
    mps: frozenset[int]
    processes: Mapping[int, Process]


#: Stands for all processes that belong to no pod.
NO_CONTAINER: Final = Container("", "", "")
#: What the log calls them.
NO_POD: Final = "processes of no pod"
