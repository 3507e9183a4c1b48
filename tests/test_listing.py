"""What ListAndWatch sends, and how large that is."""

from __future__ import annotations

import re
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpu.api import v1beta1_pb2
from sgpu.device import Device, Health
from sgpu.listing import TooManySharesError, check_size, content, list_bytes, v1alpha_list, v1beta1_list
from sgpu.rpc import MAX_MESSAGE_BYTES

pytestmark = pytest.mark.pure

#: As long as every real one.
UUID = "GPU-1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a{:02x}"


def gpu(index: int = 0, shares: int = 2, numa_node: int | None = None, healthy: bool = True) -> Device:
    return Device(
        uuid=UUID.format(index),
        name="Tesla T4",
        pci_bus_id=f"00000000:{index:02X}:00.0",
        shares=shares,
        device_nodes=(f"nvidia{index}",),
        numa_node=numa_node,
        health=Health.HEALTHY if healthy else Health.UNHEALTHY,
        reason="" if healthy else "XID 79",
    )


def node(count: int, shares: int, numa_node: int | None = None) -> list[Device]:
    return [gpu(index, shares, numa_node) for index in range(count)]


def real_bytes(devices: list[Device]) -> int:
    """The size of the list as it would be sent, with every share unhealthy."""
    return v1beta1_list([attrs.evolve(device, health=Health.UNHEALTHY) for device in devices]).ByteSize()


class TestLists:
    def test_v1beta1(self) -> None:
        """Every share of every GPU is listed in order, with the health and the NUMA node of its GPU."""
        response = v1beta1_list([gpu(0, shares=2, numa_node=1), gpu(1, shares=1, healthy=False)])
        assert [(entry.ID, entry.health) for entry in response.devices] == [
            (UUID.format(0) + "::0", "Healthy"),
            (UUID.format(0) + "::1", "Healthy"),
            (UUID.format(1) + "::0", "Unhealthy"),
        ]
        assert [[node.ID for node in entry.topology.nodes] for entry in response.devices] == [[1], [1], []]

    @pytest.mark.parametrize(
        ("numa_node", "nodes"),
        [
            pytest.param(None, None, id="unknown"),
            pytest.param(0, [0], id="node 0"),
            pytest.param(1, [1], id="node 1"),
        ],
    )
    def test_topology(self, numa_node: int | None, nodes: list[int] | None) -> None:
        """A NUMA node that is not known is left out, and node 0 is not taken for that."""
        (entry,) = v1beta1_list([gpu(shares=1, numa_node=numa_node)]).devices
        assert entry.HasField("topology") is (nodes is not None)
        assert [node.ID for node in entry.topology.nodes] == (nodes or [])

    def test_v1alpha(self) -> None:
        """The old API lists the same shares with the same health."""
        devices = [gpu(0, shares=2, numa_node=1), gpu(1, shares=1, healthy=False)]
        assert [(entry.ID, entry.health) for entry in v1alpha_list(devices).devices] == [
            (entry.ID, entry.health) for entry in v1beta1_list(devices).devices
        ]

    @pytest.mark.parametrize("build", [v1beta1_list, v1alpha_list])
    def test_withheld(self, build: Callable[[list[Device]], v1beta1_pb2.ListAndWatchResponse]) -> None:
        """Shares that are withheld are listed as unhealthy, and the others of their GPU are not."""
        devices = [attrs.evolve(gpu(0, shares=3), withheld=frozenset({0, 2})), gpu(1, shares=1)]
        assert [(entry.ID[-1], entry.health) for entry in build(devices).devices] == [
            ("0", "Unhealthy"),
            ("1", "Healthy"),
            ("2", "Unhealthy"),
            ("0", "Healthy"),
        ]

    def test_no_devices(self) -> None:
        """No GPUs make an empty list, which is a message as well."""
        assert v1beta1_list([]).SerializeToString() == b""
        assert v1alpha_list([]).SerializeToString() == b""


class TestListBytes:
    @settings(deadline=None, max_examples=60)
    @given(
        shares=st.lists(st.integers(1, 2000), max_size=3),
        numa_node=st.sampled_from([None, 0, 1, 200]),
    )
    def test_exact(self, shares: list[int], numa_node: int | None) -> None:
        """The computed size is that of the message with every share unhealthy, to the byte."""
        devices = [gpu(index, count, numa_node) for index, count in enumerate(shares)]
        assert list_bytes(devices) == real_bytes(devices)

    @pytest.mark.parametrize("shares", [1, 9, 10, 11, 99, 100, 101, 999, 1000, 1001])
    def test_digits(self, shares: int) -> None:
        """Where share numbers get one digit longer, the size is exact too."""
        assert list_bytes([gpu(shares=shares)]) == real_bytes([gpu(shares=shares)])

    def test_large(self) -> None:
        """60,000 shares: the size is exact, and fits."""
        devices = node(6, 10_000, numa_node=1)
        assert list_bytes(devices) == real_bytes(devices) <= MAX_MESSAGE_BYTES

    @pytest.mark.parametrize("length", [1, 100, 127, 128, 200])
    def test_long_uuid(self, length: int) -> None:
        """Lengths that take two bytes themselves are counted."""
        device = attrs.evolve(gpu(shares=200), uuid="x" * length)
        assert list_bytes([device]) == real_bytes([device])

    def test_health_does_not_matter(self) -> None:
        """The size is that of the worst case: a GPU that fails later does not make the list too large."""
        healthy = [gpu(shares=50)]
        assert list_bytes(healthy) == list_bytes([gpu(shares=50, healthy=False)])
        assert list_bytes(healthy) == list_bytes([attrs.evolve(healthy[0], withheld=frozenset(range(25)))])
        assert v1beta1_list(healthy).ByteSize() < list_bytes(healthy)

    def test_v1alpha_is_no_larger(self) -> None:
        """What fits the newer API fits the older one."""
        devices = [gpu(shares=500, healthy=False)]
        assert v1alpha_list(devices).ByteSize() <= list_bytes(devices)


