"""What the daemon has done and does, counted: its parts write it down, metrics and probes read it.

Plain values, for one thread: take a `copy` into another one. Imports nothing of sgpu.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import attrs

#: Upper bounds of the buckets that durations of RPCs are counted in, in seconds. An Allocate takes about one
#: millisecond; a kubelet that waits for seconds is what one looks for.
BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Seconds by which a loop may be later than it said. A node can be busy, and whoever is late is killed.
GRACE: Final = 60.0


def registration_of(resource: str) -> str:
    """What the loop is called that keeps a resource registered."""
    return f"registration of {resource}"


@attrs.define(eq=False)
class Durations:
    """How many calls took how long: `counts` has one for each of BUCKETS, and last those that took longer."""

    counts: list[int] = attrs.field(factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


@attrs.define(eq=False)
class Registration:
    """One resource: whether the kubelet has it, how many ListAndWatch streams are open, and what attempts came to."""

    registered: bool = False
    streams: int = 0
    attempts: Counter[bool] = attrs.field(factory=Counter)


@attrs.define(eq=False)
class Record:
    """All of it. `clock` gives monotonic seconds."""

    clock: Callable[[], float] = attrs.field(repr=False)
    registrations: dict[str, Registration] = attrs.field(factory=dict)
    kubelet_restarts: int = 0
    #: By method and gRPC status code.
    calls: dict[tuple[str, str], Durations] = attrs.field(factory=dict)
    #: By whether the settings could be used.
    reloads: Counter[bool] = attrs.field(factory=Counter)
    #: By function and code.
    nvml_errors: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    _kubelet: object = None
    _deadlines: dict[str, float] = attrs.field(factory=dict)

    @contextmanager
    def session(self, resource: str) -> Iterator[Registration]:
        """A session of this resource, which is registered in it only."""
        registration = self.registrations.setdefault(resource, Registration())
        try:
            yield registration
        finally:
            registration.registered = False
            self.rest(registration_of(resource))

    def attempted(self, resource: str, kubelet: object, success: bool) -> None:
        """An attempt to register in a session came back. `kubelet` is what the kubelet is told apart by."""
        registration = self.registrations[resource]
        registration.attempts[success] += 1
        registration.registered = success
        if success:
            self.kubelet_restarts += self._kubelet not in (None, kubelet)
            self._kubelet = kubelet

    def left(self, resource: str) -> None:
        """A resource is offered no longer."""
        self.registrations.pop(resource, None)
        self.rest(registration_of(resource))

    def called(self, method: str, code: str, seconds: float) -> None:
        """A call was answered."""
        self.calls.setdefault((method, code), Durations()).add(seconds)

    def reloaded(self, usable: bool) -> None:
        """The settings were read again."""
        self.reloads[usable] += 1

    def expect(self, loop: str, seconds: float) -> None:
        """This loop says so, or that it rests, again within so many seconds: else it hangs."""
        self._deadlines[loop] = self.clock() + seconds + GRACE

    def rest(self, loop: str) -> None:
        """This loop waits for something that may never come."""
        self._deadlines.pop(loop, None)

    def overdue(self) -> Mapping[str, float]:
        """The loops that hang, and for how many seconds they have."""
        now = self.clock()
        return {loop: now - deadline + GRACE for loop, deadline in self._deadlines.items() if deadline < now}

    def copy(self) -> Record:
        """One that stays as this is now."""
        return copy.deepcopy(self)
