"""Memory samples → which GPUs are too full to take on more, and which of their shares to withhold.

Pure: knows neither trio, nor NVML, nor Kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Final

import attrs

from sgpu.device import Device

#: Part of the memory that must come free, below the watermark, before shares are offered again. So that a model that
#: grows and shrinks a little does not make them come and go.
RELEASE: Final = 0.05


@attrs.frozen
class MemorySample:
    """A GPU's memory at one moment, in bytes. What the driver keeps for itself counts as used."""

    used: int
    total: int


def under_pressure(samples: Mapping[str, MemorySample | None], before: Set[str], watermark: float) -> frozenset[str]:
    """The GPUs that are above the watermark, or were before and have not come down far enough.

    `watermark` is a part of the memory (0.95); 0 switches it off, and 1 is never exceeded. A GPU with no sample, or
    None for one, is not under pressure: where a sample failed for a moment, pass the one before.
    """
    if not watermark:
        return frozenset()
    # Half of a watermark so low that 5 points less would be none. Rounded, because 0.95 - 0.05 is less than 0.9.
    release = round(max(watermark - RELEASE, watermark / 2), 9)
    return frozenset(
        uuid
        for uuid, sample in samples.items()
        if sample and sample.total and sample.used / sample.total > (release if uuid in before else watermark)
    )


def withheld(devices: Iterable[Device], allocated: Set[str], pressed: Set[str]) -> Mapping[str, frozenset[int]]:
    """By UUID, the numbers of the free shares of GPUs under pressure: those to be listed as unhealthy.

    `allocated` are the ids of *all* shares that a container has, or was given moments ago. One that is missing there
    would be withheld from a running container, so don't ask unless they are known.
    """
    return {
        device.uuid: frozenset(
            number
            for number, share_id in zip(device.numbers(), device.share_ids(), strict=True)
            if share_id not in allocated
        )
        for device in devices
        if device.uuid in pressed
    }
