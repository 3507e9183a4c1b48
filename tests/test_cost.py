"""Counts of what a call of the kubelet costs, which no busy machine changes."""

from __future__ import annotations

import gc

import pytest
from replay import Peer, connected, count, held, offer, requests
from virtual_clock import real

from sgpu.deviceplugin.servicer import PluginContext

#: Calls after which everything that is kept for a while has been kept and let go of.
WARM_UP = 200
CALLS = 1000
#: Blocks of memory that the interpreter may keep after so many calls (226 were seen); a leak has one for each.
MOST_BLOCKS = CALLS // 2

pytestmark = pytest.mark.parametrize("method", ["Allocate", "GetPreferredAllocation"])


@pytest.fixture
def context() -> PluginContext:
    """A node with as many shares as many have."""
    return offer(gpus=4, shares=100)


async def calls(peer: Peer, method: str, context: PluginContext, number: int) -> None:
    request = requests(context)[method]
    for _ in range(number):
        await peer.send(peer.encode(method, request))


@real
async def test_what_a_call_takes(method: str, context: PluginContext) -> None:
    """Take one turn of the event loop, no task, and three system calls: to read, to write, to wait for more."""
    async with connected(context) as peer:
        await calls(peer, method, context, 3)
        counts = await count(peer, method, requests(context)[method], 20)
    assert "tasks" not in counts
    assert {what: counts[what] for what in ("turns", "system calls", "frames")} == {
        "turns": 1,
        "system calls": 3,
        "frames": 3,
    }


@real
async def test_nothing_is_left_of_a_call(method: str, context: PluginContext) -> None:
    """Leave no memory, task, descriptor, or cycle that only the garbage collector would find."""
    async with connected(context) as peer:
        await calls(peer, method, context, WARM_UP)
        before = held()
        gc.disable()
        try:
            await calls(peer, method, context, CALLS)
            cycles = gc.collect()
        finally:
            gc.enable()
        more = held().more_than(before)
    assert more.pop("blocks") < MOST_BLOCKS
    assert more == {"tasks": 0, "descriptors": 0}
    assert cycles < CALLS
