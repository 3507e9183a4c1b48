"""Which Events there are, what they say, and when they may be written. Pure."""

from __future__ import annotations

import re

import attrs
import pytest

from sgpu.node.gpu import Gpu, Health, MigInstance
from sgpu.node.notices import MOST, Notice, Notices, Reason
from sgpu.observe.events import (
    MINUTE,
    MOST_BYTES,
    MOST_WAITING,
    PER_MINUTE,
    REPEAT,
    GpuChanges,
    Occurrences,
    Outbox,
    event,
)

pytestmark = pytest.mark.pure

GPU = Gpu("GPU-a", "Tesla T4", "0:3B:0.0", (), since=50.0)
FULL = Notice(Reason.MEMORY_FULL, "GPU-a", "GPU GPU-a: memory is full", "team/a", "main")


def down(gpu: Gpu, reason: str, since: float = 200.0) -> Gpu:
    return attrs.evolve(gpu, health=Health.UNHEALTHY, reason=reason, since=since)


def unknown(uuid: str) -> int | None:
    """It is unknown which pods use it."""
    return None


class TestGpuChanges:
    def test_a_fault(self) -> None:
        """Once when it comes, when it changes and when it ends; with the reason, and how many pods had the GPU."""
        changes = GpuChanges(since=100.0)
        assert changes.take([GPU], unknown) == []
        (first,) = changes.take([down(GPU, "XID 79")], lambda uuid: 2)
        assert (first.reason, first.uuid, first.pod) == (Reason.GPU_UNHEALTHY, "GPU-a", "")
        assert all(fact in first.message for fact in ("GPU GPU-a (Tesla T4)", "XID 79", "2 pods"))
        assert changes.take([down(GPU, "XID 79")], unknown) == []
        (second,) = changes.take([down(GPU, "XID 48")], unknown)
        assert "XID 48" in second.message
        assert "pod uses it" not in second.message
        (end,) = changes.take([GPU], unknown)
        assert end.reason is Reason.GPU_HEALTHY
        assert "XID 48" in end.message

    def test_one_instance(self) -> None:
        """A fault of a MIG instance is not one of its GPU."""
        instance = MigInstance("MIG-a", "T4 MIG 1g", "1g", None, reason="XID 94", since=200.0)
        (notice,) = GpuChanges(100.0).take(
            [attrs.evolve(GPU, instances=(instance,))], lambda uuid: int(uuid == "MIG-a")
        )
        assert notice.uuid == "MIG-a"
        assert "1 pod " in notice.message
        (notice,) = GpuChanges(100.0).take([down(GPU, "XID 79")], lambda uuid: 0)
        assert "no pod uses it" in notice.message

    def test_an_older_fault(self) -> None:
        """An earlier daemon has told it; its end is news."""
        changes = GpuChanges(since=100.0)
        assert changes.take([down(GPU, "XID 79", since=99.0)], unknown) == []
        assert [notice.reason for notice in changes.take([GPU], unknown)] == [Reason.GPU_HEALTHY]


