"""The RPCs in one process: what they ask the node for, how they answer, and when streams end."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from functools import partial

import attrs
import pytest
import trio
import trio.testing
from purerpc import StatusCode
from virtual_clock import virtual

from sgpu.api import v1alpha_pb2, v1beta1_pb2
from sgpu.deviceplugin.servicer import AlphaDevicePlugin, DevicePlugin, PluginContext, Streams, options, plugin_routes
from sgpu.driver.simulated import simulated_gpus
from sgpu.node.container import Container
from sgpu.node.edits import AllocationOptions, HostPaths
from sgpu.node.gpu import Health
from sgpu.node.policy import Policy
from sgpu.node.rank import MultiShare, Placement
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.observe.registrations import Registration
from sgpu.rpc import RpcError

RESOURCE = "example.com/gpu"
PATHS = HostPaths("/host", "/container", "/dev")
APIS = pytest.mark.parametrize("api", [DevicePlugin, AlphaDevicePlugin], ids=["v1beta1", "v1alpha"])


def new_node(gpus: int, shares: int = 3) -> NodeState:
    """A node with so many simulated GPUs, all of one resource."""
    node = NodeState(Policy(RESOURCE, shares), interval=5, clock=lambda: 0)
    node.set_gpus(simulated_gpus(gpus))
    return node


def context(
    node: NodeState, placement: Placement = Placement.SPREAD, multi_share: MultiShare = MultiShare.DISTINCT
) -> PluginContext:
    return PluginContext(node, RESOURCE, AllocationOptions(PATHS, placement=placement, multi_share=multi_share))


def share_ids(node: NodeState) -> list[list[str]]:
    """The ids of each GPU's shares."""
    return [offer.share_ids() for offer in node.offered(RESOURCE)]


async def lists(
    node: NodeState, streams: Streams | None = None, api: type[DevicePlugin | AlphaDevicePlugin] = DevicePlugin
) -> AsyncGenerator[v1beta1_pb2.ListAndWatchResponse, None]:
    """The lists of a ListAndWatch stream, which have the same form in both versions of the API."""
    plugin = api(context(node), streams or Streams())
    async with aclosing(plugin.ListAndWatch(v1beta1_pb2.Empty())) as stream:  # type: ignore[arg-type]
        async for response in stream:
            yield v1beta1_pb2.ListAndWatchResponse.FromString(response)


class TestListAndWatch:
    @APIS
    @virtual
    async def test_it_lists_now_and_after_each_change(self, api: type[DevicePlugin | AlphaDevicePlugin]) -> None:
        """Send the whole list each time, and nothing for a change that the kubelet can't see."""
        node = new_node(2)
        healthy, other = node.gpus
        down = attrs.evolve(healthy, health=Health.UNHEALTHY, reason="one")
        async with aclosing(lists(node, api=api)) as responses:
            assert [device.health for device in (await anext(responses)).devices] == ["Healthy"] * 6
            node.set_gpus((down, other))
            response = await anext(responses)
            assert [device.health for device in response.devices] == ["Unhealthy"] * 3 + ["Healthy"] * 3
            node.set_gpus((attrs.evolve(down, reason="another"), other))
            with trio.move_on_after(3600) as scope:
                await anext(responses)
            assert scope.cancelled_caught

    @virtual
    async def test_a_slow_reader_gets_the_latest(self) -> None:
        """Skip the changes in between."""
        node = new_node(1)
        async with aclosing(lists(node)) as responses:
            await anext(responses)
            for count in (2, 3, 4):
                node.set_gpus(simulated_gpus(count))
            assert len((await anext(responses)).devices) == 4 * 3
            node.set_gpus(simulated_gpus(1))
            node.set_gpus(simulated_gpus(4))
            with trio.move_on_after(1) as scope:
                await anext(responses)
            assert scope.cancelled_caught

    @virtual
    async def test_it_ends_when_the_session_does(self) -> None:
        """End by itself while it waits for a change, so that the kubelet hangs up."""

        async def end_soon(streams: Streams) -> None:
            await trio.testing.wait_all_tasks_blocked()
            streams.ending.set()

        streams = Streams()
        async with aclosing(lists(new_node(1), streams)) as responses, trio.open_nursery() as nursery:
            await anext(responses)
            nursery.start_soon(end_soon, streams)
            with pytest.raises(StopAsyncIteration):
                await anext(responses)

    @virtual
    async def test_it_counts_as_an_open_stream(self) -> None:
        """Count it from its first list until it is closed."""
        registration = Registration()
        async with aclosing(lists(new_node(1), Streams(registration))) as responses:
            await anext(responses)
            assert registration.streams == 1
        assert registration.streams == 0


