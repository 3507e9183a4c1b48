"""Containers of pods, the processes in them, and what they may have beside shares. Values."""

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


@attrs.frozen
class OtherUse:
    """A container to which another device plugin gave a GPU, as this resource; `whole`: all of it, and not a part."""

    container: Container
    resource: str
    whole: bool


@attrs.frozen(order=True)
class StaleAnswer:
    """A pod, and the GPUs that one of its containers gets at its next start and should get, as sorted paths."""

    pod: str
    stored: tuple[str, ...]
    right: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.pod} ({', '.join(self.stored)} instead of {', '.join(self.right)})"


#: What an operator can do about stale answers.
STALE_ADVICE: Final = "delete these pods: new ones get new answers"
#: Stands for all processes that belong to no pod.
NO_CONTAINER: Final = Container("", "", "")
#: What the log calls them.
NO_POD: Final = "processes of no pod"