class TestOutbox:
    def written(self, outbox: Outbox, until: float) -> list[tuple[float, Occurrences]]:
        """What is written, when; by who writes as soon as it is time to."""
        now, found = 0.0, []
        while now < until:
            due, seconds = outbox.due(now)
            if due:
                outbox.done(due, now)
                found.append((now, due))
            else:
                now += seconds
        return found

    def test_the_same_again(self) -> None:
        """Counted, and written once more after a while."""
        outbox = Outbox()
        outbox.add(FULL, wall=1.0)
        assert self.written(outbox, REPEAT) == [(0.0, Occurrences(FULL, 1.0, 1.0))]
        for wall in (2.0, 3.0):
            outbox.add(FULL, wall)
        assert self.written(outbox, 2 * REPEAT) == [(REPEAT, Occurrences(FULL, 2.0, 3.0, count=2))]

    def test_pace(self) -> None:
        """A few a minute, in the order in which they came."""
        outbox = Outbox()
        notices = [attrs.evolve(FULL, pod=f"team/{number}") for number in range(2 * PER_MINUTE + 1)]
        for notice in notices:
            outbox.add(notice, wall=0.0)
        found = self.written(outbox, 10 * MINUTE)
        assert [each.notice for _, each in found] == notices
        assert [now for now, _ in found] == [0.0] * PER_MINUTE + [MINUTE] * PER_MINUTE + [2 * MINUTE]

    def test_what_is_out_of_date(self) -> None:
        """A fault that is over before it could be written is told by its end alone."""
        outbox = Outbox()
        for reason in (Reason.GPU_UNHEALTHY, Reason.GPU_HEALTHY, Reason.GPU_UNHEALTHY, Reason.GPU_HEALTHY):
            outbox.add(Notice(reason, "GPU-a", ""), wall=0.0)
        assert [each.notice.reason for _, each in self.written(outbox, 1.0)] == [Reason.GPU_HEALTHY]

    def test_too_many(self) -> None:
        """The oldest are given up, and it is known until no event waits any more."""
        outbox = Outbox()
        for number in range(MOST_WAITING + 2):
            outbox.add(attrs.evolve(FULL, pod=f"team/{number}"), wall=0.0)
        due, _ = outbox.due(0.0)
        assert due
        assert (due.notice.pod, outbox.left_out) == ("team/2", True)
        self.written(outbox, until=3600.0)
        assert not outbox.left_out


class TestEvent:
    @pytest.mark.parametrize("version", ["1.25", "1.37"])
    @pytest.mark.parametrize(
        "notice",
        [
            FULL,
            attrs.evolve(FULL, container=""),
            attrs.evolve(FULL, pod=""),
            attrs.evolve(FULL, pod="team/" + "a." * 126 + "a", message="ü" * 2000),
        ],
        ids=["container", "pod", "node", "long"],
    )
    def test_valid(self, notice: Notice, version: str) -> None:
        """Kubernetes takes it, as far as the schema and the rules beside it go."""
        import kubernetes_validate

        thing = event(Occurrences(notice, 0.0, 60.0, 2), "node-a", "uid-1")
        kubernetes_validate.validate(thing, version, strict=True)
        involved, name = thing["involvedObject"], thing["metadata"]["name"]
        assert involved.get("namespace", "default") == thing["metadata"]["namespace"]
        assert len(name) <= 253
        assert all(re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", part) for part in name.split("."))
        assert len(thing["message"].encode()) <= MOST_BYTES

    def test_of_a_container(self) -> None:
        """By the pod's uid, with the container, as kubectl selects and shows them."""
        thing = event(Occurrences(FULL, 0.0, 60.0, 2), "node-a", "uid-1")
        path = "spec.containers{main}"
        assert thing["involvedObject"] == {
            **{"apiVersion": "v1", "kind": "Pod", "namespace": "team", "name": "a", "uid": "uid-1", "fieldPath": path}
        }
        assert (thing["reason"], thing["type"], thing["count"]) == ("GPUMemoryFull", "Warning", 2)
        assert thing["source"] == {"component": "sgpu", "host": "node-a"}
        assert (thing["firstTimestamp"], thing["lastTimestamp"]) == ("1970-01-01T00:00:00Z", "1970-01-01T00:01:00Z")

    def test_of_the_node(self) -> None:
        """In the namespace, and by the uid, that `kubectl describe node` looks for."""
        thing = event(Occurrences(Notice(Reason.GPU_HEALTHY, "GPU-a", "back"), 0.0, 0.0), "node-a", "")
        assert thing["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "node-a"}
        assert (thing["metadata"]["namespace"], thing["type"]) == ("default", "Normal")


def test_unknown_takes_notices() -> None:
    """The newest are kept."""
    notices = Notices()
    for number in range(MOST + 1):
        notices.add(attrs.evolve(FULL, uuid=str(number)))
    assert [notice.uuid for notice in notices.take()] == [str(number) for number in range(1, MOST + 1)]
    assert notices.take() == []
