"""Measures the processor time of a call in the server alone, repeatable to a few percent on a busy machine.

Calls are replayed in one process (`replay`), whose thread's own time is taken: of many rounds the best one, so that
what else the machine did is left out. By itself it prints JSON, which `measure` puts into its table.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Final

import attrs
import trio
from plugins import Size
from replay import Peer, connected, count, offer, requests
from table import Figure

#: Calls before anything is measured, so that everything is remembered that will be.
WARM_UP: Final = 200
ROUNDS: Final = 25
CALLS: Final = 200
#: Calls of which counts are the average.
COUNTED: Final = 20
SIZES: Final = (Size(4, 100), Size(16, 100), Size(16, 1000))


async def best(peer: Peer, calls: list[bytes]) -> float:
    """Microseconds of a call in the better quarter of these."""
    times = []
    for call in calls:
        started = time.thread_time_ns()
        await peer.send(call)
        times.append(time.thread_time_ns() - started)
        await peer.rest()
    return sorted(times)[len(times) // 4] / 1000


async def measure(method: str, size: Size, rounds: int) -> tuple[float, Mapping[str, float]]:
    """Microseconds of one call, and its counts."""
    context = offer(size.gpus, size.shares)
    request = requests(context)[method]
    part = size.devices if method != "Allocate" else 400  # whose costs it goes by
    async with connected(context) as peer:
        for _ in range(WARM_UP * 400 // part if rounds > 1 else 1):
            await peer.send(peer.encode(method, request))
        number = max(8, CALLS * 400 // part)
        took = min([await best(peer, [peer.encode(method, request) for _ in range(number)]) for _ in range(rounds)])
        return took, await count(peer, method, request, COUNTED)


def figures(rounds: int = ROUNDS) -> Iterator[Figure]:
    for method, sizes in {"Allocate": SIZES[:1], "GetPreferredAllocation": SIZES}.items():
        for size in sizes:
            took, counts = trio.run(measure, method, size, rounds)
            yield Figure(f"`{method}`, {size}, in process, processor time", "µs", {"sgpu": took})
            if size is SIZES[0]:
                for what, number in counts.items():
                    yield Figure(f"`{method}`: {what}", "a call", {"sgpu": number})


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    print(json.dumps([attrs.asdict(figure) for figure in figures(rounds)]))


if __name__ == "__main__":
    main()
