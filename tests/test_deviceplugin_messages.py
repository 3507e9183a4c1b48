"""Messages of ListAndWatch and their size, and answers of Allocate."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgpu.api import v1alpha_pb2, v1beta1_pb2
from sgpu.deviceplugin.messages import (
    TooManySharesError,
    allocate_fields,
    check_size,
    content,
    list_bytes,
    v1alpha_list,
    v1beta1_list,
)
from sgpu.node.edits import ContainerEdits, DeviceNode, Mount
from sgpu.node.gpu import Gpu, Health, units
from sgpu.node.offers import Offer
from sgpu.rpc import MAX_MESSAGE_BYTES

pytestmark = pytest.mark.pure

#: As long as every real one.
UUID = "GPU-1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a{:02x}"


def offer(index: int = 0, shares: int = 2, retained: tuple[int, ...] = (), uuid: str = "", **facts: object) -> Offer:
    """An offer of a GPU with these facts."""
    gpu = Gpu(uuid or UUID.format(index), "Tesla T4", f"00000000:{index:02X}:00.0", (f"nvidia{index}",))
    return Offer(units(attrs.evolve(gpu, **facts))[0], shares, retained)  # type: ignore[arg-type, unused-ignore]


def many(count: int, shares: int, numa_node: int | None = None) -> list[Offer]:
    return [offer(index, shares, numa_node=numa_node) for index in range(count)]


def real_bytes(offers: Sequence[Offer]) -> int:
    """The size of the list as it would be sent, with every share unhealthy."""
    numbers = [frozenset((*range(each.shares), *each.retained)) for each in offers]
    return len(v1beta1_list(withheld(offers, numbers)))


def listed(build: Callable[[Sequence[Offer]], bytes], offers: Sequence[Offer]) -> dict[str, v1beta1_pb2.Device]:
    """The entries of a list by id. Their order means nothing to the kubelet."""
    devices = v1beta1_pb2.ListAndWatchResponse.FromString(build(offers)).devices
    assert len({device.ID for device in devices}) == len(devices)
    return {device.ID: device for device in devices}


def withheld(offers: Sequence[Offer], numbers: Sequence[frozenset[int]]) -> list[Offer]:
    return [attrs.evolve(each, withheld=some) for each, some in zip(offers, numbers, strict=True)]


class TestLists:
    OFFERS = (
        attrs.evolve(offer(0, shares=3, retained=(7,), numa_node=1), withheld=frozenset({0, 7})),
        offer(1, shares=1, health=Health.UNHEALTHY),
        offer(2, shares=1, numa_node=0),
    )

    @pytest.mark.parametrize("build", [v1beta1_list, v1alpha_list])
    def test_every_share_is_listed_with_its_health(self, build: Callable[[Sequence[Offer]], bytes]) -> None:
        """List retained shares too; those that are withheld or of a GPU that is down are unhealthy."""
        assert {share_id: device.health for share_id, device in listed(build, self.OFFERS).items()} == {
            UUID.format(0) + "::0": "Unhealthy",
            UUID.format(0) + "::1": "Healthy",
            UUID.format(0) + "::2": "Healthy",
            UUID.format(0) + "::7": "Unhealthy",
            UUID.format(1) + "::0": "Unhealthy",
            UUID.format(2) + "::0": "Healthy",
        }

    def test_the_topology_is_the_numa_node(self) -> None:
        """Leave it out where the node is unknown, which node 0 is not."""
        devices = listed(v1beta1_list, self.OFFERS).values()
        nodes = {device.ID[:-3]: [node.ID for node in device.topology.nodes] for device in devices}
        assert nodes == {UUID.format(0): [1], UUID.format(1): [], UUID.format(2): [0]}
        assert not listed(v1beta1_list, self.OFFERS)[UUID.format(1) + "::0"].HasField("topology")

    @given(st.integers(0, 1200), st.sets(st.integers(0, 1300)), st.sampled_from([40, 117, 118, 123, 127, 200]))
    def test_each_has_its_own_entry(self, shares: int, retained: set[int], length: int) -> None:
        """List what a message with an entry for each would, whatever the lengths of ids and numbers."""
        beyond = tuple(sorted(number for number in retained if number >= shares))
        made = attrs.evolve(offer(0, shares, beyond, "x" * length, numa_node=3), withheld=frozenset(retained))
        topology = v1beta1_pb2.TopologyInfo(nodes=[v1beta1_pb2.NUMANode(ID=3)])
        assert listed(v1beta1_list, [made]) == {
            share_id: v1beta1_pb2.Device(ID=share_id, health=health.value, topology=topology)
            for share_id, health in zip(made.share_ids(), made.share_health(), strict=True)
        }


class TestListBytes:
    @settings(deadline=None, max_examples=60)
    @given(
        shares=st.lists(st.integers(1, 2000), max_size=3),
        retained=st.sets(st.integers(2000, 999_999_999), max_size=5),
        numa_node=st.sampled_from([None, 0, 1, 200]),
        length=st.sampled_from([1, 40, 127, 128, 200]),
    )
    @example(shares=[1, 9, 10], retained=set(), numa_node=None, length=40)
    @example(shares=[11, 99, 100], retained={2000, 10**8}, numa_node=0, length=100)
    @example(shares=[101, 999, 1000, 1001], retained={9999, 10_000}, numa_node=200, length=128)
    def test_exact(self, shares: list[int], retained: set[int], numa_node: int | None, length: int) -> None:
        """Return the size of the message with every share unhealthy, to the byte."""
        offers = [
            offer(count, count, tuple(sorted(retained)), uuid="x" * length, numa_node=numa_node) for count in shares
        ]
        assert list_bytes(offers) == real_bytes(offers)

    def test_health_does_not_matter(self) -> None:
        """Assume the worst: a GPU that fails later does not make the list too large, nor does the older API."""
        healthy = [offer(shares=50)]
        down = [offer(shares=50, health=Health.UNHEALTHY)]
        assert list_bytes(healthy) == list_bytes(down) == list_bytes(withheld(healthy, [frozenset(range(25))]))
        assert len(v1beta1_list(healthy)) < list_bytes(healthy)
        assert len(v1alpha_list(down)) <= list_bytes(healthy)


def named_factor(offers: Sequence[Offer]) -> int:
    """The factor that the refusal names."""
    with pytest.raises(TooManySharesError) as refused:
        check_size(offers)
    match = re.search(r"at most (\d+) shares", str(refused.value))
    assert match
    return int(match[1])


class TestCheckSize:
    @pytest.mark.parametrize("count", [1, 7, 64])
    @pytest.mark.parametrize("numa_node", [None, 200])
    def test_the_factor_that_is_named_is_the_largest_that_fits(self, count: int, numa_node: int | None) -> None:
        """Accept it, and refuse one more."""
        largest = named_factor(many(count, 100_000, numa_node))
        assert real_bytes(many(count, largest, numa_node)) <= MAX_MESSAGE_BYTES
        assert real_bytes(many(count, largest + 1, numa_node)) > MAX_MESSAGE_BYTES
        check_size(many(count, largest, numa_node))
        assert named_factor(many(count, largest + 1, numa_node)) == largest

    def test_exact_limit(self) -> None:
        """Accept as many bytes as the kubelet does, and refuse one more; accept none."""
        overhead = real_bytes([offer(shares=1, uuid="x" * 4_000_000)]) - 4_000_000
        uuid = "x" * (MAX_MESSAGE_BYTES - overhead)
        assert real_bytes([offer(shares=1, uuid=uuid)]) == MAX_MESSAGE_BYTES
        check_size([offer(shares=1, uuid=uuid)])
        with pytest.raises(TooManySharesError):
            check_size([offer(shares=1, uuid=uuid + "x")])
        check_size([])

    def test_differing_shares(self) -> None:
        """Take the factor for a limit to each GPU: those that have fewer shares keep their own number."""
        offers = [offer(0, 100_000), offer(1, 10)]
        largest = named_factor(offers)
        check_size([offer(0, largest), offer(1, 10)])
        with pytest.raises(TooManySharesError):
            check_size([offer(0, largest + 1), offer(1, 10)])

    def test_message(self) -> None:
        """Name, in one line, how much there is and what the limit is."""
        with pytest.raises(TooManySharesError, match=r"^.*\b200000\b.*\b2\b.*\b4194304\b.*$") as refused:
            check_size(many(2, 100_000))
        assert "\n" not in str(refused.value)


class TestContent:
    """`content` differs only where the kubelet sees a difference."""

    HEALTHY = offer()
    DOWN = offer(health=Health.UNHEALTHY, reason="one reason")

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            pytest.param(DOWN, offer(health=Health.UNHEALTHY, reason="another"), True, id="reason"),
            pytest.param(DOWN, attrs.evolve(DOWN, withheld=frozenset({1})), True, id="withheld of a GPU that is down"),
            pytest.param(HEALTHY, offer(name="another", memory_bytes=1, device_nodes=()), True, id="facts"),
            pytest.param(HEALTHY, attrs.evolve(HEALTHY, withheld=frozenset({1})), False, id="withheld"),
            pytest.param(HEALTHY, attrs.evolve(HEALTHY, shares=3), False, id="shares"),
            pytest.param(HEALTHY, attrs.evolve(HEALTHY, retained=(7,)), False, id="retained"),
            pytest.param(HEALTHY, offer(numa_node=0), False, id="NUMA node"),
            pytest.param(HEALTHY, offer(uuid="GPU-b"), False, id="UUID"),
            pytest.param(HEALTHY, DOWN, False, id="down"),
            pytest.param(DOWN, attrs.evolve(DOWN, shares=3), False, id="shares of a GPU that is down"),
            pytest.param(DOWN, attrs.evolve(DOWN, retained=(7,)), False, id="retained of a GPU that is down"),
        ],
    )
    def test_content(self, one: Offer, other: Offer, same: bool) -> None:
        """Return equal values exactly when the lists are equal."""
        assert (content([one]) == content([other])) is same
        assert (v1beta1_list([one]) == v1beta1_list([other])) is same


@pytest.mark.parametrize(
    ("api", "name"), [(v1beta1_pb2, "ContainerAllocateResponse"), (v1alpha_pb2, "AllocateResponse")]
)
def test_allocate_fields(api: ModuleType, name: str) -> None:
    """Render environment, read-only mounts, and device nodes that may be read, written and made."""
    edits = ContainerEdits(
        environment={"A": "1"},
        device_nodes=(DeviceNode("/host-dev/nvidia0", "/dev/nvidia0"),),
        mounts=(Mount("/host/lib", "/usr/local/nvidia"),),
    )
    response = getattr(api, name)(**allocate_fields(api, edits))
    assert dict(response.envs) == {"A": "1"}
    (mount,), (device,) = response.mounts, response.devices
    assert (mount.host_path, mount.container_path, mount.read_only) == ("/host/lib", "/usr/local/nvidia", True)
    assert (device.host_path, device.container_path) == ("/host-dev/nvidia0", "/dev/nvidia0")
    assert device.permissions == "mrw"
