"""What is counted, and who is late."""

from __future__ import annotations

import pytest

from sgpu.record import BUCKETS, GRACE, Durations, Record, registration_of

pytestmark = pytest.mark.pure

RESOURCE = "example.com/gpu"


class Clock:
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def record(clock: Clock) -> Record:
    return Record(clock)


class TestDurations:
    @pytest.mark.parametrize(
        ("seconds", "bucket"),
        [(0.0, 0), (BUCKETS[0], 0), (0.00011, 1), (BUCKETS[-1], len(BUCKETS) - 1), (3600.0, len(BUCKETS))],
        ids=["none", "just in", "just beyond", "the last", "longer than all"],
    )
    def test_buckets(self, seconds: float, bucket: int) -> None:
        """A bound belongs to its bucket, as Prometheus has it (`le`)."""
        durations = Durations()
        durations.add(seconds)
        assert durations.counts == [number == bucket for number in range(len(BUCKETS) + 1)]
        assert durations.total == seconds

    def test_calls(self, record: Record) -> None:
        """By method and status."""
        for method, code, seconds in (("Allocate", "OK", 1.0), ("Allocate", "OK", 2.0), ("Allocate", "NOT_FOUND", 4.0)):
            record.called(method, code, seconds)
        totals = {key: (sum(durations.counts), durations.total) for key, durations in record.calls.items()}
        assert totals == {("Allocate", "OK"): (2, 3.0), ("Allocate", "NOT_FOUND"): (1, 4.0)}


class TestRegistrations:
    def test_attempts(self, record: Record) -> None:
        """Each counts; the resource is registered from the one that succeeded until the session ends."""
        with record.session(RESOURCE) as registration:
            record.attempted(RESOURCE, "kubelet", success=False)
            assert not registration.registered
            record.attempted(RESOURCE, "kubelet", success=True)
            assert registration.registered
            record.expect(registration_of(RESOURCE), -2 * GRACE)
        assert not record.overdue()
        assert record.registrations[RESOURCE] is registration
        assert not registration.registered
        assert registration.attempts == {True: 1, False: 1}

    def test_the_next_session_counts_on(self, record: Record) -> None:
        """Sessions come and go; their resource is the same."""
        for _ in range(2):
            with record.session(RESOURCE):
                record.attempted(RESOURCE, "kubelet", success=True)
        assert record.registrations[RESOURCE].attempts == {True: 2}

    def test_a_session_that_fails(self, record: Record) -> None:
        """It is over all the same."""

        def fail() -> None:
            with record.session(RESOURCE):
                record.attempted(RESOURCE, "kubelet", success=True)
                raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            fail()
        assert not record.registrations[RESOURCE].registered

    def test_kubelet_restarts(self, record: Record) -> None:
        """A kubelet is counted once, however many resources and sessions meet it, and the first one not at all."""
        with record.session(RESOURCE), record.session("example.com/other"):
            for kubelet in ("one", "one", "two"):
                for resource in record.registrations:
                    record.attempted(resource, kubelet, success=True)
            record.attempted(RESOURCE, "three", success=False)
        assert record.kubelet_restarts == 1

    def test_left(self, record: Record, clock: Clock) -> None:
        """Nothing remains of a resource that is offered no longer, and nobody waits for it."""
        with record.session(RESOURCE):
            pass
        record.expect(registration_of(RESOURCE), 5)
        record.left(RESOURCE)
        record.left(RESOURCE)
        clock.now += 10_000
        assert not record.registrations
        assert not record.overdue()


class TestLoops:
    def test_late(self, record: Record, clock: Clock) -> None:
        """Not until what it said and the grace are over; and no longer once it is heard of."""
        record.expect("sampler", 5)
        clock.now += 5 + GRACE
        assert not record.overdue()
        clock.now += 1
        assert record.overdue() == {"sampler": GRACE + 1}
        record.expect("sampler", 5)
        assert not record.overdue()

    def test_others_do_not_speak_for_it(self, record: Record, clock: Clock) -> None:
        """Each loop for itself."""
        record.expect("sampler", 5)
        clock.now += 1000
        record.expect("driver", 5)
        assert list(record.overdue()) == ["sampler"]

    def test_resting(self, record: Record, clock: Clock) -> None:
        """One that waits for what may never come is not late, however long."""
        record.expect("registration", 5)
        record.rest("registration")
        record.rest("registration")
        clock.now += 1e9
        assert not record.overdue()


def test_a_copy_stays(record: Record) -> None:
    """Whatever is counted after it was made."""

    def count() -> None:
        with record.session(RESOURCE) as registration:
            record.attempted(RESOURCE, "kubelet", success=True)
            registration.streams += 1
        record.called("Allocate", "OK", 0.001)
        record.reloaded(True)
        record.nvml_errors["nvmlInit", "9"] += 1

    count()
    copy = record.copy()
    before = repr(copy)
    assert before == repr(record)
    count()
    assert repr(copy) == before != repr(record)
