"""The resources that are registered with the kubelet, and its open streams: for metrics, probes and status.

Plain values, for one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from sgpu.lib.concurrency import Broadcast
from sgpu.observe.counters import Counters


@attrs.define(eq=False)
class Registration:
    """One resource: whether the kubelet took the last registration, and how many ListAndWatch streams are open.

    Whoever changes `streams` notifies `changed`. `unpublished` says why the scheduler does not know the resource, where
    sgpu has to publish it (DRA).
    """

    registered: bool = False
    streams: int = 0
    changed: Broadcast = attrs.Factory(Broadcast)
    unpublished: Callable[[], str] | None = None


class Registrations:
    """All resources that have had a session, by name.

    `api`: the way that GPUs are offered, as `-api` names it; empty: not decided yet. `api_reason`: why, with `auto`.
    """

    def __init__(self, counters: Counters) -> None:
        self.api = ""
        self.api_reason = ""
        self.by_resource: dict[str, Registration] = {}
        self.changed = Broadcast()
        self._counters = counters
        self._kubelet: object = None  # what tells one kubelet from another; None until one took a registration

    @contextmanager
    def session(self, resource: str) -> Iterator[Registration]:
        """Open a session of this resource; only in a session can it be registered."""
        registration = self.by_resource.setdefault(resource, Registration(changed=self.changed))
        try:
            yield registration
        finally:
            registration.registered = False

    def attempted(self, resource: str, kubelet: object, success: bool) -> None:
        """Record the outcome of an attempt to register in a session. `kubelet` tells one kubelet from another."""
        self.by_resource[resource].registered = success
        self.changed.notify()
        self._counters.registrations[resource, success] += 1
        if success:
            self._counters.kubelet_restarts += self._kubelet not in (None, kubelet)
            self._kubelet = kubelet

    def serves(self, resource: str) -> bool:
        """Return whether the kubelet took the registration of this resource, and has a stream open."""
        registration = self.by_resource.get(resource)
        return registration is not None and registration.registered and registration.streams > 0

    def remove(self, resource: str) -> None:
        """Forget a resource that is no longer offered."""
        self.by_resource.pop(resource, None)
        for success in (True, False):
            self._counters.registrations.pop((resource, success), None)
