"""The RPCs in one process: streams, and when they end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from purerpc import StatusCode

from sgpu import plugin
from sgpu.allocation import HostPaths, Rules
from sgpu.api import v1alpha_pb2, v1beta1_pb2
from sgpu.device import Health
from sgpu.inventory import Inventory
from sgpu.placement import MultiShare, Placement
from sgpu.plugin import AlphaDevicePlugin, DevicePlugin, Offer, Streams
from sgpu.rpc import RpcError
from sgpu.simulation import simulated_devices
from sgpu.usage import Holder, Sample, Usage

PATHS = HostPaths(libraries=Path("/host"), libraries_in_container=Path("/container"), devices=Path("/dev"))


def virtual(test: Callable[[], Awaitable[None]]) -> None:
    """Run on a clock that jumps to the next deadline when everything waits."""
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def offer(
    inventory: Inventory,
    *,
    placement: Placement = Placement.SPREAD,
    multi_share: MultiShare = MultiShare.DISTINCT,
    hints: bool = False,
) -> Offer:
    """This inventory, of whose use nothing is known."""
    rules = Rules(framework_hints=hints, strict_distinct=multi_share is MultiShare.STRICT_DISTINCT)
    return Offer(inventory, Usage(interval=5), PATHS, placement, multi_share, rules)


def lists(inventory: Inventory, streams: Streams) -> AsyncIterator[v1beta1_pb2.ListAndWatchResponse]:
    return DevicePlugin(offer(inventory), streams).ListAndWatch(v1beta1_pb2.Empty())


async def prefer(made: Offer, available: Sequence[str], size: int = 1, must_include: Sequence[str] = ()) -> list[str]:
    """The answer for one container."""
    request = v1beta1_pb2.PreferredAllocationRequest()
    request.container_requests.add(
        available_deviceIDs=available, must_include_deviceIDs=must_include, allocation_size=size
    )
    answer = DevicePlugin(made, Streams()).GetPreferredAllocation(request)
    return list(answer.container_responses[0].deviceIDs)


def allocate_request(*containers: Sequence[str]) -> v1beta1_pb2.AllocateRequest:
    """For containers that were given these shares."""
    request = v1beta1_pb2.AllocateRequest()
    for share_ids in containers:
        request.container_requests.add(devices_ids=share_ids)
    return request


async def allocate(made: Offer, *containers: Sequence[str]) -> list[dict[str, str]]:
    """What each container finds in its environment."""
    answer = DevicePlugin(made, Streams()).Allocate(allocate_request(*containers))
    return [dict(response.envs) for response in answer.container_responses]


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
    table = plugin.plugin_routes(offer(Inventory()), Streams())
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


class TestGetPreferredAllocation:
    def test_each_container_is_answered(self) -> None:
        """With nothing where there is nothing to choose from, and never with an error."""

        async def check() -> None:
            inventory = Inventory(simulated_devices(1, 2))
            share = inventory.devices[0].share_ids()[1]
            request = v1beta1_pb2.PreferredAllocationRequest()
            request.container_requests.add(available_deviceIDs=[share, "GPU-b::0"], allocation_size=1)
            request.container_requests.add(available_deviceIDs=["nonsense"], allocation_size=3)
            request.container_requests.add()
            request.container_requests.add(must_include_deviceIDs=["nonsense"], allocation_size=1)
            answer = DevicePlugin(offer(inventory), Streams()).GetPreferredAllocation(request)
            assert [list(response.deviceIDs) for response in answer.container_responses] == [
                [share],
                [],
                [],
                ["nonsense"],
            ]

        virtual(check)

    @pytest.mark.parametrize(
        ("placement", "multi_share", "gpus"),
        [
            pytest.param(Placement.SPREAD, MultiShare.DISTINCT, [1, 0], id="spread"),
            pytest.param(Placement.SPREAD, MultiShare.STRICT_DISTINCT, [1, 0], id="spread, strictly"),
            pytest.param(Placement.SPREAD, MultiShare.SAME, [1, 1], id="spread on one"),
            pytest.param(Placement.PACK, MultiShare.DISTINCT, [0, 1], id="pack"),
            pytest.param(Placement.PACK, MultiShare.SAME, [0, 0], id="pack on one"),
        ],
    )
    def test_the_operator_s_choice(self, placement: Placement, multi_share: MultiShare, gpus: list[int]) -> None:
        """It decides, with what is known of the use at that moment."""

        async def check() -> None:
            first, second = sorted(simulated_devices(2, 4), key=lambda device: device.uuid)
            made = offer(Inventory([first, second]), placement=placement, multi_share=multi_share)
            made.usage.held({first.share_ids()[0]: Holder("default", "pod", "main")})
            available = [*first.share_ids()[1:], *second.share_ids()]
            chosen = await prefer(made, available, 2)
            uuids = [first.uuid, second.uuid]
            assert [uuids.index(share.partition("::")[0]) for share in chosen] == gpus

        virtual(check)

    def test_a_share_just_handed_out_counts(self) -> None:
        """As used memory, before any model is loaded and the kubelet's list has it; for a minute."""

        async def check() -> None:
            first, second = sorted(simulated_devices(2, 4), key=lambda device: device.uuid)
            made = offer(Inventory([first, second]))
            samples = {first.uuid: Sample(16 << 30, 15 << 30, 0), second.uuid: Sample(16 << 30, 13 << 30, 0)}
            available = [*first.share_ids()[1:3], *second.share_ids()[1:3]]

            made.usage.sampled(samples, trio.current_time())
            assert await prefer(made, available) == [first.share_ids()[1]]
            await allocate(made, [first.share_ids()[0]])
            assert await prefer(made, available) == [second.share_ids()[1]]
            await trio.sleep(60)
            made.usage.sampled(samples, trio.current_time())
            assert await prefer(made, available) == [first.share_ids()[1]]

        virtual(check)


