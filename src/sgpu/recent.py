"""The shares handed out moments ago, whose use of memory no sample shows yet.

Pure: knows neither trio, nor NVML, nor Kubernetes. Times are passed in, in monotonic seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from typing import Final

import attrs

from sgpu.device import Device

#: Seconds after which a share's use of memory is taken to show in the samples. A container starts, imports its
#: framework and loads a model of some GiB from a disk or the network in less; an image pull that takes longer gets
#: no place kept.
SETTLING_TIME: Final = 60.0


@attrs.frozen
class _Given:
    uuid: str
    at: float
    bytes: int
    listed: bool = False


class Recent:
    """Remembers each share for SETTLING_TIME from when it was given, or until its container is seen to be gone."""

    def __init__(self) -> None:
        self._given: dict[str, _Given] = {}

    def give(self, device: Device, share_id: str, now: float) -> None:
        """A container gets this share of the GPU, and may use its part of the memory (none where that is unknown)."""
        self._given[share_id] = _Given(device.uuid, now, (device.memory_bytes or 0) // device.shares)

    def seen(self, allocated: Set[str]) -> None:
        """The kubelet's list of allocated shares: forget those that were on one before and no longer are.

        It is made while pods are admitted, so that one that is not on it yet says nothing.
        """
        self._given = {
            share_id: attrs.evolve(given, listed=share_id in allocated)
            for share_id, given in self._given.items()
            if share_id in allocated or not given.listed
        }

    def share_ids(self, now: float) -> frozenset[str]:
        """The ids of the shares that are remembered."""
        self._forget(now)
        return frozenset(self._given)

    def expected_bytes(self, now: float) -> Mapping[str, int]:
        """By UUID, the memory that containers may still take: the whole part of each, whatever is taken already."""
        self._forget(now)
        expected: Counter[str] = Counter()
        for given in self._given.values():
            expected[given.uuid] += given.bytes
        return expected

    def _forget(self, now: float) -> None:
        self._given = {share_id: given for share_id, given in self._given.items() if now - given.at < SETTLING_TIME}
