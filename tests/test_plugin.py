"""The RPCs in one process: streams, and when they end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from sgpu import plugin
from sgpu.allocation import HostPaths
from sgpu.api import v1beta1_pb2
from sgpu.device import Health
from sgpu.inventory import Inventory
from sgpu.plugin import DevicePlugin, Streams
from sgpu.simulation import simulated_devices

PATHS = HostPaths(libraries=Path("/host"), libraries_in_container=Path("/container"), devices=Path("/dev"))


def virtual(test: Callable[[], Awaitable[None]]) -> None:
    """Run on a clock that jumps to the next deadline when everything waits."""
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def lists(inventory: Inventory, streams: Streams) -> AsyncIterator[v1beta1_pb2.ListAndWatchResponse]:
    return DevicePlugin(inventory, PATHS, streams).ListAndWatch(v1beta1_pb2.Empty())


class TestListAndWatch:
    def test_it_lists_now_and_after_each_change(self) -> None:
        """And nothing in between, however long."""

        async def check() -> None:
            healthy = simulated_devices(2, 3)
            inventory = Inventory(healthy)
            async with aclosing(lists(inventory, Streams())) as responses:  # type: ignore[type-var]
                assert len((await anext(responses)).devices) == 6
                with trio.move_on_after(3600) as scope:
                    await anext(responses)
                assert scope.cancelled_caught
            async with aclosing(lists(inventory, Streams())) as responses:  # type: ignore[type-var]
                await anext(responses)
                inventory.replace((attrs.evolve(healthy[0], health=Health.UNHEALTHY), healthy[1]))
                response = await anext(responses)
                assert [device.health for device in response.devices] == ["Unhealthy"] * 3 + ["Healthy"] * 3

        virtual(check)

    def test_a_slow_reader_gets_the_latest(self) -> None:
        """Not each change in between, and none that is undone."""

        async def check() -> None:
            inventory = Inventory(simulated_devices(1, 1))
            async with aclosing(lists(inventory, Streams())) as responses:  # type: ignore[type-var]
                await anext(responses)
                for count in (2, 3, 4):
                    inventory.replace(simulated_devices(count, 1))
                assert len((await anext(responses)).devices) == 4

        virtual(check)

    def test_every_stream_sees_a_change(self) -> None:
        """A kubelet's old stream does not take the update from its new one."""

        async def check() -> None:
            inventory, streams = Inventory(simulated_devices(1, 1)), Streams()
            async with (
                aclosing(lists(inventory, streams)) as one,  # type: ignore[type-var]
                aclosing(lists(inventory, streams)) as other,  # type: ignore[type-var]
            ):
                await anext(one)
                await anext(other)
                inventory.replace(simulated_devices(2, 1))
                assert len((await anext(one)).devices) == len((await anext(other)).devices) == 2

        virtual(check)

    def test_it_ends_when_the_session_does(self) -> None:
        """By itself, so that the kubelet hangs up."""

        async def check() -> None:
            streams = Streams()
            responses = lists(Inventory(simulated_devices(1, 1)), streams)
            await anext(responses)
            streams.ending.set()
            with pytest.raises(StopAsyncIteration):
                await anext(responses)

        virtual(check)


class TestStreams:
    def test_lost_once_none_has_been_open_for_the_grace_time(self) -> None:
        """A stream that closes and opens again in time is none lost."""

        async def check() -> None:
            streams = Streams()
            started = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_for, streams, 5, 100)
                nursery.start_soon(open_for, streams, 109, 50)
                await streams.wait_lost(grace=10)
                assert trio.current_time() - started == pytest.approx(159 + 10)

        async def open_for(streams: Streams, after: float, seconds: float) -> None:
            await trio.sleep(after)
            with streams.opened():
                await trio.sleep(seconds)

        virtual(check)

    @pytest.mark.parametrize("streams_open", [0, 1], ids=["none open", "one open"])
    def test_waiting_can_be_cancelled(self, streams_open: int) -> None:
        """At either of its two waits."""

        async def check() -> None:
            streams = Streams()
            opened = [streams.opened() for _ in range(streams_open)]
            for stream in opened:
                stream.__enter__()
            with trio.move_on_after(1) as scope:
                await streams.wait_lost(grace=10)
            assert scope.cancelled_caught

        virtual(check)


def test_the_alpha_api_is_routed_on_the_same_socket() -> None:
    """Seven methods in all, two of them streams."""
    table = plugin.plugin_routes(Inventory(), PATHS, Streams())
    assert sorted(table) == [
        "/deviceplugin.DevicePlugin/Allocate",
        "/deviceplugin.DevicePlugin/ListAndWatch",
        "/v1beta1.DevicePlugin/Allocate",
        "/v1beta1.DevicePlugin/GetDevicePluginOptions",
        "/v1beta1.DevicePlugin/GetPreferredAllocation",
        "/v1beta1.DevicePlugin/ListAndWatch",
        "/v1beta1.DevicePlugin/PreStartContainer",
    ]
    assert [path for path, route in sorted(table.items()) if route.streams] == [
        "/deviceplugin.DevicePlugin/ListAndWatch",
        "/v1beta1.DevicePlugin/ListAndWatch",
    ]


def test_preferred_allocation_answers_each_container() -> None:
    """With nothing where there is nothing to choose from, and never with an error."""

    async def check() -> None:
        inventory = Inventory(simulated_devices(1, 2))
        request = v1beta1_pb2.PreferredAllocationRequest()
        request.container_requests.add(available_deviceIDs=["GPU-a::0", "GPU-b::0"], allocation_size=1)
        request.container_requests.add(available_deviceIDs=["nonsense"], allocation_size=3)
        request.container_requests.add()
        answer = await DevicePlugin(inventory, PATHS, Streams()).GetPreferredAllocation(request)
        assert [list(response.deviceIDs) for response in answer.container_responses] == [["GPU-a::0"], [], []]

    virtual(partial(check))
