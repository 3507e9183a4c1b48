"""What a container gets for the shares it was given."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpu.allocation import Allocation, UnhealthyShareError, UnknownShareError, allocate
from sgpu.device import Device, Health
from sgpu.inventory import Inventory

pytestmark = pytest.mark.pure

COMMON = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")


def gpu(uuid: str, minor: int) -> Device:
    return Device(
        uuid=uuid, name="Tesla T4", pci_bus_id="0:3B:0.0", shares=100, device_nodes=(f"nvidia{minor}", *COMMON)
    )


FIRST = gpu("GPU-a", minor=3)
SECOND = gpu("GPU-b", minor=0)
SICK = attrs.evolve(gpu("GPU-c", minor=1), health=Health.UNHEALTHY, reason="XID 79")
SIMULATED = Device(
    uuid="GPU-s", name="simulated GPU 0", pci_bus_id="0:0:0.0", shares=2, device_nodes=(), simulated=True
)


@pytest.fixture
def inventory() -> Inventory:
    """Two GPUs in order, one that failed, and a simulated one."""
    return Inventory([FIRST, SECOND, SICK, SIMULATED])


class TestAllocate:
    def test_one_share(self, inventory: Inventory) -> None:
        """A share brings the nodes of its own GPU, those of all GPUs, the libraries, and says which it is."""
        assert allocate(inventory, ["GPU-a::7"]) == Allocation(
            environment={"SGPU_SHARES": "1", "SGPU_GPU_UUIDS": "GPU-a"},
            device_nodes=("nvidia3", *COMMON),
            libraries=True,
        )

    def test_shares_of_one_gpu(self, inventory: Inventory) -> None:
        """However many shares of a GPU are asked for, it is named once and each node comes once."""
        allocation = allocate(inventory, ["GPU-a::0", "GPU-a::99", "GPU-a::5"])
        assert allocation.environment == {"SGPU_SHARES": "3", "SGPU_GPU_UUIDS": "GPU-a"}
        assert allocation.device_nodes == ("nvidia3", *COMMON)

    def test_shares_of_two_gpus(self, inventory: Inventory) -> None:
        """Shares of several GPUs bring each GPU's node, and those common to all once, in the order asked for."""
        allocation = allocate(inventory, ["GPU-b::0", "GPU-a::0", "GPU-b::1"])
        assert allocation.environment == {"SGPU_SHARES": "3", "SGPU_GPU_UUIDS": "GPU-b,GPU-a"}
        assert allocation.device_nodes == ("nvidia0", *COMMON, "nvidia3")

    def test_simulated(self, inventory: Inventory) -> None:
        """A simulated GPU gives environment variables only, so that pods start on nodes without libraries."""
        assert allocate(inventory, ["GPU-s::0", "GPU-s::1"]) == Allocation(
            environment={"SGPU_SHARES": "2", "SGPU_GPU_UUIDS": "GPU-s", "SGPU_SIMULATED": "1"},
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
            allocate(inventory, asked)
        assert str(refused.value) == f"share {share_id} is not one of this node's"

    def test_unhealthy(self, inventory: Inventory) -> None:
        """A share of a GPU that failed is refused, with the share, the GPU and what is wrong with it."""
        with pytest.raises(UnhealthyShareError) as refused:
            allocate(inventory, ["GPU-a::0", "GPU-c::4"])
        assert str(refused.value) == "share GPU-c::4: GPU GPU-c is unhealthy (XID 79)"

    def test_after_recovery(self, inventory: Inventory) -> None:
        """A GPU that comes back is allocated again."""
        inventory.replace([attrs.evolve(SICK, health=Health.HEALTHY, reason="")])
        assert allocate(inventory, ["GPU-c::4"]).device_nodes == ("nvidia1", *COMMON)

    @settings(deadline=None)
    @given(
        ids=st.lists(
            st.builds("{}::{}".format, st.sampled_from(["GPU-a", "GPU-b"]), st.integers(0, 99)), min_size=1, unique=True
        )
    )
    def test_any_shares(self, ids: list[str]) -> None:
        """Whatever is asked for: nodes and UUIDs are those of the GPUs in question, without repetition."""
        allocation = allocate(Inventory([FIRST, SECOND]), ids)
        uuids = {share_id.partition("::")[0] for share_id in ids}
        assert allocation.environment["SGPU_SHARES"] == str(len(ids))
        assert sorted(allocation.environment["SGPU_GPU_UUIDS"].split(",")) == sorted(uuids)
        expected = {*COMMON, *("nvidia3" for _ in uuids & {"GPU-a"}), *("nvidia0" for _ in uuids & {"GPU-b"})}
        assert sorted(allocation.device_nodes) == sorted(expected)
