"""The publisher beside a fake API server, on a virtual clock."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from fake_api_server import Answer, FakeApiServer, Object, connected
from virtual_clock import virtual

from sgpu.dra.publisher import Publisher, SlicesRefusedError, check_server
from sgpu.dra.slices import PATH, SliceOptions, slice_name
from sgpu.driver.simulated import simulated_gpus, with_faults
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState

NODE = "node-a"
SLICE = f"{PATH}/{slice_name(0, NODE)}"
WRITES = ("POST", "PUT", "DELETE")


class World:
    """A node, its API server, and the publisher between them."""

    def __init__(self, server: FakeApiServer, publisher: Publisher, node: NodeState, used: dict[str, float]) -> None:
        self.server = server
        self.publisher = publisher
        self.node = node
        self.used = used

    @property
    def devices(self) -> list[Object]:
        """All devices in the node's slices, in their order."""
        slices = sorted(self.server.below(PATH).items())
        return [each for _, thing in slices for each in thing["spec"].get("devices") or ()]

    @property
    def writes(self) -> int:
        """How often the slices were changed; without what only asks."""
        return self.publisher.published.writes

    def fail(self, *numbers: int) -> None:
        """These GPUs are faulty from now on, and no others."""
        self.node.set_gpus(with_faults(self.node.gpus, dict.fromkeys(numbers, "XID 79"), 1.0))


@asynccontextmanager
async def publishing(server: FakeApiServer | None = None, gpus: int = 2, drop: str = "") -> AsyncIterator[World]:
    server = server or FakeApiServer()
    if drop:
        server.drop = without(drop)
    server.put(f"/api/v1/nodes/{NODE}", {"metadata": {"name": NODE}})
    node, used = NodeState(Policy("deepomatic.com/shared-gpu", 100), 5.0), dict[str, float]()
    node.set_gpus(simulated_gpus(gpus))
    async with connected(server) as api, trio.open_nursery() as nursery:
        publisher = Publisher(api, node, lambda: SliceOptions(NODE), lambda: used)
        nursery.start_soon(publisher.run)
        yield World(server, publisher, node, used)
        nursery.cancel_scope.cancel()


def without(key: str) -> Callable[[Object], None]:
    """Drop a field of devices, as a server does whose feature gate is off."""

    def drop(thing: Object) -> None:
        for each in thing.get("spec", {}).get("devices") or ():
            each.pop(key, None)

    return drop


@virtual
async def test_published_and_then_at_rest() -> None:
    """The units are there, the Node owns them, and hours pass without a request but for the watch."""
    async with publishing() as world:
        assert world.publisher.published.problem
        await trio.sleep(1)
        assert not world.publisher.published.problem
        (thing,) = world.server.below(PATH).values()
        assert [each["attributes"]["uuid"]["string"] for each in world.devices] == [gpu.uuid for gpu in world.node.gpus]
        (owner,) = thing["metadata"]["ownerReferences"]
        assert owner["uid"] == world.server.objects[f"/api/v1/nodes/{NODE}"]["metadata"]["uid"]
        world.server.requests.clear()
        await trio.sleep(3600)
        assert set(world.server.requests) == {f"GET {PATH}?watch"}
        assert 6 <= len(world.server.requests) <= 13


@virtual
async def test_a_restart_changes_nothing() -> None:
    """Slices that are as they should be are left alone."""
    async with publishing() as world:
        await trio.sleep(1)
        version = world.server.objects[SLICE]["metadata"]["resourceVersion"]
    async with publishing(world.server) as again:
        await trio.sleep(60)
        assert again.writes == 0
        assert again.server.objects[SLICE]["metadata"]["resourceVersion"] == version
        assert again.publisher.published.devices == 2


@virtual
async def test_deleted_slices_are_made_again() -> None:
    """The kubelet deletes them when it starts; soon after an update too, but then not at once."""
    async with publishing() as world:
        for wait in (30, 0.1):
            await trio.sleep(wait)
            world.server.remove(SLICE)
            await trio.sleep(1 if wait == 30 else 11)
            assert SLICE in world.server.objects
        world.server.put(f"{PATH}/other", world.server.objects[SLICE])
        await trio.sleep(11)
        assert list(world.server.below(PATH)) == [SLICE]  # one that is too many would spoil the pool


