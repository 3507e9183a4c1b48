"""What a container gets for the shares it was given."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpu.allocation import (
    FRAMEWORK_HINTS,
    Allocation,
    NotDistinctError,
    Rules,
    UnhealthyShareError,
    UnknownShareError,
    allocate,
)
from sgpu.device import Device, Health
from sgpu.inventory import Inventory

pytestmark = pytest.mark.pure

COMMON = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
PLAIN = Rules(framework_hints=False, strict_distinct=False)
HINTS = Rules(framework_hints=True, strict_distinct=False)
STRICT = Rules(framework_hints=False, strict_distinct=True)


def gpu(uuid: str, minor: int, shares: int = 100, memory: int | None = 15_000) -> Device:
    return Device(
        uuid=uuid,
        name="Tesla T4",
        pci_bus_id="0:3B:0.0",
        shares=shares,
        device_nodes=(f"nvidia{minor}", *COMMON),
        memory_bytes=memory,
    )


FIRST = gpu("GPU-a", minor=3)
SECOND = gpu("GPU-b", minor=0)
UNIFIED = gpu("GPU-u", minor=5, memory=None)
SICK = attrs.evolve(gpu("GPU-c", minor=1), health=Health.UNHEALTHY, reason="XID 79")
SIMULATED = Device(
    uuid="GPU-s", name="simulated GPU 0", pci_bus_id="0:0:0.0", shares=2, device_nodes=(), simulated=True
)


@pytest.fixture
def inventory() -> Inventory:
    """Two GPUs in order, one that failed, a simulated one, and one that does not tell its memory."""
    return Inventory([FIRST, SECOND, SICK, SIMULATED, UNIFIED])


class TestAllocate:
    def test_one_share(self, inventory: Inventory) -> None:
        """A share brings the nodes of its own GPU, those of all GPUs, the libraries, and says which it is."""
        assert allocate(inventory, ["GPU-a::7"], PLAIN) == Allocation(
            environment={
                "SGPU_SHARES": "1",
                "SGPU_GPU_UUIDS": "GPU-a",
                "NVIDIA_VISIBLE_DEVICES": "void",
                "SGPU_MEMORY_BYTES": "150",
            },
            device_nodes=("nvidia3", *COMMON),
            libraries=True,
        )

    def test_shares_of_one_gpu(self, inventory: Inventory) -> None:
        """However many shares of a GPU are asked for, it is named once and each node comes once."""
        allocation = allocate(inventory, ["GPU-a::0", "GPU-a::99", "GPU-a::5"], PLAIN)
        assert allocation.environment == {
            "SGPU_SHARES": "3",
            "SGPU_GPU_UUIDS": "GPU-a",
            "NVIDIA_VISIBLE_DEVICES": "void",
            "SGPU_MEMORY_BYTES": "450",
        }
        assert allocation.device_nodes == ("nvidia3", *COMMON)

    def test_shares_of_two_gpus(self, inventory: Inventory) -> None:
        """Shares of several GPUs bring each GPU's node, and those common to all once, in the order asked for."""
        allocation = allocate(inventory, ["GPU-b::0", "GPU-a::0", "GPU-b::1"], PLAIN)
        assert allocation.environment == {
            "SGPU_SHARES": "3",
            "SGPU_GPU_UUIDS": "GPU-b,GPU-a",
            "NVIDIA_VISIBLE_DEVICES": "void",
            "SGPU_MEMORY_BYTES": "450",
        }
        assert allocation.device_nodes == ("nvidia0", *COMMON, "nvidia3")

    def test_simulated(self, inventory: Inventory) -> None:
        """A simulated GPU gives environment variables only, so that pods start on nodes without libraries."""
        assert allocate(inventory, ["GPU-s::0", "GPU-s::1"], HINTS) == Allocation(
            environment={
                "SGPU_SHARES": "2",
                "SGPU_GPU_UUIDS": "GPU-s",
                "NVIDIA_VISIBLE_DEVICES": "void",
                "SGPU_SIMULATED": "1",
            },
            device_nodes=(),
            libraries=False,
        )

    @pytest.mark.parametrize(
        "share_id",
        [
            pytest.param("GPU-a::100", id="one past the last share"),
            pytest.param("GPU-z::0", id="no such GPU"),
            pytest.param("GPU-a", id="not a share"),
            pytest.param("", id="empty"),
        ],
    )
    @pytest.mark.parametrize("position", [0, 1])
    def test_unknown(self, inventory: Inventory, share_id: str, position: int) -> None:
        """One id that is not ours refuses the container, wherever it stands, and is named."""
        asked = ["GPU-a::0"]
        asked.insert(position, share_id)
        with pytest.raises(UnknownShareError) as refused:
            allocate(inventory, asked, PLAIN)
        assert str(refused.value) == f"share {share_id} is not one of this node's"

    def test_unhealthy(self, inventory: Inventory) -> None:
        """A share of a GPU that failed is refused, with the share, the GPU and what is wrong with it."""
        with pytest.raises(UnhealthyShareError) as refused:
            allocate(inventory, ["GPU-a::0", "GPU-c::4"], PLAIN)
        assert str(refused.value) == "share GPU-c::4: GPU GPU-c is unhealthy (XID 79)"

    def test_after_recovery(self, inventory: Inventory) -> None:
        """A GPU that comes back is allocated again."""
        inventory.replace([attrs.evolve(SICK, health=Health.HEALTHY, reason="")])
        assert allocate(inventory, ["GPU-c::4"], PLAIN).device_nodes == ("nvidia1", *COMMON)

    @settings(deadline=None)
    @given(
        ids=st.lists(
            st.builds("{}::{}".format, st.sampled_from(["GPU-a", "GPU-b"]), st.integers(0, 99)), min_size=1, unique=True
        )
    )
    def test_any_shares(self, ids: list[str]) -> None:
        """Whatever is asked for: nodes and UUIDs are those of the GPUs in question, without repetition."""
        allocation = allocate(Inventory([FIRST, SECOND]), ids, PLAIN)
        uuids = {share_id.partition("::")[0] for share_id in ids}
        assert allocation.environment["SGPU_SHARES"] == str(len(ids))
        assert sorted(allocation.environment["SGPU_GPU_UUIDS"].split(",")) == sorted(uuids)
        expected = {*COMMON, *("nvidia3" for _ in uuids & {"GPU-a"}), *("nvidia0" for _ in uuids & {"GPU-b"})}
        assert sorted(allocation.device_nodes) == sorted(expected)


