"""Which GPU a name stands for, what a cordon withholds, and when a cordoned GPU is released."""

from __future__ import annotations

import attrs
import pytest

from sgpu.node.claims import ClaimedUnit, PreparedClaim
from sgpu.node.container import Container
from sgpu.node.cordon import NoSuchGpuError, find_gpu
from sgpu.node.edits import AllocationOptions, CordonedShareError, HostPaths
from sgpu.node.figures import Figures
from sgpu.node.gpu import Cordon, Gpu, MigInstance
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState

RESOURCE = "example.com/gpu"
POD = Container("team", "one", "main")
OPTIONS = AllocationOptions(HostPaths("/host/nvidia", "/usr/local/nvidia", "/dev"))
SLICE = MigInstance("MIG-1", "A100 MIG 1g.5gb", "1g.5gb", 1000)
FIRST = Gpu("GPU-ab1", "Tesla T4", "00000000:3B:00.0", ("nvidia0",), 1000)
SECOND = Gpu("GPU-ab2", "A100", "00000000:5E:00.0", ("nvidia1",), 8000, mig_mode=True, instances=(SLICE,))
GPUS = (FIRST, SECOND)


@pytest.mark.parametrize(
    "name", ["1", "GPU-ab2", "gpu-AB2", "00000000:5E:00.0", "0000:5e:00.0", "5E:00.0"],
    ids=["place", "UUID", "any case", "NVML's address", "the kernel's", "without a domain"],
)  # fmt: skip
def test_a_name(name: str) -> None:
    """Take a GPU by each way in which `status`, NVML and the kernel name it."""
    assert find_gpu(name, GPUS) is SECOND


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("2", ["GPU-ab1", "GPU-ab2"]),
        ("", ["GPU-ab1", "GPU-ab2"]),
        ("GPU-ab", ["several", "GPU-ab1", "GPU-ab2"]),
        ("0000:5f:00.0", ["GPU-ab1", "GPU-ab2"]),
        ("MIG-1", ["whole GPU", "GPU-ab2"]),
        ("mig-9", ["whole GPU"]),
    ],
)
def test_no_gpu(name: str, said: list[str]) -> None:
    """Say which GPUs there are, or whose an instance is."""
    with pytest.raises(NoSuchGpuError) as caught:
        find_gpu(name, GPUS)
    assert [fact for fact in said if fact not in str(caught.value)] == []
    with pytest.raises(NoSuchGpuError):
        find_gpu(name, ())


@pytest.fixture
def node() -> NodeState:
    """Of two GPUs with 4 shares each, of which the instance has one; a container has share 1 of the first."""
    node = NodeState(Policy(RESOURCE, 4), 5, clock=lambda: 0.0)
    node.set_gpus(GPUS)
    hold(node, Share("GPU-ab1", 1))
    return node


def hold(node: NodeState, *shares: Share) -> None:
    node.set_holders({RESOURCE: dict.fromkeys(shares, POD)})


def cordon(node: NodeState, *gpus: Gpu) -> None:
    node.set_cordoned({gpu.uuid: attrs.evolve(gpu, cordon=Cordon("bad row", 7.0)) for gpu in gpus})
    node.release_free()


def healthy(node: NodeState) -> set[str]:
    """The shares that the kubelet may give away, or has given away."""
    offers = node.offered(RESOURCE)
    pairs = [pair for offer in offers for pair in zip(offer.share_ids(), offer.share_health(), strict=True)]
    return {share for share, health in pairs if health.value == "Healthy"}


def released(node: NodeState) -> set[str]:
    return {uuid for uuid, gpu in node.cordoned.items() if gpu.cordon and gpu.cordon.released}


def test_free_shares_are_withheld(node: NodeState) -> None:
    """Those of the cordoned GPU, also one that is given back later; none of them is handed out."""
    cordon(node, FIRST)
    assert healthy(node) == {"GPU-ab1::1", "MIG-1::0"}
    with pytest.raises(CordonedShareError, match="bad row"):
        node.allocate(RESOURCE, [["GPU-ab1::2"]], OPTIONS)
    hold(node)
    assert healthy(node) == {"MIG-1::0"}
    node.set_cordoned({})
    assert len(healthy(node)) == 5


def test_unknown_holders(node: NodeState) -> None:
    """While nobody knows which shares are free, all are withheld, and the GPU is not released."""
    node.set_holders(None)
    cordon(node, FIRST)
    assert healthy(node) == {"MIG-1::0"}
    assert released(node) == set()


def test_released(node: NodeState) -> None:
    """A GPU is released when nobody has a share of it any more, and stays so whatever the kubelet lists then."""
    cordon(node, FIRST)
    assert released(node) == set()
    hold(node)
    assert released(node) == {"GPU-ab1"}
    hold(node, Share("GPU-ab1", 1))
    assert released(node) == {"GPU-ab1"}


def test_a_share_given_moments_ago(node: NodeState) -> None:
    """One that the kubelet does not list yet counts."""
    node.allocate(RESOURCE, [["MIG-1::0"]], OPTIONS)
    cordon(node, SECOND)
    assert released(node) == set()


@pytest.mark.parametrize("gone", [False, True], ids=["there", "destroyed meanwhile"])
def test_an_instance(node: NodeState, gone: bool) -> None:
    """A GPU is not free while a container has a share of an instance of it."""
    hold(node, Share("MIG-1", 0))
    if gone:
        node.set_gpus((FIRST, attrs.evolve(SECOND, instances=())))
    cordon(node, *GPUS)
    assert released(node) == {"GPU-ab1"}


def test_a_claim(node: NodeState) -> None:
    """Nor while a claim of it is prepared, whose container has not started."""
    hold(node)
    node.set_claims({"1": PreparedClaim("1", "team", "c", (), (ClaimedUnit("s", "GPU-ab1", RESOURCE, ()),))})
    cordon(node, *GPUS)
    assert released(node) == {"GPU-ab2"}


def test_until_it_was_looked_at(node: NodeState) -> None:
    """An uncordoned GPU is offered when the driver's process has opened it again: it may be gone."""
    node.set_gpus((attrs.evolve(FIRST, left_alone=True), SECOND))
    assert healthy(node) == {"GPU-ab1::1", "MIG-1::0"}
    with pytest.raises(CordonedShareError):
        node.allocate(RESOURCE, [["GPU-ab1::2"]], OPTIONS)
    node.set_gpus(GPUS)
    assert len(healthy(node)) == 5


def test_beside_full_memory(node: NodeState) -> None:
    """A cordon and full memory do not get into each other's way."""
    node.usage.set_figures({"MIG-1": Figures(memory_total=100, memory_free=1)}, 0)
    node.update_pressure(0.9)
    cordon(node, FIRST)
    assert healthy(node) == {"GPU-ab1::1"}


@pytest.mark.parametrize("simulated", [True, False])
def test_a_simulated_gpu(simulated: bool) -> None:
    """No process has a simulated one open; a real one is released when the driver's process says so."""
    node = NodeState(Policy(RESOURCE, 4), 5, clock=lambda: 0.0)
    node.set_gpus((attrs.evolve(FIRST, simulated=simulated),))
    hold(node)
    cordon(node, FIRST)
    assert released(node) == {"GPU-ab1"}
    assert node.gpus[0].released is simulated
