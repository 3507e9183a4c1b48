"""What a call of the kubelet costs in what can be counted, which no busy machine changes.

The bounds are a little above what was counted on all interpreters: who makes a call cheaper lowers them.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping

import pytest
import trio
from replay import Peer, connected, count, devices, held, offer, requests

GPUS, SHARES = 4, 100
#: Calls after which everything that is kept for a while has been kept and let go of: h2 remembers 1024 streams.
WARM_UP = 1100
CALLS = 1000
#: Blocks of memory that the interpreter may have more after so many calls: its own, and none for each call.
MOST_BLOCKS = 200
COUNTED = 20


async def calls(peer: Peer, method: str, number: int) -> None:
    request = requests(devices(GPUS, SHARES))[method]
    for _ in range(number):
        await peer.send(peer.encode(method, request))


@pytest.mark.parametrize(
    ("method", "bounds"),
    [
        pytest.param("Allocate", {"calls of functions": 900, "bytes": 510}, id="Allocate"),
        pytest.param("GetPreferredAllocation", {"calls of functions": 1000, "bytes": 230}, id="GetPreferredAllocation"),
    ],
)
def test_what_a_call_takes(method: str, bounds: Mapping[str, float]) -> None:
    """One turn of the event loop and no task; the kernel is asked four times: to read, to write, for more, to wait."""

    async def check() -> None:
        gpus = devices(GPUS, SHARES)
        async with connected(offer(gpus)) as peer:
            await calls(peer, method, 3)
            counts = dict(await count(peer, method, requests(gpus)[method], COUNTED))
        assert counts.pop("tasks", 0) == 0
        assert {what: counts.pop(what) for what in ("turns", "system calls", "frames")} == {
            "turns": 1,
            "system calls": 4,
            "frames": 3,
        }
        assert {what: number for what, number in counts.items() if number > bounds[what]} == {}

    trio.run(check)


@pytest.mark.parametrize("method", ["Allocate", "GetPreferredAllocation"])
def test_nothing_is_left_of_a_call(method: str) -> None:
    """No memory, no task, no descriptor; and no cycle, which only the garbage collector would find."""

    async def check() -> None:
        async with connected(offer(devices(GPUS, SHARES))) as peer:
            await calls(peer, method, WARM_UP)
            before = held()
            gc.disable()
            try:
                await calls(peer, method, CALLS)
                cycles = gc.collect()
            finally:
                gc.enable()
            more = held().more_than(before)
        assert more.pop("blocks") < MOST_BLOCKS
        assert more == {"tasks": 0, "descriptors": 0}
        assert cycles < CALLS

    trio.run(check)