class TestFairPart:
    @pytest.mark.parametrize(
        ("devices", "share_ids", "part"),
        [
            pytest.param([gpu("GPU-a", 0, 100, 15_000)], ["GPU-a::0"], "150", id="one share"),
            pytest.param([gpu("GPU-a", 0, 1, 15_000)], ["GPU-a::0"], "15000", id="the whole GPU"),
            pytest.param([gpu("GPU-a", 0, 3, 100)], ["GPU-a::0"], "33", id="rounded down"),
            pytest.param([gpu("GPU-a", 0, 3, 100)], ["GPU-a::0", "GPU-a::1"], "66", id="two thirds, not twice a third"),
            pytest.param([gpu("GPU-a", 0, 3, 100)], [f"GPU-a::{n}" for n in range(3)], "100", id="all of its shares"),
            pytest.param(
                [gpu("GPU-a", 0, 10, 1000), gpu("GPU-b", 1, 2, 80)],
                ["GPU-a::0", "GPU-b::1", "GPU-a::9"],
                "240",
                id="the sum over GPUs that differ",
            ),
            pytest.param([gpu("GPU-a", 0, 2, 0)], ["GPU-a::0"], "0", id="a GPU that says it has none"),
            pytest.param([gpu("GPU-a", 0, 2, None)], ["GPU-a::0"], None, id="not known"),
            pytest.param(
                [gpu("GPU-a", 0, 2, None), gpu("GPU-b", 1)], ["GPU-b::0", "GPU-a::0"], None, id="not known of one GPU"
            ),
            pytest.param([gpu("GPU-a", 0, 2, None), gpu("GPU-b", 1)], ["GPU-b::0"], "150", id="not known of another"),
        ],
    )
    def test_memory(self, devices: list[Device], share_ids: list[str], part: str | None) -> None:
        """A container is told the part of the memory that its shares stand for, or nothing where that is not known."""
        assert allocate(Inventory(devices), share_ids, PLAIN).environment.get("SGPU_MEMORY_BYTES") == part

    @given(memory=st.integers(0, 2**40), shares=st.integers(1, 200))
    def test_all_containers_together(self, memory: int, shares: int) -> None:
        """However the shares are dealt out, the parts never add up to more than the GPU has."""
        inventory = Inventory([gpu("GPU-a", 0, shares, memory)])
        (one,) = {
            int(allocate(inventory, [share_id], PLAIN).environment["SGPU_MEMORY_BYTES"])
            for share_id in inventory.devices[0].share_ids()
        }
        every = allocate(inventory, inventory.devices[0].share_ids(), PLAIN).environment["SGPU_MEMORY_BYTES"]
        assert one * shares <= int(every) == memory


