"""Free share ids, what is known of their GPUs, and a policy → the shares a container should get.

Pure: knows neither trio, nor purerpc, nor NVML.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate, islice

import attrs

from sgpu.device import SEPARATOR


class Placement(enum.Enum):
    """Which GPU is the better one."""

    SPREAD = "spread"
    PACK = "pack"


class MultiShare(enum.Enum):
    """What several shares of one container should have in common. STRICT_DISTINCT differs only in Allocate."""

    DISTINCT = "distinct"
    SAME = "same"
    STRICT_DISTINCT = "strict-distinct"


@attrs.frozen
class GpuLoad:
    """What is known of one GPU when shares of it are offered.

    `allocated`: how many of its `shares` containers have; None: not known, then those that are not free.
    `free_memory`: bytes, as last sampled, less what shares handed out moments ago will still take.
    `utilisation`: percent. Both None where the driver does not tell or the sample is stale.
    """

    allocated: int | None
    shares: int
    free_memory: int | None = None
    utilisation: int | None = None


def preferred(
    available: Iterable[str],
    must_include: Iterable[str],
    size: int,
    loads: Mapping[str, GpuLoad],
    placement: Placement,
    multi_share: MultiShare,
) -> list[str]:
    """`size` ids: all that `must_include` has, then `available` ones, grouped by GPU, the lowest numbers of each.

    Fewer when there are not as many. `loads` has every GPU by UUID; ids of other GPUs, or of shares that a GPU does
    not have, are never chosen. Which GPUs are offered is the caller's choice (a NUMA node's, say) and is kept to.
    """
    chosen = list(dict.fromkeys(must_include))
    rest = size - len(chosen)
    if rest <= 0:
        return chosen
    free = set(available)
    free.difference_update(chosen)
    suffixes = [f"{SEPARATOR}{number}" for number in range(max((load.shares for load in loads.values()), default=0))]
    choice, allocated = {}, {}
    for uuid, load in loads.items():
        # A GPU's own ids are looked up among the free ones, not these taken apart: they come unordered, thousands of
        # them, and some may be no share's. And no more than could be used, as mostly the first few are free.
        own = map(uuid.__add__, suffixes[: load.shares])
        limit = rest if load.allocated is not None else None
        if some := list(islice(filter(free.__contains__, own), limit)):
            choice[uuid] = some
            allocated[uuid] = load.allocated if load.allocated is not None else load.shares - len(some)
    ranked = _ranked({uuid: loads[uuid] for uuid in sorted(choice)}, allocated, placement)
    rooms = {uuid: len(choice[uuid]) for uuid in ranked}
    used = Counter(map(_uuid, chosen))
    divide = _on_few if multi_share is MultiShare.SAME else _on_many
    for uuid, count in divide(rooms, used, rest).items():
        chosen += choice[uuid][:count]
    return chosen


def _uuid(share_id: str) -> str:
    return share_id.rpartition(SEPARATOR)[0]


def _ranked(candidates: Mapping[str, GpuLoad], allocated: Mapping[str, int], placement: Placement) -> list[str]:
    """The best first, ties in the order given.

    A figure that is unknown for one is compared for none: else the order would depend on who is compared first.
    """
    if placement is Placement.PACK:
        return sorted(candidates, key=lambda uuid: -allocated[uuid] / candidates[uuid].shares)
    memory = _if_known({uuid: load.free_memory for uuid, load in candidates.items()})
    utilisation = _if_known({uuid: load.utilisation for uuid, load in candidates.items()})
    return sorted(candidates, key=lambda uuid: (allocated[uuid], -memory[uuid], utilisation[uuid]))


def _if_known(figures: Mapping[str, int | None]) -> Mapping[str, int]:
    """The figures, or all the same where one is missing."""
    known = {uuid: figure for uuid, figure in figures.items() if figure is not None}
    return known if len(known) == len(figures) else dict.fromkeys(figures, 0)


# Both ways to divide a request take the room on each GPU (best GPU first), how many of its shares the container has
# already, and how many more it needs. They return how many come from which GPU.


def _on_many(rooms: Mapping[str, int], used: Mapping[str, int], rest: int) -> Mapping[str, int]:
    """Each from the GPU the container has least of, so that GPUs are reused only when all are used, and evenly."""
    counts: Counter[str] = Counter()
    heap = [(used.get(uuid, 0), rank, uuid) for rank, uuid in enumerate(rooms)]
    heapq.heapify(heap)
    while heap and rest:
        level, rank, uuid = heapq.heappop(heap)
        counts[uuid] += 1
        rest -= 1
        if counts[uuid] < rooms[uuid]:
            heapq.heappush(heap, (level + 1, rank, uuid))
    return counts


def _on_few(rooms: Mapping[str, int], used: Mapping[str, int], rest: int) -> Mapping[str, int]:
    """From the GPUs the container has already, then from as few others as can do."""
    counts: dict[str, int] = {}
    for pool in ([uuid for uuid in rooms if uuid in used], [uuid for uuid in rooms if uuid not in used]):
        left = {uuid: rooms[uuid] for uuid in pool}
        amount = min(rest - sum(counts.values()), sum(left.values()))
        while amount:
            # The best GPU with which it takes no more of them than it must: a lone one has room for the whole rest.
            fewest = _fewest(left.values(), amount)
            uuid = next(
                uuid
                for uuid in left
                if _fewest([room for other, room in left.items() if other != uuid], amount - left[uuid]) < fewest
            )
            counts[uuid] = min(left.pop(uuid), amount)
            amount -= counts[uuid]
    return counts


def _fewest(rooms: Collection[int], amount: int) -> int:
    """How many of the rooms it takes to hold `amount`; one more than there are if they can't."""
    return sum(total < amount for total in accumulate(sorted(rooms, reverse=True), initial=0))