class TestStreams:
    @virtual
    async def test_lost_once_none_has_been_open_for_the_grace_time(self) -> None:
        """Bear with a stream that closes and opens again in time."""

        async def open_for(streams: Streams, after: float, seconds: float) -> None:
            await trio.sleep(after)
            with streams.opened():
                await trio.sleep(seconds)

        streams = Streams()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_for, streams, 5, 100)
            nursery.start_soon(open_for, streams, 109, 50)
            await streams.wait_lost(grace=10)
            assert trio.current_time() == pytest.approx(159 + 10)

    @pytest.mark.parametrize("count", [0, 1], ids=["none open", "one open"])
    @virtual
    async def test_waiting_can_be_cancelled(self, count: int) -> None:
        """Let Cancelled through, at either of its two waits."""
        streams = Streams()
        with ExitStack() as stack, trio.move_on_after(1) as scope:
            for _ in range(count):
                stack.enter_context(streams.opened())
            await streams.wait_lost(grace=10)
        assert scope.cancelled_caught


def test_both_apis_are_served_on_one_socket() -> None:
    """Route seven methods, two of which stream."""
    table = plugin_routes(context(new_node(0)), Streams())
    assert {path: route.streams for path, route in table.items()} == {
        "/deviceplugin.DevicePlugin/Allocate": False,
        "/deviceplugin.DevicePlugin/ListAndWatch": True,
        "/v1beta1.DevicePlugin/Allocate": False,
        "/v1beta1.DevicePlugin/GetDevicePluginOptions": False,
        "/v1beta1.DevicePlugin/GetPreferredAllocation": False,
        "/v1beta1.DevicePlugin/ListAndWatch": True,
        "/v1beta1.DevicePlugin/PreStartContainer": False,
    }


@pytest.mark.parametrize("factor", [0, 1])
def test_options(factor: float) -> None:
    """Tell the kubelet to call GetPreferredAllocation, and PreStartContainer only where there are limits."""
    node = new_node(1)
    node.set_policy(Policy(RESOURCE, 1, limit_factor=factor))
    plugin = DevicePlugin(context(node), Streams())
    answer = plugin.GetDevicePluginOptions(v1beta1_pb2.Empty())
    assert answer == options(context(node))
    assert (answer.get_preferred_allocation_available, answer.pre_start_required) == (True, bool(factor))


