"""Delays between attempts. Imports nothing of sgpu."""

from __future__ import annotations

from collections.abc import Iterator


def growing_delays(first: float, last: float) -> Iterator[float]:
    """Yield seconds without end: `first`, then twice as many each time, at most `last` (after the first)."""
    delay = first
    while True:
        yield delay
        delay = min(2 * delay, last)
