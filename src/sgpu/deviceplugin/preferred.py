"""The kubelet's free share ids and the loads of their units → the shares that a container should get.

Pure: knows neither trio, nor purerpc, nor NVML.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import accumulate, islice

from sgpu.node.rank import MultiShare, Placement, UnitLoad, rank
from sgpu.node.shares import suffixes, unit_of


def preferred(
    available: Iterable[str],
    must_include: Iterable[str],
    size: int,
    loads: Mapping[str, UnitLoad],
    placement: Placement,
    multi_share: MultiShare,
) -> list[str]:
    """Return `size` ids: all of `must_include`, then `available` ones, grouped by unit, the lowest numbers of each.

    Fewer when there are not as many. `loads` has every unit by UUID; ids of other units, or of shares that a unit does
    not have, are never chosen. The caller has chosen which units are available (those of a NUMA node, say).
    """
    chosen = list(dict.fromkeys(must_include))
    rest = size - len(chosen)
    if rest <= 0:
        return chosen
    choice = _lowest_free(available, frozenset(chosen), rest, loads)
    allocated = {
        uuid: loads[uuid].others
        + (loads[uuid].shares - len(some) if (known := loads[uuid].allocated) is None else known)
        for uuid, some in choice.items()
    }
    ranked = rank({uuid: loads[uuid] for uuid in sorted(choice)}, allocated, placement)
    rooms = {uuid: len(choice[uuid]) for uuid in ranked}
    used = Counter(map(unit_of, chosen))
    few = multi_share is MultiShare.SAME
    if any(loads[uuid].alone for uuid in rooms):
        rooms = _usable_together(rooms, used, rest, loads)
        few = few or any(loads[uuid].alone for uuid in rooms)
    divide = _on_few if few else _on_many
    for uuid, count in divide(rooms, used, rest).items():
        chosen += choice[uuid][:count]
    return chosen


def _lowest_free(
    available: Iterable[str], chosen: Set[str], rest: int, loads: Mapping[str, UnitLoad]
) -> dict[str, list[str]]:
    """Return the free ids of each unit that has some: the `rest` lowest, or all where it is unknown how many there are.

    A unit's own ids are looked up among the free ones, rather than those parsed: they come unordered, thousands of
    them, and some may be no share's.
    """

    def find(free: Set[str], endings: Sequence[str]) -> dict[str, list[str]]:
        found = {}
        for uuid, load in loads.items():
            own = filter(free.__contains__, map(uuid.__add__, endings[: load.shares]))
            if some := list(islice(own, None if load.allocated is None else rest)):
                found[uuid] = some
        return found

    taken = {uuid: load.allocated for uuid, load in loads.items() if load.allocated is not None}
    if len(taken) == len(loads):
        # As many of a unit's lowest as can be in the way, and as are wanted, will do: to make a set of all takes twice
        # as long. Unless it has fewer than it should, because the kubelet keeps some back.
        enough = {uuid: min(count + len(chosen) + rest, loads[uuid].shares) for uuid, count in taken.items()}
        endings = suffixes(max(enough.values(), default=0))
        lowest = {uuid + ending for uuid, count in enough.items() for ending in endings[:count]}
        found = find(lowest.intersection(available) - chosen, endings)
        if all(len(found.get(uuid, ())) == rest or count == loads[uuid].shares for uuid, count in enough.items()):
            return found
    return find(set(available) - chosen, suffixes(max((load.shares for load in loads.values()), default=0)))


def _usable_together(
    rooms: dict[str, int], used: Mapping[str, int], rest: int, loads: Mapping[str, UnitLoad]
) -> dict[str, int]:
    """Return the units that a container can use together: those of the kind of the best one that has room for it.

    All of them where nothing has: a container with fewer shares than it can use starts, one with fewer than it asked
    for does not.
    """
    ours = {uuid: room for uuid, room in rooms.items() if uuid in used}
    whole = {uuid: room for uuid, room in rooms.items() if not loads[uuid].alone}
    candidates = [whole if uuid in whole else {uuid: rooms[uuid]} for uuid in (*ours, *rooms)]
    return next((each for each in candidates if sum(each.values()) >= rest), rooms)


# Both ways to divide a request take the room on each GPU (best GPU first), how many of its shares the container has
# already, and how many more it needs. They return how many come from which GPU.


def _on_many(rooms: Mapping[str, int], used: Mapping[str, int], rest: int) -> Mapping[str, int]:
    """Take each from the unit the container has least of: units are reused only when all are used, and evenly."""
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
    """Return how many of the rooms it takes to hold `amount`; one more than there are if they can't."""
    return sum(total < amount for total in accumulate(sorted(rooms, reverse=True), initial=0))
