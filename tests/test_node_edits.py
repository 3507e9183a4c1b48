"""Edits to a container for its shares."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.node.edits import (
    FRAMEWORK_HINTS,
    IGNORED_BY_NVIDIA_RUNTIME,
    AllocationOptions,
    ContainerEdits,
    DeviceNode,
    HostPaths,
    Mount,
    NotDistinctError,
    claim_edits,
    container_edits,
)
from sgpu.node.gpu import Gpu, units
from sgpu.node.offers import Offer
from sgpu.node.rank import MultiShare

pytestmark = pytest.mark.pure

COMMON = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
PATHS = HostPaths(libraries="/host/nvidia", libraries_in_container="/usr/local/nvidia", devices="/host/dev")
PLAIN = AllocationOptions(PATHS, framework_hints=False)


def offer(letter: str, minor: int = 0, shares: int = 100, memory: int | None = 15_000) -> Offer:
    gpu = Gpu(f"GPU-{letter}", "Tesla T4", "0:3B:0.0", (f"nvidia{minor}", *COMMON), memory)
    return Offer(units(gpu)[0], shares)


A, B = offer("a", minor=3), offer("b")
SIMULATED = Offer(units(Gpu("GPU-s", "simulated GPU 0", "0:0:0.0", (), simulated=True))[0], 2)


def environment(*allocated: Offer, options: AllocationOptions = PLAIN) -> dict[str, str]:
    """Return the container's environment, without the variable for NVIDIA's runtime."""
    edits = container_edits(allocated, options)
    return {name: value for name, value in edits.environment.items() if name not in IGNORED_BY_NVIDIA_RUNTIME}


def nodes(*allocated: Offer) -> list[str]:
    return [node.container_path.removeprefix("/dev/") for node in container_edits(allocated, PLAIN).device_nodes]


class TestContainerEdits:
    def test_one_share(self) -> None:
        """A share brings the nodes of its GPU and those of all GPUs, the libraries, and facts about itself."""
        assert container_edits([A], PLAIN) == ContainerEdits(
            environment={
                "SGPU_SHARES": "1",
                "SGPU_GPU_UUIDS": "GPU-a",
                "SGPU_MEMORY_BYTES": "150",
                "NVIDIA_VISIBLE_DEVICES": "void",
            },
            device_nodes=tuple(DeviceNode(f"/host/dev/{node}", f"/dev/{node}") for node in ("nvidia3", *COMMON)),
            mounts=(Mount("/host/nvidia", "/usr/local/nvidia"),),
        )

    def test_several_shares(self) -> None:
        """Each GPU is named once and each node comes once, in the order asked for, however many shares there are."""
        assert environment(B, A, B) == {
            "SGPU_SHARES": "3",
            "SGPU_GPU_UUIDS": "GPU-b,GPU-a",
            "SGPU_MEMORY_BYTES": "450",
            "SGPU_MEMORY_BYTES_0": "300",
            "SGPU_MEMORY_BYTES_1": "150",
        }
        assert nodes(B, A, B) == ["nvidia0", *COMMON, "nvidia3"]

    def test_simulated(self) -> None:
        """A simulated GPU brings environment variables only, so that pods start on nodes without libraries."""
        assert container_edits([SIMULATED, SIMULATED], AllocationOptions(PATHS)) == ContainerEdits(
            environment={
                "SGPU_SHARES": "2",
                "SGPU_GPU_UUIDS": "GPU-s",
                "SGPU_SIMULATED": "1",
                "NVIDIA_VISIBLE_DEVICES": "void",
            },
            device_nodes=(),
            mounts=(),
        )

    @given(allocated=st.lists(st.sampled_from([A, B]), min_size=1))
    def test_any_shares(self, allocated: list[Offer]) -> None:
        """Nodes and UUIDs are those of the GPUs in question, without repetition."""
        assert environment(*allocated)["SGPU_SHARES"] == str(len(allocated))
        named = environment(*allocated)["SGPU_GPU_UUIDS"].split(",")
        assert sorted(named) == sorted({each.unit.uuid for each in allocated})
        assert sorted(nodes(*allocated)) == sorted({node for each in allocated for node in each.unit.device_nodes})


class TestMemory:
    @pytest.mark.parametrize(
        ("allocated", "part"),
        [
            pytest.param([offer("a", shares=1)], "15000", id="the whole GPU"),
            pytest.param([offer("a", shares=3, memory=100)], "33", id="rounded down"),
            pytest.param([offer("a", shares=3, memory=100)] * 2, "66", id="two thirds, not twice a third"),
            pytest.param(
                [offer("a", 0, 10, 1000), offer("b", 1, 2, 80), offer("a", 0, 10, 1000)], "240", id="several GPUs"
            ),
            pytest.param([offer("a", memory=0)], "0", id="a GPU without memory of its own"),
            pytest.param([offer("a", memory=None)], None, id="unknown"),
            pytest.param([B, offer("a", memory=None)], None, id="unknown of one GPU"),
        ],
    )
    def test_part(self, allocated: list[Offer], part: str | None) -> None:
        """A container is told the part of the memory that its shares stand for, or nothing where that is unknown."""
        assert environment(*allocated).get("SGPU_MEMORY_BYTES") == part

    @given(memory=st.integers(0, 2**40), shares=st.integers(1, 200))
    def test_all_containers_together(self, memory: int, shares: int) -> None:
        """However the shares are divided, the parts never add up to more than the GPU has."""
        made = offer("a", 0, shares, memory)
        one = int(environment(made)["SGPU_MEMORY_BYTES"])
        assert one * shares <= int(environment(*[made] * shares)["SGPU_MEMORY_BYTES"]) == memory


class TestOptions:
    @pytest.mark.parametrize("memory", [15_000, None], ids=["memory known", "memory unknown"])
    def test_framework_hints(self, memory: int | None) -> None:
        """TensorFlow and JAX are kept from taking a whole GPU, unless that is switched off."""
        made = offer("a", memory=memory)
        assert environment(made, options=AllocationOptions(PATHS)) == {
            **environment(made),
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        assert not FRAMEWORK_HINTS.keys() & environment(made).keys()

    @pytest.mark.parametrize(
        ("allocated", "distinct"),
        [
            *(([], True), ([A], True), ([A, B], True), ([A, A], False), ([A, B, A], False)),
        ],
    )
    def test_strict_distinct(self, allocated: list[Offer], distinct: bool) -> None:
        """Shares of one container that are not all of different GPUs are refused where the operator wants that."""
        strict = attrs.evolve(PLAIN, multi_share=MultiShare.STRICT_DISTINCT)
        if distinct:
            assert container_edits(allocated, strict) == container_edits(allocated, PLAIN)
        else:
            with pytest.raises(NotDistinctError, match="-multi-share strict-distinct"):
                container_edits(allocated, strict)


class TestClaimEdits:
    def test_only_device(self) -> None:
        """Beside the variables of shares there are those with the unit's name, and all else is as with a share."""
        edits = claim_edits(A, 2, 5000, PLAIN, hints=True, only=True)
        own = {"SGPU_SHARES_GPU_A": "2", "SGPU_MEMORY_BYTES_GPU_A": "5000"}
        sums = {"SGPU_SHARES": "2", "SGPU_MEMORY_BYTES": "5000", "SGPU_GPU_UUIDS": "GPU-a"}
        assert edits.environment == own | sums | IGNORED_BY_NVIDIA_RUNTIME | FRAMEWORK_HINTS
        share = container_edits([A], PLAIN)
        assert (edits.device_nodes, edits.mounts) == (share.device_nodes, share.mounts)

    def test_one_of_several(self) -> None:
        """Two devices of a claim set no variable to different values: one of the edits would win."""
        both = [claim_edits(each, 1, None, PLAIN, hints=False, only=False).environment for each in (A, B)]
        common = both[0].keys() & both[1].keys()
        assert {name: both[0][name] for name in common} == {name: both[1][name] for name in common}
        assert both[0].keys() - common == {"SGPU_SHARES_GPU_A"}
