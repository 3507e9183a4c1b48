"""Free share ids → the ones a container should get. Pure: knows neither trio, nor purerpc, nor NVML."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from sgpu.device import Share


def preferred(available: Sequence[str], must_include: Sequence[str], size: int) -> list[str]:
    """`size` of the `available` ids, those in `must_include` first, the rest from the GPU with most left each time.

    Fewer when there are not as many. Ids that name no share are left out. Ties go by UUID, then by share number.
    """
    chosen = list(dict.fromkeys(must_include))
    free = _free_by_gpu(available, taken=set(chosen))
    heap = [(-len(ids), uuid) for uuid, ids in free.items()]
    heapq.heapify(heap)
    while heap and len(chosen) < size:
        _, uuid = heapq.heappop(heap)
        chosen.append(free[uuid].pop())
        if free[uuid]:
            heapq.heappush(heap, (-len(free[uuid]), uuid))
    return chosen


def _free_by_gpu(available: Sequence[str], taken: set[str]) -> dict[str, list[str]]:
    """The ids that can be chosen, by GPU, the lowest share number last (where `pop` takes it)."""
    free = defaultdict(list)
    for share_id in dict.fromkeys(available):
        share = Share.parse(share_id)
        if share and share_id not in taken:
            free[share.uuid].append((share.number, share_id))
    return {uuid: [share_id for _, share_id in sorted(ids, reverse=True)] for uuid, ids in free.items()}
