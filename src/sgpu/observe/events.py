"""Which Kubernetes Events there are, what they say, and when each may be written. Decides only; sends nothing."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from sgpu.lib.logs import printable
from sgpu.node.gpu import Gpu, MigInstance, label
from sgpu.node.notices import Notice, Reason

#: Events within a minute. The kubelet allows itself a burst of 25 and then one in 5 minutes for each object; etcd keeps
#: all of them for an hour, and a fault of the driver can concern 16 GPUs of each node at once.
PER_MINUTE: Final = 5
MINUTE: Final = 60.0
#: Seconds after an event in which the same is not written again, but counted.
REPEAT: Final = 60.0
#: Different events that wait at most: what comes later than this many at the pace above is no news.
MOST_WAITING: Final = 50
#: Bytes of a message, as `k8s.io/kubernetes/pkg/apis/core/validation` has it.
MOST_BYTES: Final = 1024
#: Characters of an object's name in the name of its event: a name may have 253, and 17 are for what makes it unique.
MOST_OF_NAME: Final = 253 - 17
#: Where Events of objects without a namespace are, which `kubectl describe node` reads.
NODE_NAMESPACE: Final = "default"
COMPONENT: Final = "sgpu"
#: What makes the other one out of date.
_OPPOSITE: Final = {Reason.GPU_HEALTHY: Reason.GPU_UNHEALTHY, Reason.GPU_UNHEALTHY: Reason.GPU_HEALTHY}

Key = tuple[Reason, str, str, str]


class GpuChanges:
    """Notices of GPUs and MIG instances that are faulty, or no longer. A fault since before `since` is no news."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._reasons: Mapping[str, str] = {}

    def take(self, gpus: Iterable[Gpu], pods: Callable[[str], int | None]) -> list[Notice]:
        """Return what has changed since the last call. `pods` returns how many use a unit; None: unknown."""
        parts = {part.uuid: part for part in _parts(gpus)}
        before, self._reasons = self._reasons, {uuid: part.reason for uuid, part in parts.items()}
        found = []
        for uuid, part in parts.items():
            name, old = f"{label(uuid)} ({part.name})", before.get(uuid, "")
            if part.reason and part.reason != old and (old or part.since >= self._since):
                message = f"{name} is unhealthy: {part.reason}. It gets no new pods{_used(pods(uuid))}"
                found.append(Notice(Reason.GPU_UNHEALTHY, uuid, message))
            elif old and not part.reason:
                found.append(Notice(Reason.GPU_HEALTHY, uuid, f"{name} is healthy again; it was unhealthy: {old}"))
        return found


def _parts(gpus: Iterable[Gpu]) -> Iterator[Gpu | MigInstance]:
    for gpu in gpus:
        yield gpu
        yield from gpu.instances


def _used(pods: int | None) -> str:
    # Not which: whoever reads Events of the namespace `default` may not be allowed to know the pods of others.
    if not pods:
        return "" if pods is None else "; no pod uses it"
    return f"; {pods} pod{'s' if pods > 1 else ''} had it: `kubectl sgpu` shows which"


@attrs.frozen
class Occurrences:
    """A notice, how often it came since it was last written, and when first and last, in seconds since the epoch."""

    notice: Notice
    first: float
    last: float
    count: int = 1


class Outbox:
    """The events that wait to be written. `now` is in monotonic seconds, `wall` in seconds since the epoch."""

    def __init__(self) -> None:
        self._waiting: dict[Key, Occurrences] = {}
        self._written: deque[tuple[float, Key]] = deque()
        #: Whether events were given up, because too many waited.
        self.left_out = False

    def add(self, notice: Notice, wall: float) -> None:
        """Let an event wait, together with the same that waits already."""
        if opposite := _OPPOSITE.get(notice.reason):
            self._waiting.pop(_key(notice, opposite), None)
        known = self._waiting.get(_key(notice))
        count, first = (known.count + 1, known.first) if known else (1, wall)
        self._waiting[_key(notice)] = Occurrences(notice, first, wall, count)
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]
            self.left_out = True

    def due(self, now: float) -> tuple[Occurrences | None, float]:
        """Return an event that is to be written now; or None, and the seconds until there is one."""
        while self._written and self._written[0][0] <= now - max(MINUTE, REPEAT):
            self._written.popleft()
        latest = [written for written, _ in self._written if written > now - MINUTE][-PER_MINUTE:]
        pause = latest[0] + MINUTE - now if len(latest) == PER_MINUTE else 0.0
        again = {key: written + REPEAT - now for written, key in self._written}
        waits = {key: max(pause, again.get(key, 0.0), 0.0) for key in self._waiting}
        first = min(waits, key=lambda key: waits[key], default=None)
        if first is None:
            self.left_out = False
            return None, float("inf")
        return (None, waits[first]) if waits[first] else (self._waiting[first], 0.0)

    def done(self, occurrences: Occurrences, now: float) -> None:
        """Record that an event was written, or never will be."""
        key = _key(occurrences.notice)
        del self._waiting[key]
        self._written.append((now, key))


def _key(notice: Notice, reason: Reason | None = None) -> Key:
    return reason or notice.reason, notice.uuid, notice.pod, notice.container


def event(occurrences: Occurrences, node_name: str, pod_uid: str) -> dict[str, Any]:
    """Return the object, under the same name each time.

    `pod_uid` may be unknown (empty): then `kubectl describe pod` does not show the event.
    """
    notice = occurrences.notice
    namespace, _, name = notice.pod.rpartition("/")
    if namespace:
        involved = {"kind": "Pod", "namespace": namespace, "name": name, "uid": pod_uid}
        if notice.container:
            involved["fieldPath"] = f"spec.containers{{{notice.container}}}"  # as the kubelet writes it
    else:
        # The uid is the name, as in events of the kubelet, which does not know another: by it, kubectl finds them.
        involved = {"kind": "Node", "name": node_name, "uid": node_name}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "namespace": namespace or NODE_NAMESPACE,
            "name": f"{involved['name'][:MOST_OF_NAME].rstrip('-.')}.{_unique(occurrences)}",
        },
        "involvedObject": {"apiVersion": "v1", **{key: value for key, value in involved.items() if value}},
        "reason": notice.reason.value,
        "message": _cut(printable(notice.message)),
        "type": "Normal" if notice.reason is Reason.GPU_HEALTHY else "Warning",
        "source": {"component": COMPONENT, "host": node_name},
        "reportingComponent": COMPONENT,
        "reportingInstance": node_name,
        "firstTimestamp": _timestamp(occurrences.first),
        "lastTimestamp": _timestamp(occurrences.last),
        "count": occurrences.count,
    }


def _unique(occurrences: Occurrences) -> str:
    """Return what tells it from others, but not from itself: where an answer is lost, it is sent again."""
    parts = repr((_key(occurrences.notice), occurrences.first)).encode()
    return hashlib.blake2s(parts, digest_size=8).hexdigest()


def _cut(message: str) -> str:
    encoded = message.encode()
    return message if len(encoded) <= MOST_BYTES else encoded[: MOST_BYTES - 3].decode(errors="ignore") + "…"


def _timestamp(wall: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall))
