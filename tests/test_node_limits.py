"""The memory that a container may use: its part of a unit, by its shares."""

from __future__ import annotations

import pytest

from sgpu.node.cgroup_limit import Target
from sgpu.node.container import Container
from sgpu.node.gpu import Gpu, MigInstance, units, without
from sgpu.node.limits import PodCgroups, WantedLimits, allowed_by_container, allowed_memory, merged, pod_limits
from sgpu.node.offers import Offer
from sgpu.node.shares import Share

pytestmark = pytest.mark.pure

MAIN = Container("team", "trainer", "main")
OTHER = Container("team", "trainer", "sidecar")


def offer(letter: str = "a", memory: int | None = 1000, factor: float = 1.0, shares: int = 8) -> Offer:
    return Offer(units(Gpu(f"GPU-{letter}", "T4", "0:3B:0.0", (), memory))[0], shares, limit_factor=factor)


@pytest.mark.parametrize(
    ("memory", "factor", "shares", "allowed"),
    [
        pytest.param(1000, 1, 1, 125, id="fair"),
        pytest.param(1000, 1, 3, 375, id="several shares"),
        pytest.param(1000, 1.5, 2, 375, id="burst"),
        pytest.param(1000, 5, 4, 1000, id="at most all"),
        pytest.param(1000, 1, 9, 1000, id="retained shares, more than there are"),
        pytest.param(1000, 0, 2, 250, id="off"),
        pytest.param(1003, 1, 1, 125, id="rounded down"),
        pytest.param(None, 1, 1, None, id="unknown"),
    ],
)
def test_allowed_memory(memory: int | None, factor: float, shares: int, allowed: int | None) -> None:
    """A container may use the part of its shares, or a multiple of that."""
    assert allowed_memory(offer(memory=memory, factor=factor), shares) == allowed


def test_claimed_memory() -> None:
    """What a claim names is what its container may use, beside the fair part of other shares, and at most all."""
    shares = [Share("GPU-a", number) for number in range(4)]
    amounts = {shares[0]: 300, shares[1]: 0, shares[3]: 2000}
    holders = dict(zip(shares, (MAIN, MAIN, MAIN, OTHER), strict=True))
    assert allowed_by_container([offer()], holders, amounts) == {"GPU-a": {MAIN: 425, OTHER: 1000}}


def test_by_container() -> None:
    """Shares of one unit add up; each unit and each container counts by itself."""
    holders = {Share("GPU-a", 0): MAIN, Share("GPU-a", 5): MAIN, Share("GPU-b", 0): MAIN, Share("GPU-a", 1): OTHER}
    holders |= {Share("MIG-a", 1): MAIN}
    instance = MigInstance("MIG-a", "A100 MIG 1g.5gb", "1g.5gb", 40)
    (unit,) = units(Gpu("GPU-p", "A100", "0:3B:0.0", (), 400, mig_mode=True, instances=(instance,)))
    gone = {Share("GPU-x", 0): MAIN, Share("GPU-c", 0): MAIN, Share("GPU-d", 1): MAIN}
    left = Offer(without(offer("d").unit, 0.0), 0, (1,))
    offers = [offer("a"), offer("b", 80), offer("c", None), Offer(unit, 4), left]
    assert allowed_by_container(offers, holders | gone) == {
        "GPU-a": {MAIN: 250, OTHER: 125},
        "GPU-b": {MAIN: 10},
        "MIG-a": {MAIN: 10},
    }


class TestPodLimits:
    A, B = offer("a"), offer("b", factor=0)
    MIB = 1 << 20

    @staticmethod
    def wanted(
        *offers: Offer, shares: dict[str, list[Share]], names: dict[str, Container], containers: tuple[str, ...]
    ) -> WantedLimits:
        pod = PodCgroups("1", "/pod1", {name: f"/pod1/{name}" for name in containers})
        return pod_limits(offers, pod, shares, names)

    def test_pod_and_containers(self) -> None:
        """A pod may use what its containers may together, each container its own part; one that is unknown the most."""
        card = offer("a", memory=8 * 100 * self.MIB)
        made = self.wanted(
            card,
            self.B,
            shares={"main": [Share("GPU-a", 0), Share("GPU-a", 1)], "sidecar": [Share("GPU-a", 1), Share("GPU-b", 0)]},
            names={"m": MAIN, "s": OTHER},
            containers=("m", "s", "pause"),
        )
        sizes = {"/pod1": 200, "/pod1/m": 200, "/pod1/s": 100, "/pod1/pause": 200}
        assert made.hard == {Target("GPU-a", cgroup): size * self.MIB for cgroup, size in sizes.items()}
        assert made.containers == {Target("GPU-a", "/pod1/m"): MAIN, Target("GPU-a", "/pod1/s"): OTHER}
        assert made.pods == dict.fromkeys([Share("GPU-a", 0), Share("GPU-a", 1), Share("GPU-b", 0)], ("/pod1",))

    @pytest.mark.parametrize(
        ("card", "size"),
        [
            pytest.param(offer(memory=8 * 1024 * 1024 * 3 // 2), 1, id="whole MiB"),
            pytest.param(offer(memory=8), 1, id="at least one"),
            pytest.param(offer(memory=None), None, id="unknown"),
        ],
    )
    def test_size(self, card: Offer, size: int | None) -> None:
        """Limits are whole MiB, never none; where the memory is unknown there is no limit."""
        made = self.wanted(card, shares={"main": [Share("GPU-a", 0)]}, names={}, containers=())
        assert made.hard == ({} if size is None else {Target("GPU-a", "/pod1"): size * self.MIB})

    def test_other_container(self) -> None:
        """A container of a pod that is known and has no share may use as much as any, should it get at the GPU."""
        shares = {"main": [Share("GPU-a", 0)]}
        third = Container("team", "trainer", "third")
        made = self.wanted(offer(memory=8 * self.MIB), shares=shares, names={"t": third}, containers=("t",))
        assert made.hard == dict.fromkeys([Target("GPU-a", "/pod1"), Target("GPU-a", "/pod1/t")], self.MIB)
        assert not made.containers

    def test_merged(self) -> None:
        """Limits of several pods count together; a share that two have, by one claim, is of both."""
        shared, own = Share("GPU-a", 0), Share("GPU-a", 1)
        one = self.wanted(self.A, shares={"main": [shared]}, names={"m": MAIN}, containers=("m",))
        two = pod_limits([self.A], PodCgroups("2", "/pod2"), {"main": [shared, own]}, {})
        both = merged([one, two])
        assert both.hard == {**one.hard, **two.hard}
        assert both.containers == one.containers
        assert both.pods == {shared: ("/pod1", "/pod2"), own: ("/pod2",)}