@virtual
async def test_faults_are_published_at_once_and_the_rest_in_its_time() -> None:
    """A fault can't wait; healing, and another order, can."""
    async with publishing() as world:
        await trio.sleep(1)
        world.fail(1)
        await trio.sleep(1)
        assert [bool(each.get("taints")) for each in world.devices] == [False, True]
        world.fail()
        await trio.sleep(5)
        assert world.writes == 2
        await trio.sleep(6)
        assert [each.get("taints") for each in world.devices] == [None, None]
        first, second = (gpu.uuid for gpu in world.node.gpus)
        for turn in range(100):
            world.used.update({first: turn // 7 % 2, second: 0.5})
            await trio.sleep(1)
        assert 3 <= world.writes - 3 <= 10


@virtual
async def test_what_makes_a_gpu_shared_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is published, one line says why, and it is tried again: the server may be upgraded."""
    async with publishing(drop="allowMultipleAllocations") as world:
        await trio.sleep(3600)
        assert not world.server.below(PATH)
        assert len(caplog.records) == 1
        assert "DRAConsumableCapacity" in world.publisher.published.problem
        assert sum(request.startswith("POST") for request in world.server.requests) < 26
        world.server.drop = lambda thing: None
        await trio.sleep(301)
        assert len(world.devices) == 2
        assert not world.publisher.published.problem


@virtual
async def test_a_gate_that_was_turned_off_meanwhile() -> None:
    """A slice whose GPUs became exclusive is deleted at once."""
    async with publishing() as world:
        await trio.sleep(1)
        world.server.drop = without("allowMultipleAllocations")
        world.fail(0)
        await trio.sleep(600)
        assert not world.server.below(PATH)
        assert "go to one pod alone" in world.publisher.published.problem


@virtual
async def test_without_taints_faulty_units_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Where the server drops taints, and says so once."""
    async with publishing(drop="taints") as world:
        await trio.sleep(1)
        world.fail(0)
        await trio.sleep(60)
        assert [each["attributes"]["uuid"]["string"] for each in world.devices] == [world.node.gpus[1].uuid]
        assert sum("left out" in record.message for record in caplog.records) == 1


@virtual
async def test_somebody_else_writes_too() -> None:
    """A conflict is settled with what is there then, and is no news."""
    async with publishing() as world:
        await trio.sleep(1)
        world.server.instead["PUT"] = [Answer(409, {"message": "modified"}), Answer(409, {"message": "modified"})]
        world.fail(0)
        await trio.sleep(5)
        assert not world.publisher.published.problem
        del world.server.instead["PUT"]
        await trio.sleep(60)
        assert world.devices[0]["taints"]


@virtual
async def test_a_server_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """For two minutes: one line a reason, few requests, and all is right soon after."""
    async with publishing() as world:
        await trio.sleep(1)
        world.server.instead["GET"] = world.server.instead["PUT"] = [Answer(503, {"message": "starting"})]
        world.server.hang_up()
        world.fail(0)
        world.server.requests.clear()
        await trio.sleep(120)
        assert "503 starting" in world.publisher.published.problem
        assert len(world.server.requests) < 100
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 3
        world.server.instead.clear()
        await trio.sleep(61)
        assert world.devices[0]["taints"]
        assert not world.publisher.published.problem


@virtual
async def test_two_slices_are_one_generation() -> None:
    """More devices than a slice can have."""
    async with publishing(gpus=64) as world:
        await trio.sleep(1)
        world.node.set_gpus(simulated_gpus(65))
        await trio.sleep(20)
        pools = [thing["spec"]["pool"] for thing in world.server.below(PATH).values()]
        assert [(pool["generation"], pool["resourceSliceCount"]) for pool in pools] == [(2, 2), (2, 2)]
        published = world.publisher.published
        assert published == attrs.evolve(published, slices=2, devices=65, generation=2, problem="")


@virtual
async def test_another_change_of_a_slice() -> None:
    """What nothing of ours explains is named, and not fought over."""
    async with publishing(drop="attributes") as world:
        await trio.sleep(3600)
        assert "admission webhook" in world.publisher.published.problem
        assert world.writes < 30


@virtual
async def test_check() -> None:
    """What a start asks: are shared GPUs shared there, and are taints kept?"""
    server = FakeApiServer()
    async with connected(server) as api:
        assert await check_server(api, NODE)
        server.drop = without("taints")
        assert not await check_server(api, NODE)
        server.drop = without("capacity")
        with pytest.raises(SlicesRefusedError, match="capacity"):
            await check_server(api, NODE)
    assert not server.below(PATH)
