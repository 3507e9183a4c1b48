"""Counters of the daemon's work: its parts count, metrics read.

Plain values, for one thread: give another thread a `copy`. Imports nothing of sgpu.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter, defaultdict
from typing import Final

import attrs

#: Upper bounds of the buckets that durations of RPCs are counted in, in seconds. An Allocate takes about one
#: millisecond; what one looks for is a kubelet that waits for seconds.
BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@attrs.define(eq=False)
class Durations:
    """A histogram of durations: `counts` has one for each of BUCKETS, and last those that took longer."""

    counts: list[int] = attrs.field(factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one call."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


@attrs.define(eq=False)
class Counters:
    """All counters since the daemon started."""

    #: Attempts to register, by resource and success.
    registrations: Counter[tuple[str, bool]] = attrs.field(factory=Counter)
    kubelet_restarts: int = 0
    #: RPCs by method and gRPC status code.
    calls: defaultdict[tuple[str, str], Durations] = attrs.field(factory=lambda: defaultdict(Durations))
    #: Reads of the settings, by whether they could be used.
    reloads: Counter[bool] = attrs.field(factory=Counter)
    #: Calls of libnvidia-ml that failed, by function and code.
    nvml_errors: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    #: What the memory guard did, by UUID, namespace, pod, container and action.
    guard_actions: Counter[tuple[str, ...]] = attrs.field(factory=Counter)

    def called(self, method: str, code: str, seconds: float) -> None:
        """Count an RPC that was answered."""
        self.calls[method, code].add(seconds)

    def reloaded(self, usable: bool) -> None:
        """Count a read of the settings."""
        self.reloads[usable] += 1

    def copy(self) -> Counters:
        """Return one that stays as this is now."""
        return copy.deepcopy(self)