class TestAllocate:
    def test_rules_and_memory(self) -> None:
        """Each container is told its part of the memory; what is simulated gives no hints."""

        async def check() -> None:
            inventory = Inventory(simulated_devices(1, 4))
            one, two, three, _ = inventory.devices[0].share_ids()
            environments = await allocate(offer(inventory, hints=True), [one], [two, three])
            assert [environment["SGPU_MEMORY_BYTES"] for environment in environments] == [str(4 << 30), str(8 << 30)]
            assert not any("XLA_PYTHON_CLIENT_PREALLOCATE" in environment for environment in environments)

        virtual(check)

    def test_hints(self) -> None:
        """A real GPU's container gets the hints."""

        async def check() -> None:
            inventory = Inventory([attrs.evolve(simulated_devices(1, 4)[0], simulated=False)])
            (environment,) = await allocate(offer(inventory, hints=True), inventory.devices[0].share_ids()[:1])
            assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"

        virtual(check)

    @pytest.mark.parametrize("alpha", [False, True], ids=["v1beta1", "v1alpha"])
    def test_strict_distinct(self, alpha: bool) -> None:
        """Two shares of one GPU are refused by either API, and nothing was handed out then."""

        async def check() -> None:
            made = offer(Inventory(simulated_devices(1, 4)), multi_share=MultiShare.STRICT_DISTINCT)
            made.usage.held({})
            share_ids = made.inventory.devices[0].share_ids()[:2]
            call: Callable[[], object] = partial(DevicePlugin(made, Streams()).Allocate, allocate_request(share_ids))
            if alpha:
                request = v1alpha_pb2.AllocateRequest(devicesIDs=share_ids)
                call = partial(AlphaDevicePlugin(made, Streams()).Allocate, request)
            with pytest.raises(RpcError, match="are not all of different GPUs") as refused:
                call()
            assert refused.value.code is StatusCode.FAILED_PRECONDITION
            assert made.usage.allocated(trio.current_time()) == frozenset()

        virtual(check)

    def test_what_was_handed_out_is_allocated(self) -> None:
        """From that moment, whatever the kubelet's list has."""

        async def check() -> None:
            made = offer(Inventory(simulated_devices(1, 4)))
            made.usage.held({})
            share_ids = made.inventory.devices[0].share_ids()[:2]
            await allocate(made, share_ids)
            assert made.usage.allocated(trio.current_time()) == frozenset(share_ids)

        virtual(check)