class TestRules:
    def test_framework_hints(self, inventory: Inventory) -> None:
        """By default, what keeps TensorFlow and JAX from taking a whole GPU; switched off, none of it."""
        assert FRAMEWORK_HINTS == {
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        without = allocate(inventory, ["GPU-a::0"], PLAIN).environment
        assert not FRAMEWORK_HINTS.keys() & without.keys()
        assert allocate(inventory, ["GPU-a::0"], HINTS).environment == {**without, **FRAMEWORK_HINTS}

    def test_hints_where_memory_is_not_known(self, inventory: Inventory) -> None:
        """They do not depend on what the driver tells."""
        assert allocate(inventory, ["GPU-u::0"], HINTS).environment == {
            "SGPU_SHARES": "1",
            "SGPU_GPU_UUIDS": "GPU-u",
            "NVIDIA_VISIBLE_DEVICES": "void",
            **FRAMEWORK_HINTS,
        }

    @pytest.mark.parametrize(
        ("share_ids", "distinct"),
        [
            pytest.param([], True, id="none"),
            pytest.param(["GPU-a::0"], True, id="one"),
            pytest.param(["GPU-a::0", "GPU-b::0"], True, id="of two GPUs"),
            pytest.param(["GPU-a::0", "GPU-a::1"], False, id="of one GPU"),
            pytest.param(["GPU-a::0", "GPU-b::0", "GPU-a::1"], False, id="two of three"),
        ],
    )
    def test_distinct(self, inventory: Inventory, share_ids: list[str], distinct: bool) -> None:
        """Where the operator wants it, shares of one container that are not all of different GPUs are refused."""
        assert allocate(inventory, share_ids, PLAIN).libraries
        if distinct:
            assert allocate(inventory, share_ids, STRICT) == allocate(inventory, share_ids, PLAIN)
        else:
            with pytest.raises(NotDistinctError):
                allocate(inventory, share_ids, STRICT)

    def test_refusal(self, inventory: Inventory) -> None:
        """It says in one line, for the pod's events, which shares, which setting, and what helps."""
        with pytest.raises(NotDistinctError) as refused:
            allocate(inventory, ["GPU-a::0", "GPU-a::7"], STRICT)
        assert str(refused.value) == (
            "shares GPU-a::0, GPU-a::7 are not all of different GPUs, which -multi-share strict-distinct asks for: "
            "ask for fewer, or wait until more GPUs of the node have a free share"
        )

    def test_what_is_unknown_is_told_first(self, inventory: Inventory) -> None:
        """An id that is none is no matter of which GPU it is of."""
        with pytest.raises(UnknownShareError):
            allocate(inventory, ["GPU-z::0", "GPU-z::1"], STRICT)
