"""Delays between attempts. Imports nothing of sgpu."""

from __future__ import annotations

import random
from collections.abc import Iterator


def growing_delays(first: float, last: float) -> Iterator[float]:
    """Yield seconds without end: `first`, then twice as many each time, at most `last` (after the first)."""
    delay = first
    while True:
        yield delay
        delay = min(2 * delay, last)


def jittered(delay: float) -> float:
    """Return a part of the delay, at least half, by chance: so that many who wait for one thing don't come at once."""
    return random.uniform(delay / 2, delay)
