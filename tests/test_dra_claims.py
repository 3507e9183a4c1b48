"""A claim and the node's offers → what to prepare."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import pytest
from dra_claims import NODE, RESOURCE, claim, result, sharing

from sgpu.dra.claims import ClaimError, Grant, grant, read_claim
from sgpu.dra.slices import Object
from sgpu.node.claims import Pod, PreparedClaim
from sgpu.node.gpu import Cordon, Gpu, Health
from sgpu.node.offers import Offers, offers
from sgpu.node.policy import Policy
from sgpu.node.shares import Share

pytestmark = pytest.mark.pure

GIB = 1 << 30
A, B = (Gpu(f"GPU-{letter}", "T4", "0:3B:0.0", (), 16 * GIB) for letter in "ab")
OFFERS = offers(Policy(RESOURCE, 10), (A, B), {})
MEMORY = {"shares": "2", "memory": "4Gi"}


def granted(
    thing: Object, others: Sequence[PreparedClaim] = (), offered: Offers = OFFERS
) -> tuple[PreparedClaim, Sequence[Grant]]:
    return grant(read_claim(thing, thing["metadata"]["uid"], NODE), offered, others)


def test_shares_and_memory() -> None:
    """A claim gets what it consumes, for the pods that it is reserved for; other drivers' devices are left out."""
    other = result("GPU-x", driver="net.example.com", pool="x")
    prepared, (grant,) = granted(claim(result("GPU-a", consumedCapacity=MEMORY), other))
    assert prepared.pods == (Pod("p-1", "p"),)
    assert prepared.units == (grant.unit,)
    assert grant.unit.shares == (Share("GPU-a", 0), Share("GPU-a", 1))
    assert (grant.unit.memory, grant.unit.limited, grant.unit.resource) == (4 * GIB, True, RESOURCE)


def test_several_devices() -> None:
    """Each has its request, its shares and its configuration; shares of one GPU are not the same."""
    config = [sharing("FromClass", ("two",), memoryLimit="Off")]
    results = (result("GPU-a", "1", "one"), result("GPU-b", "2", "two/big"), result("GPU-a", "3", "three"))
    prepared, grants = granted(claim(*results, config=config))
    assert [each.result.request for each in grants] == ["one", "two", "three"]
    assert [str(share) for unit in prepared.units for share in unit.shares] == ["GPU-a::0", "GPU-b::0", "GPU-a::1"]
    assert [unit.limited for unit in prepared.units] == [True, False, True]


def test_again_and_beside_others() -> None:
    """A claim keeps its shares when it is prepared once more, and no two have one."""
    first, _ = granted(claim(result("GPU-a", "1"), uid="1"))
    second, _ = granted(claim(result("GPU-a", "2"), uid="2"), [first])
    assert second.units[0].shares == (Share("GPU-a", 1),)
    assert granted(claim(result("GPU-a", "2"), uid="2"), [second]) == granted(
        claim(result("GPU-a", "2"), uid="2"), [first, second]
    )
    third, _ = granted(claim(result("GPU-a", "3"), uid="3"), [second])
    assert third.units[0].shares == (Share("GPU-a", 0),)


def test_admin_access() -> None:
    """A monitoring pod sees the GPU and takes nothing of it."""
    prepared, (grant,) = granted(claim(result("GPU-a", adminAccess=True, shareID=None, consumedCapacity=None)))
    assert prepared.units == ()
    assert grant.unit.shares == ()
    assert grant.result.share_id == "gpu-a"


FAULTY = attrs.evolve(A, health=Health.UNHEALTHY, reason="XID 79")


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        pytest.param(claim(uid="u-2"), "another one .uid u-2. has its name", id="another claim"),
        pytest.param(claim(allocation=None), "not allocated any more", id="not allocated"),
        pytest.param(claim(result("GPU-a", pool="node-b")), "in the pool node-b, and this node's is node-a", id="pool"),
        pytest.param(claim(result("GPU-a", shareID=None)), "DRAConsumableCapacity is off", id="exclusive"),
        pytest.param(claim(result("GPU-a", consumedCapacity=None)), "DRAConsumableCapacity is off", id="no capacity"),
        pytest.param(claim(result("GPU-a", consumedCapacity={"shares": "x"})), "'x' is not an amount", id="amount"),
        pytest.param(claim({"driver": "gpu.deepomatic.com"}), "not what resource.k8s.io/v1 has: KeyError", id="fields"),
        pytest.param({"metadata": None}, "TypeError", id="no metadata"),
        pytest.param(claim(result("GPU-a"), config=[sharing(limit=1)]), "no field 'limit'", id="configuration"),
        pytest.param(claim(result("GPU-c")), "GPU GPU-c is gone from this node", id="GPU is gone"),
    ],
)
def test_refused(thing: Object, message: str) -> None:
    """The reason goes into the pod's events."""
    with pytest.raises(ClaimError, match=message):
        grant(read_claim(thing, "u-1", NODE), OFFERS, [])


def test_unhealthy() -> None:
    """A claim of a faulty GPU is not prepared: the kubelet tries again."""
    with pytest.raises(ClaimError, match=r"GPU-a is unhealthy \(XID 79\)"):
        granted(claim(result("GPU-a")), offered=offers(Policy(RESOURCE, 10), (FAULTY,), {}))


def test_cordoned() -> None:
    """A claim of a cordoned GPU is not prepared, unless it was before: its container restarts."""
    prepared, _ = granted(claim(result("GPU-a")))
    cordoned = offers(Policy(RESOURCE, 10), (attrs.evolve(A, cordon=Cordon("bad row", 1)),), {})
    with pytest.raises(ClaimError, match=r"GPU-a is cordoned: bad row"):
        granted(claim(result("GPU-a")), offered=cordoned)
    assert granted(claim(result("GPU-a")), [prepared], cordoned)[0] == prepared