class TestCheckSize:
    @pytest.mark.parametrize("devices", [[], node(1, 1), node(8, 100), node(6, 10_000, numa_node=1)])
    def test_fits(self, devices: list[Device]) -> None:
        """What fits is left alone."""
        check_size(devices)

    @pytest.mark.parametrize("numa_node", [None, 0, 1, 200])
    @pytest.mark.parametrize("count", [1, 2, 7, 64])
    def test_boundary(self, count: int, numa_node: int | None) -> None:
        """The factor that is named is the largest that fits: it passes, and one more does not."""
        largest = named_factor(node(count, 100_000, numa_node))
        assert real_bytes(node(count, largest, numa_node)) <= MAX_MESSAGE_BYTES
        assert real_bytes(node(count, largest + 1, numa_node)) > MAX_MESSAGE_BYTES
        check_size(node(count, largest, numa_node))
        assert named_factor(node(count, largest + 1, numa_node)) == largest

    def test_exact_limit(self) -> None:
        """A list of just as many bytes as the kubelet takes is left alone; one byte more is too many."""
        overhead = real_bytes([attrs.evolve(gpu(shares=1), uuid="x" * 4_000_000)]) - 4_000_000
        device = attrs.evolve(gpu(shares=1), uuid="x" * (MAX_MESSAGE_BYTES - overhead))
        assert real_bytes([device]) == MAX_MESSAGE_BYTES
        check_size([device])
        with pytest.raises(TooManySharesError):
            check_size([attrs.evolve(device, uuid=device.uuid + "x")])

    def test_differing_shares(self) -> None:
        """A factor is a limit to each GPU: those that have fewer shares keep their own number."""
        devices = [gpu(0, 100_000), gpu(1, 10)]
        largest = named_factor(devices)
        check_size([gpu(0, largest), gpu(1, 10)])
        with pytest.raises(TooManySharesError):
            check_size([gpu(0, largest + 1), gpu(1, 10)])

    def test_message(self) -> None:
        """The refusal says in one line how much there is, what the limit is, and which flag to lower to what."""
        with pytest.raises(TooManySharesError) as refused:
            check_size(node(2, 100_000))
        assert "\n" not in str(refused.value)
        assert re.fullmatch(
            r"200000 shares on 2 GPU\(s\) do not fit the kubelet's message of 4194304 bytes: "
            r"-gpu-duplication-factor can be at most \d+ here",
            str(refused.value),
        )


def named_factor(devices: list[Device]) -> int:
    """The factor that the refusal of `devices` names."""
    with pytest.raises(TooManySharesError) as refused:
        check_size(devices)
    match = re.search(r"at most (\d+)", str(refused.value))
    assert match
    return int(match[1])


class TestContent:
    """What the kubelet can see of a list: more of the same is no news to it."""

    HEALTHY = Device("GPU-a", "a card", "00000000:01:00.0", 2, ("nvidia0",))
    DOWN = attrs.evolve(HEALTHY, health=Health.UNHEALTHY, reason="one reason")

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            (DOWN, attrs.evolve(DOWN, reason="another"), True),
            (DOWN, attrs.evolve(DOWN, withheld=frozenset({1})), True),
            (HEALTHY, attrs.evolve(HEALTHY, name="another", memory_bytes=1, device_nodes=()), True),
            (HEALTHY, attrs.evolve(HEALTHY, withheld=frozenset({1})), False),
            (HEALTHY, attrs.evolve(HEALTHY, shares=3), False),
            (HEALTHY, attrs.evolve(HEALTHY, kept=(7,)), False),
            (HEALTHY, attrs.evolve(HEALTHY, numa_node=0), False),
            (HEALTHY, attrs.evolve(HEALTHY, uuid="GPU-b"), False),
            (HEALTHY, DOWN, False),
        ],
        ids=["reason", "withheld of a GPU that is down", "facts", "withheld", "shares", "kept", "numa", "uuid", "down"],
    )
    def test_content(self, one: Device, other: Device, same: bool) -> None:
        """Equal exactly when the lists are."""
        assert (content([one]) == content([other])) is same
        assert (v1beta1_list([one]) == v1beta1_list([other])) is same