class TestGetPreferredAllocation:
    def test_each_container_is_answered(self) -> None:
        """Answer nothing where there is nothing to choose from, and never an error."""
        node = new_node(1)
        ((_, share, _),) = share_ids(node)
        request = v1beta1_pb2.PreferredAllocationRequest()
        request.container_requests.add(available_deviceIDs=[share, "GPU-b::0"], allocation_size=1)
        request.container_requests.add(available_deviceIDs=["nonsense"], allocation_size=3)
        request.container_requests.add()
        request.container_requests.add(must_include_deviceIDs=["nonsense"], allocation_size=1)
        answer = DevicePlugin(context(node), Streams()).GetPreferredAllocation(request)
        assert [list(each.deviceIDs) for each in answer.container_responses] == [[share], [], [], ["nonsense"]]

    @pytest.mark.parametrize(
        ("placement", "multi_share", "gpus"),
        [
            pytest.param(Placement.SPREAD, MultiShare.DISTINCT, [1, 0], id="spread"),
            pytest.param(Placement.SPREAD, MultiShare.SAME, [1, 1], id="spread on one"),
            pytest.param(Placement.PACK, MultiShare.DISTINCT, [0, 1], id="pack"),
        ],
    )
    def test_the_operator_s_choice(self, placement: Placement, multi_share: MultiShare, gpus: list[int]) -> None:
        """Choose by the settings and by what is known of the use at that moment."""
        node = new_node(2)
        first, second = share_ids(node)
        held = Share.parse(first[0])
        assert held
        node.set_holders({RESOURCE: {held: Container("default", "pod", "main")}})
        request = v1beta1_pb2.PreferredAllocationRequest()
        request.container_requests.add(available_deviceIDs=[*first[1:], *second], allocation_size=2)
        plugin = DevicePlugin(context(node, placement, multi_share), Streams())
        (answer,) = plugin.GetPreferredAllocation(request).container_responses
        assert [0 if share_id in first else 1 for share_id in answer.deviceIDs] == gpus


def allocate(plugin: DevicePlugin | AlphaDevicePlugin, *containers: Sequence[str]) -> list[dict[str, str]]:
    """Return the environment of each container."""
    if isinstance(plugin, AlphaDevicePlugin):
        (ids,) = containers
        return [dict(plugin.Allocate(v1alpha_pb2.AllocateRequest(devicesIDs=ids)).envs)]
    request = v1beta1_pb2.AllocateRequest()
    for ids in containers:
        request.container_requests.add(devices_ids=ids)
    return [dict(response.envs) for response in plugin.Allocate(request).container_responses]


class TestAllocate:
    @APIS
    def test_a_container_gets_its_shares(self, api: type[DevicePlugin | AlphaDevicePlugin]) -> None:
        """Hand them over at once: whatever is chosen next knows of them."""
        node = new_node(1)
        ((one, two, _),) = share_ids(node)
        (environment,) = allocate(api(context(node), Streams()), [one, two])
        assert environment["SGPU_SHARES"] == "2"
        assert set(map(str, node.usage.grants.shares(0))) == {one, two}

    def test_each_container_is_answered(self) -> None:
        """Answer in the order of the request."""
        node = new_node(2)
        first, second = share_ids(node)
        environments = allocate(DevicePlugin(context(node), Streams()), second[:2], first[:1])
        assert [environment["SGPU_SHARES"] for environment in environments] == ["2", "1"]
        assert [environment["SGPU_GPU_UUIDS"] for environment in environments] == [
            gpu.uuid for gpu in reversed(node.gpus)
        ]

    @APIS
    @pytest.mark.parametrize(
        ("ids", "code"),
        [
            *((["GPU-nobody::0"], StatusCode.NOT_FOUND), (["{down}::0"], StatusCode.FAILED_PRECONDITION)),
            (["{up}::0", "{up}::1"], StatusCode.FAILED_PRECONDITION),
        ],
    )
    def test_a_refusal_has_a_code_a_message_and_a_warning(
        self,
        api: type[DevicePlugin | AlphaDevicePlugin],
        ids: list[str],
        code: StatusCode,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Refuse the call with the node's reason, and hand nothing over."""
        node = new_node(2)
        up, healthy = node.gpus
        down = attrs.evolve(healthy, health=Health.UNHEALTHY, reason="XID 79")
        node.set_gpus((up, down))
        caplog.clear()
        plugin = api(context(node, multi_share=MultiShare.STRICT_DISTINCT), Streams())
        call = partial(allocate, plugin, [each.format(up=up.uuid, down=down.uuid) for each in ids])
        with pytest.raises(RpcError) as refused:
            call()
        assert refused.value.code is code
        assert refused.value.message == str(refused.value.__cause__)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert refused.value.message in record.getMessage()
        assert not node.usage.grants.shares(0)
