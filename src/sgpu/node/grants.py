"""The shares handed out moments ago: no figure shows the memory that their containers use yet.

Pure: knows neither trio, nor NVML, nor Kubernetes. Times are passed in, in monotonic seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Final

import attrs

from sgpu.node.shares import Share

#: Seconds after which the memory that a share's container uses is taken to show in the figures. A container starts,
#: imports its framework and loads a model of some GiB from a disk or the network in less; an image pull that takes
#: longer gets no memory reserved.
SETTLING_TIME: Final = 60.0


@attrs.frozen
class _Grant:
    at: float
    bytes: int
    listed: bool = False


class Grants:
    """Remembers each share for SETTLING_TIME after it was handed out, or until its container is seen to be gone."""

    def __init__(self) -> None:
        self._grants: dict[Share, _Grant] = {}

    def add(self, share: Share, part: int, now: float) -> None:
        """Record that a container got this share and may use `part` bytes of memory (0 where that is unknown)."""
        self._grants[share] = _Grant(now, part)

    def forget(self, shares: Iterable[Share]) -> None:
        """Forget shares that are known to be given back."""
        for share in shares:
            self._grants.pop(share, None)

    def reconcile(self, held: Container[Share]) -> None:
        """Forget the shares that the kubelet listed as held before and no longer lists.

        It lists while pods are admitted, so a share that was never listed may still come.
        """
        self._grants = {
            share: attrs.evolve(grant, listed=share in held)
            for share, grant in self._grants.items()
            if share in held or not grant.listed
        }

    def shares(self, now: float) -> frozenset[Share]:
        """Return the shares that are remembered."""
        self._expire(now)
        return frozenset(self._grants)

    def expected_bytes(self, now: float) -> Mapping[str, int]:
        """Return, by UUID, the memory that containers may still take: all of each share's part, used or not."""
        self._expire(now)
        expected: Counter[str] = Counter()
        for share, grant in self._grants.items():
            expected[share.uuid] += grant.bytes
        return expected

    def _expire(self, now: float) -> None:
        self._grants = {share: grant for share, grant in self._grants.items() if now - grant.at < SETTLING_TIME}
