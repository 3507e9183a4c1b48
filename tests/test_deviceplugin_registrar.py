"""Registration of resources, in one process on a virtual clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import virtual_clock
from daemon_process import short_directory
from purerpc import StatusCode
from rpc_peer import serving
from test_deviceplugin_registration import Registrar

from sgpu import rpc
from sgpu.api import v1beta1_pb2
from sgpu.config.settings import Settings, endpoint
from sgpu.deviceplugin import registrar, registration
from sgpu.deviceplugin.registrar import FAREWELL
from sgpu.deviceplugin.succession import Succession
from sgpu.driver.simulated import simulated_gpus
from sgpu.lib.concurrency import Broadcast, wait_until
from sgpu.node.edits import AllocationOptions, HostPaths
from sgpu.node.policy import Policy, Rule
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations
from sgpu.observe.watchdog import Watchdog

SHARED, WHOLE = "a.example/shared", "a.example/whole"
GPUS = simulated_gpus(2)
#: The first GPU is shared, the second one is whole; or both are shared.
TWO_RESOURCES = Policy(SHARED, 3, (Rule("", uuid=GPUS[1].uuid, shares=1, resource=WHOLE),))
ONE_RESOURCE = Policy(SHARED, 3)
#: The clock jumps when the kernel has nothing to do either; what hangs fails.
virtual = partial(virtual_clock.virtual, seconds=3600, threshold=0.02)


@attrs.define(eq=False)
class Kubelet:
    """As much of a kubelet as it takes: it watches each plugin that registers. `lists` has the sizes of its lists."""

    directory: Path
    nursery: trio.Nursery
    refused: set[str] = attrs.Factory(set)
    lists: dict[str, list[int]] = attrs.Factory(lambda: defaultdict(list))
    ended: list[str] = attrs.Factory(list)
    changed: Broadcast = attrs.Factory(Broadcast)

    async def register(self, version: str, resource: str) -> None:
        if resource in self.refused:
            raise rpc.RpcError(StatusCode.UNKNOWN, "refused")
        self.nursery.start_soon(self._watch, resource)

    async def wait_lists(self, resource: str, *sizes: int) -> None:
        await wait_until(lambda: self.lists[resource] == list(sizes), self.changed)

    async def _watch(self, resource: str) -> None:
        with suppress(trio.BrokenResourceError):  # the plugin hung up
            async with rpc.open_channel(self.directory / endpoint(resource)) as channel:
                async for response in channel.streaming(
                    "/v1beta1.DevicePlugin/ListAndWatch", v1beta1_pb2.Empty(), v1beta1_pb2.ListAndWatchResponse
                ):
                    self.lists[resource].append(len(response.devices))
                    self.changed.notify()
        self.ended.append(resource)
        self.changed.notify()


OPTIONS = AllocationOptions(HostPaths("/host/nvidia", "/usr/local/nvidia", "/dev"))


@attrs.frozen
class World:
    """A node, its kubelet, and what the daemon records of the two."""

    node: NodeState
    kubelet: Kubelet
    registrations: Registrations
    watchdog: Watchdog


@asynccontextmanager
async def running(policy: Policy, refused: str = "") -> AsyncIterator[World]:
    """The front-end at work on a node without GPUs."""
    node, counters, watchdog = NodeState(policy, interval=5), Counters(), Watchdog()
    registrations = Registrations(counters)
    with short_directory() as directory:
        async with trio.open_nursery() as nursery:
            kubelet = Kubelet(directory, nursery, {refused})
            async with serving(rpc.routes([Registrar(kubelet.register).service]), directory / registration.SOCKET):
                settings = Settings(plugin_directory=str(directory))
                served = (node, settings, OPTIONS, registrations, counters, watchdog, Succession())
                nursery.start_soon(registrar.run, *served)
                yield World(node, kubelet, registrations, watchdog)
                nursery.cancel_scope.cancel()


@virtual
async def test_a_resource_is_registered_once_there_is_a_gpu_for_it() -> None:
    """Register none before there is a GPU, and none to which the policy gives no GPU."""
    async with running(TWO_RESOURCES) as world:
        await trio.sleep(60)
        assert not world.registrations.by_resource
        world.node.set_gpus(GPUS[:1])
        await world.kubelet.wait_lists(SHARED, 3)
        await trio.sleep(60)
        assert world.registrations.by_resource.keys() == {SHARED}
        world.node.set_gpus(GPUS)
        await world.kubelet.wait_lists(WHOLE, 1)
        assert world.kubelet.lists[SHARED] == [3]


@virtual
async def test_a_resource_that_is_no_longer_offered_leaves() -> None:
    """List nothing, and leave when the kubelet has had time to receive that; leave the others alone."""
    async with running(TWO_RESOURCES) as world:
        world.node.set_gpus(GPUS)
        await world.kubelet.wait_lists(WHOLE, 1)
        changed = trio.current_time()
        world.node.set_policy(ONE_RESOURCE)
        await world.kubelet.wait_lists(WHOLE, 1, 0)
        await wait_until(lambda: bool(world.kubelet.ended), world.kubelet.changed)
        assert trio.current_time() - changed == pytest.approx(FAREWELL)
        await trio.sleep(300)
        assert not world.watchdog.expired()
        assert world.registrations.by_resource.keys() == {SHARED}
        assert world.kubelet.lists == {SHARED: [3, 6], WHOLE: [1, 0]}
        assert world.kubelet.ended == [WHOLE]


@pytest.mark.parametrize(
    ("seconds", "ended"), [(FAREWELL / 2, []), (2 * FAREWELL, [WHOLE])], ids=["before it left", "after it left"]
)
@virtual
async def test_a_resource_that_comes_back(seconds: float, ended: list[str]) -> None:
    """Go on with its registration if it has not left yet, and else register it again."""
    async with running(TWO_RESOURCES) as world:
        world.node.set_gpus(GPUS)
        await world.kubelet.wait_lists(WHOLE, 1)
        world.node.set_policy(ONE_RESOURCE)
        await trio.sleep(seconds)
        world.node.set_policy(TWO_RESOURCES)
        await world.kubelet.wait_lists(WHOLE, 1, 0, 1)
        await trio.sleep(60)
        assert world.kubelet.ended == ended
        assert world.registrations.by_resource[WHOLE].registered


@virtual
async def test_a_resource_that_fails_does_not_stop_the_others() -> None:
    """Register the others, and try it again for as long as it takes."""
    async with running(TWO_RESOURCES, refused=WHOLE) as world:
        world.node.set_gpus(GPUS)
        await world.kubelet.wait_lists(SHARED, 3)
        await trio.sleep(300)
        assert not world.registrations.by_resource[WHOLE].registered
        assert not world.watchdog.expired()
        world.kubelet.refused.clear()
        await world.kubelet.wait_lists(WHOLE, 1)
        assert world.kubelet.lists[SHARED] == [3]
