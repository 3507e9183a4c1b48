"""How the GPUs are used, as last seen: who has which share, and how full and busy each GPU is.

Changing state, but nothing waits for it: it is looked at when a choice is to be made. Times are monotonic seconds and
passed in. Knows neither trio, nor gRPC, nor NVML.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from sgpu.device import SEPARATOR, Device
from sgpu.placement import GpuLoad
from sgpu.recent import Recent
from sgpu.snapshot import ContainerUse

#: Sample intervals after which a sample is too old to choose by.
STALE_AFTER: Final = 3


@attrs.frozen
class Holder:
    """A container that has a share."""

    namespace: str
    pod: str
    container: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}"


@attrs.frozen
class Sample:
    """A GPU at one moment: bytes of memory, and percent of time that it was busy. None: the driver does not tell."""

    memory_total: int | None
    memory_free: int | None
    utilisation: int | None


class Usage:
    """What is known. `holders` is None as long as the kubelet does not tell."""

    def __init__(self, interval: float) -> None:
        self.holders: Mapping[str, Holder] | None = None
        self.samples: Mapping[str, Sample] = {}
        self.recent = Recent()
        self._counts: Counter[str] = Counter()  # of held shares, by UUID; as long as `holders` is
        self._uses: Mapping[str, tuple[ContainerUse, ...]] = {}  # by UUID; as long as `holders` is
        #: When the last samples were taken.
        self.sampled_at = float("-inf")
        #: Whether processes that use a GPU can be told apart by container.
        self.processes_known = False
        self._interval = interval

    def sampled(self, samples: Mapping[str, Sample], now: float) -> None:
        """New samples, by UUID."""
        self.samples, self.sampled_at = samples, now

    def fresh(self, now: float) -> Mapping[str, Sample]:
        """The samples, unless they are too old to go by."""
        return {} if now - self.sampled_at > STALE_AFTER * self._interval else self.samples

    def held(self, holders: Mapping[str, Holder] | None) -> None:
        """The kubelet told who has which share, or no longer does (None)."""
        self.holders = holders
        self._counts = Counter(map(_uuid, holders or ()))
        self._uses = _uses(holders or {})
        if holders is not None:
            self.recent.seen(holders.keys())

    def allocated(self, now: float) -> frozenset[str] | None:
        """The ids of all shares that a container has or was given moments ago; None if that is not known."""
        return None if self.holders is None else frozenset(self.holders) | self.recent.share_ids(now)

    def loads(self, devices: Iterable[Device], now: float) -> Mapping[str, GpuLoad]:
        """What a choice among these GPUs goes by."""
        holders = self.holders
        # Only the few that were just given are counted here: those held can be thousands, and a kubelet waits.
        given = Counter(_uuid(share_id) for share_id in self.recent.share_ids(now) if share_id not in (holders or ()))
        expected = self.recent.expected_bytes(now)
        samples = self.fresh(now)
        loads = {}
        for device in devices:
            sample = samples.get(device.uuid)
            free = sample.memory_free if sample else None
            loads[device.uuid] = GpuLoad(
                allocated=None if holders is None else self._counts[device.uuid] + given[device.uuid],
                shares=device.shares,
                free_memory=None if free is None else max(free - expected.get(device.uuid, 0), 0),
                utilisation=sample.utilisation if sample else None,
            )
        return loads

    def uses(self, uuid: str) -> tuple[ContainerUse, ...]:
        """What each container has and takes of this GPU, sorted by name."""
        return self._uses.get(uuid, ())

    def pods(self, uuid: str) -> list[str]:
        """The pods that have a share of this GPU, as namespace/name, sorted."""
        holders = (self.holders or {}).items()
        return sorted({str(holder) for share_id, holder in holders if _uuid(share_id) == uuid})


def _uses(holders: Mapping[str, Holder]) -> Mapping[str, tuple[ContainerUse, ...]]:
    shares = Counter((_uuid(share_id), holder) for share_id, holder in holders.items())
    uses: dict[str, list[ContainerUse]] = {}
    for (uuid, holder), count in shares.items():
        uses.setdefault(uuid, []).append(ContainerUse(holder.namespace, holder.pod, holder.container, count))
    return {
        uuid: tuple(sorted(each, key=lambda use: (use.namespace, use.pod, use.container)))
        for uuid, each in uses.items()
    }


def _uuid(share_id: str) -> str:
    return share_id.rpartition(SEPARATOR)[0]
