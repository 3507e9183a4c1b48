"""Memory figures → which units are too full for more containers. Pure: knows neither trio, nor NVML, nor Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final

from sgpu.node.figures import Figures

#: Part of the memory that must come free, below the watermark, before shares are offered again: a model that grows and
#: shrinks a little must not make them come and go.
RELEASE: Final = 0.05


def under_pressure(figures: Mapping[str, Figures], before: Set[str], watermark: float) -> frozenset[str]:
    """Return the UUIDs that are above the watermark, or were before and have not come down far enough.

    `watermark` is a part of the memory (0.95); 0 switches it off, and 1 is never exceeded. What the driver keeps for
    itself counts as used. A unit without figures is not under pressure: where they fail for a moment, pass the last.
    """
    if not watermark:
        return frozenset()
    # Half of a watermark so low that 5 points less would be none. Rounded, because 0.95 - 0.05 is less than 0.9.
    release = round(max(watermark - RELEASE, watermark / 2), 9)
    return frozenset(
        uuid
        for uuid, known in figures.items()
        if known.memory_total
        and known.memory_used is not None
        and known.memory_used / known.memory_total > (release if uuid in before else watermark)
    )
