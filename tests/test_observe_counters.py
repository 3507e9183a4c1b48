"""Counters of the daemon's work."""

from __future__ import annotations

import pytest

from sgpu.observe.counters import BUCKETS, Counters, Durations

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (BUCKETS[0], 0), (0.00011, 1), (BUCKETS[-1], len(BUCKETS) - 1), (3600.0, len(BUCKETS))],
    ids=["none", "just in", "just beyond", "the last", "longer than all"],
)
def test_durations(seconds: float, bucket: int) -> None:
    """Count a bound in its own bucket, as Prometheus does (`le`)."""
    durations = Durations()
    durations.add(seconds)
    assert durations.counts == [number == bucket for number in range(len(BUCKETS) + 1)]
    assert durations.total == seconds


def test_calls() -> None:
    """Count calls by method and status."""
    counters = Counters()
    for method, code, seconds in (("Allocate", "OK", 1.0), ("Allocate", "OK", 2.0), ("Allocate", "NOT_FOUND", 4.0)):
        counters.called(method, code, seconds)
    totals = {key: (sum(durations.counts), durations.total) for key, durations in counters.calls.items()}
    assert totals == {("Allocate", "OK"): (2, 3.0), ("Allocate", "NOT_FOUND"): (1, 4.0)}


def test_reloads() -> None:
    """Count reads of the settings by whether they could be used."""
    counters = Counters()
    for usable in (True, False, True):
        counters.reloaded(usable)
    assert counters.reloads == {True: 2, False: 1}


def test_copy() -> None:
    """Keep a copy as it is, whatever is counted after it was made."""
    counters = Counters()

    def count() -> None:
        counters.registrations["example.com/gpu", True] += 1
        counters.called("Allocate", "OK", 0.001)
        counters.reloaded(True)
        counters.nvml_errors["nvmlInit", "9"] += 1

    count()
    copy = counters.copy()
    before = repr(copy)
    assert before == repr(counters)
    count()
    assert repr(copy) == before != repr(counters)
