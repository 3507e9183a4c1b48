"""Offers of each unit, from GPUs, rules, held shares and pressure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.node.gpu import Gpu, Health, units
from sgpu.node.offers import Offer, offers
from sgpu.node.policy import Policy, Rule
from sgpu.node.shares import Share

pytestmark = pytest.mark.pure

SHARED = "example.com/shared-gpu"
WHOLE = "example.com/whole-gpu"


def gpu(letter: str, health: Health = Health.HEALTHY) -> Gpu:
    return Gpu(f"GPU-{letter}", "Tesla T4", "00000000:3B:00.0", (), health=health)


def offer(letter: str, shares: int = 3, retained: tuple[int, ...] = (), withheld: Collection[int] = ()) -> Offer:
    return Offer(units(gpu(letter))[0], shares, retained, frozenset(withheld))


def parse(text: str) -> list[Share]:
    """`a0 b1` → share 0 of GPU-a and share 1 of GPU-b."""
    return [Share(f"GPU-{word[0]}", int(word[1:])) for word in text.split()]


A, B = gpu("a"), gpu("b")
WHOLE_B = Rule("f:1", uuid="GPU-b", shares=1, resource=WHOLE)


class TestOffer:
    def test_share_ids(self) -> None:
        """Shares are numbered from 0; those that are retained come after them."""
        assert offer("a", 2, (5, 12)).share_ids() == ["GPU-a::0", "GPU-a::1", "GPU-a::5", "GPU-a::12"]

    @pytest.mark.parametrize(
        ("health", "withheld", "letters"),
        [
            *((Health.HEALTHY, (), "HHH"), (Health.UNHEALTHY, (), "UUU"), (Health.HEALTHY, (0,), "UHH")),
            *((Health.HEALTHY, (0, 7), "UHU"), (Health.UNHEALTHY, (1,), "UUU"), (Health.HEALTHY, (3, 99), "HHH")),
        ],
    )
    def test_share_health(self, health: Health, withheld: tuple[int, ...], letters: str) -> None:
        """Each share is as healthy as its GPU, unless it is withheld. The order is that of the ids."""
        made = Offer(units(gpu("a", health))[0], 2, (7,), frozenset(withheld))
        assert "".join(each.name[0] for each in made.share_health()) == letters

    def test_has(self) -> None:
        """It has the shares below its number and those that are retained."""
        made = offer("a", 2, (5,))
        assert [number for number in range(9) if made.has(Share("GPU-a", number))] == [0, 1, 5]

    @pytest.mark.parametrize(
        ("allocated", "withheld"),
        [
            *(("", {0, 1, 2, 7}), ("a1 a7", {0, 2}), ("b1", {0, 1, 2, 7}), ("a0 a1 a2 a7 a9", set())),
        ],
    )
    def test_withhold(self, allocated: str, withheld: set[int]) -> None:
        """The free shares are withheld, retained ones included, and never an allocated one."""
        assert offer("a", 3, (7,)).withhold(parse(allocated)) == offer("a", 3, (7,), withheld)

    @given(allocated=st.sets(st.builds(Share, st.sampled_from(["GPU-a", "GPU-b"]), st.integers(0, 5))))
    def test_never_allocated(self, allocated: set[Share]) -> None:
        """Each share is either allocated or withheld."""
        withheld = {Share("GPU-a", number) for number in offer("a", 6).withhold(allocated).withheld}
        assert withheld == {Share("GPU-a", number) for number in range(6)} - allocated


class TestOffers:
    def test_all_alike(self) -> None:
        """Without a rule all GPUs are offered alike, in their order."""
        assert offers(Policy(SHARED, 4), [B, A], {}) == {SHARED: (offer("b", 4), offer("a", 4))}

    def test_each_resource(self) -> None:
        """Every resource of the policy is there, with the GPUs that the rules give it or with none."""
        policy = Policy(SHARED, 4, (WHOLE_B, Rule("f:2", uuid="GPU-x", resource="example.com/none")))
        assert offers(policy, [A, B], {}) == {SHARED: (offer("a", 4),), WHOLE: (offer("b", 1),), "example.com/none": ()}
        assert offers(policy, [], {}) == {SHARED: (), WHOLE: (), "example.com/none": ()}

    @pytest.mark.parametrize(
        ("held", "retained"),
        [
            pytest.param({SHARED: "a11 a9 a4 a0 a3"}, {"GPU-a": (4, 9, 11)}, id="beyond the number, in order"),
            pytest.param({WHOLE: "b0 b1"}, {"GPU-b": (1,)}, id="beyond the number of a rule"),
            pytest.param({SHARED: "b5"}, {}, id="of a GPU that is offered under another name now"),
            pytest.param({SHARED: "b5", WHOLE: "b7"}, {"GPU-b": (7,)}, id="under both names"),
            pytest.param({SHARED: "x9", "example.com/gone": "a9"}, {}, id="of no GPU or no resource of this node"),
        ],
    )
    def test_retained(self, held: Mapping[str, str], retained: Mapping[str, tuple[int, ...]]) -> None:
        """Shares that containers have of a unit stay known under the same resource when there are fewer now."""
        shares = {resource: parse(text) for resource, text in held.items()}
        made = offers(Policy(SHARED, 4, (WHOLE_B,)), [A, B], shares)
        assert {each.unit.uuid: each.retained for each in (*made[SHARED], *made[WHOLE]) if each.retained} == retained

    def test_withheld(self) -> None:
        """Only units under pressure withhold shares, and only the free ones."""
        held = parse("a1 a5")
        made = offers(Policy(SHARED, 3, (WHOLE_B,)), [A, B], {SHARED: held}, {"GPU-a", "GPU-x"}, held)
        assert made == {SHARED: (offer("a", 3, (5,), {0, 2}),), WHOLE: (offer("b", 1),)}

    @pytest.mark.parametrize(
        ("held", "withheld"),
        [
            pytest.param({SHARED: (), WHOLE: ()}, [{0, 1, 2}, {0}], id="both listed"),
            pytest.param({SHARED: ()}, [{0, 1, 2}, set()], id="one not listed yet"),
        ],
    )
    def test_withheld_if_listed(self, held: Mapping[str, Collection[Share]], withheld: list[set[int]]) -> None:
        """Shares are withheld only of resources whose holders are known."""
        made = offers(Policy(SHARED, 3, (WHOLE_B,)), [A, B], held, {"GPU-a", "GPU-b"})
        assert [each.withheld for each in (*made[SHARED], *made[WHOLE])] == withheld
