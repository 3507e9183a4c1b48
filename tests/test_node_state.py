"""The inputs of the node's state, what is offered because of them, who is woken, and what is handed out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import attrs
import pytest

from sgpu.node.claims import ClaimedUnit, PreparedClaim
from sgpu.node.container import NO_POD, Container
from sgpu.node.edits import (
    AllocationError,
    AllocationOptions,
    HostPaths,
    NotDistinctError,
    UnhealthyShareError,
    UnknownShareError,
    container_edits,
)
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.gpu import Gpu, Health
from sgpu.node.grants import SETTLING_TIME
from sgpu.node.offers import Offer
from sgpu.node.policy import OffersRefusedError, Policy, PolicyConflictError, Rule
from sgpu.node.rank import MultiShare, UnitLoad
from sgpu.node.shares import Share
from sgpu.node.state import NodeState

SHARED = "example.com/shared-gpu"
WHOLE = "example.com/whole-gpu"
WHOLE_B = Rule("f:1", uuid="GPU-b", shares=1, resource=WHOLE)
OPTIONS = AllocationOptions(HostPaths("/host/nvidia", "/usr/local/nvidia", "/dev"))
STRICT = attrs.evolve(OPTIONS, multi_share=MultiShare.STRICT_DISTINCT)
POD = Container("team", "one", "main")
#: More shares of one resource than can be offered.
MANY = 1000


def gpu(letter: str, name: str = "Tesla T4") -> Gpu:
    return Gpu(f"GPU-{letter}", name, "00000000:3B:00.0", (f"nvidia-{letter}",), memory_bytes=1000)


def sick(healthy: Gpu, reason: str = "XID 79") -> Gpu:
    return attrs.evolve(healthy, health=Health.UNHEALTHY, reason=reason)


A, B, C = gpu("a"), gpu("b"), gpu("c", "NVIDIA A100")


def policy(*rules: Rule, shares: int = 4) -> Policy:
    return Policy(SHARED, shares, rules)


def check(offers: Sequence[Offer]) -> None:
    """A front-end's limit. The message is the same whatever the number."""
    if sum(len(offer.share_ids()) for offer in offers) >= MANY:
        raise OffersRefusedError(f"{MANY} are too many")


def hold(node: NodeState, **shares: str) -> None:
    """The kubelet lists `shared="a0 a1"`."""
    resources = {"shared": SHARED, "whole": WHOLE}
    words = {resources[key]: text.split() for key, text in shares.items()}
    node.set_holders({key: {Share(f"GPU-{word[0]}", int(word[1:])): POD for word in words[key]} for key in words})


def fill(node: NodeState, percent: int, *gpus: Gpu) -> None:
    """These GPUs have this much of their memory used."""
    node.usage.set_figures({each.uuid: Figures(memory_total=100, memory_free=100 - percent) for each in gpus}, 0)


def offered(node: NodeState) -> dict[str, dict[str, int]]:
    """Resource → letter of the GPU → shares, retained ones included."""
    return {
        resource: {offer.unit.uuid[-1]: len(offer.share_ids()) for offer in offers}
        for resource, offers in node.offers.items()
    }


def withheld(node: NodeState) -> dict[str, set[int]]:
    """The numbers that are withheld, by letter of the GPU."""
    every = (offer for offers in node.offers.values() for offer in offers)
    return {offer.unit.uuid[-1]: set(offer.withheld) for offer in every if offer.withheld}


def notifies(node: NodeState, change: Callable[[], object]) -> bool:
    """Make a change, and return whether those who wait are woken."""
    changed = node.changed.next
    change()
    assert not node.changed.next.is_set()
    return changed.is_set()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> NodeState:
    """A node that offers A as four shares, and B whole."""
    made = NodeState(policy(WHOLE_B), 5, check, clock)
    made.set_gpus((A, B))
    return made


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """The messages of one level."""
    return [record.getMessage() for record in caplog.records if record.levelno == level]


class TestSetGpus:
    def test_offered(self, node: NodeState) -> None:
        """The rules divide the GPUs. Nothing is offered before there are any, nor under a name the policy lacks."""
        assert NodeState(policy(WHOLE_B), 5).offered(WHOLE) == ()
        assert offered(node) == {SHARED: {"a": 4}, WHOLE: {"b": 1}}
        assert node.offered(WHOLE) is node.offers[WHOLE]
        assert node.offered("example.com/none") == ()

    @pytest.mark.parametrize(
        ("gpus", "news"),
        [
            pytest.param((attrs.evolve(A), attrs.evolve(B)), False, id="equal"),
            pytest.param((attrs.evolve(A, since=9.0), B), False, id="only the time of the last change"),
            pytest.param((sick(A), B), True, id="health"),
            pytest.param((B, A), True, id="order"),
            pytest.param((A,), True, id="one gone"),
            pytest.param((A, B, C), True, id="one added"),
        ],
    )
    def test_changed(self, node: NodeState, gpus: tuple[Gpu, ...], news: bool) -> None:
        """Readers are woken when the GPUs differ, and only then, so that an idle node sends nothing."""
        assert notifies(node, lambda: node.set_gpus(gpus)) is news
        assert node.gpus == gpus
        units = [offer.unit for offers in node.offers.values() for offer in offers]
        assert {unit.uuid: unit.gpu for unit in units} == {each.uuid: each for each in gpus}

    def test_used_while_unhealthy(self, node: NodeState, caplog: pytest.LogCaptureFixture) -> None:
        """The log names who uses a GPU when it becomes unhealthy, once each time, and leaves out unused GPUs."""
        hold(node, shared="a0")
        node.usage.set_owners({"GPU-a": Figures(processes=(ProcessUse(7, 1, 1),))}, {7: None})
        for gpus in ((sick(A), sick(B)), (sick(A, "lost"), B), (A, B), (A, sick(B)), (sick(A), B)):
            node.set_gpus(gpus)
        messages = logged(caplog, logging.WARNING)
        assert len(messages) == 2
        assert all(fact in message for message in messages for fact in ("GPU-a", "team/one", NO_POD))


class TestRefused:
    """Offers that the rules or a front-end refuse."""

    @pytest.mark.parametrize(
        ("rules", "error"),
        [
            pytest.param(policy(WHOLE_B, Rule("f:2", name="*T4*", shares=2)), PolicyConflictError, id="two rules"),
            pytest.param(policy(shares=MANY), OffersRefusedError, id="too many shares"),
            pytest.param(
                policy(Rule("f:2", name="*", shares=MANY, resource=WHOLE)), OffersRefusedError, id="of a rule"
            ),
        ],
    )
    def test_first(self, rules: Policy, error: type[Exception]) -> None:
        """A list that is too long at the start is an error."""
        node = NodeState(rules, 5, check)
        with pytest.raises(error):
            node.set_gpus((A, B))
        assert node.offers == {}

    def test_each_resource(self) -> None:
        """Each resource is checked by itself."""
        node = NodeState(policy(Rule("f:1", uuid="GPU-b", resource=WHOLE), shares=MANY - 1), 5, check)
        node.set_gpus((A, B))
        assert offered(node) == {SHARED: {"a": MANY - 1}, WHOLE: {"b": MANY - 1}}

    @pytest.mark.parametrize(
        ("rules", "fact"),
        [
            pytest.param(policy(Rule("f:1", uuid="GPU-c"), Rule("f:2", name="*A100*")), "GPU-c", id="two rules"),
            pytest.param(policy(shares=MANY - 1), str(MANY), id="too many shares"),
        ],
    )
    def test_later(self, caplog: pytest.LogCaptureFixture, rules: Policy, fact: str) -> None:
        """An added GPU that can't be offered is logged once. Those before it stay offered, with their health.

        It is offered once the rules are put right.
        """
        node = NodeState(rules, 5, check)
        node.set_gpus((A,))
        before = offered(node)
        for gpus in ((A, C), (sick(A), C), (A, C), (sick(A), C)):
            node.set_gpus(gpus)
            assert offered(node) == before
            assert node.offered(SHARED)[0].unit.health is gpus[0].health
        (message,) = logged(caplog, logging.ERROR)
        assert fact in message
        node.set_policy(policy())
        assert offered(node) == {SHARED: {"a": 4, "c": 4}}

    @pytest.mark.parametrize(
        "cure",
        [
            pytest.param(lambda node: node.set_gpus((A,)), id="fewer GPUs"),
            pytest.param(lambda node: node.set_policy(policy(shares=MANY // 3)), id="fewer shares"),
        ],
    )
    def test_again(self, caplog: pytest.LogCaptureFixture, cure: Callable[[NodeState], None]) -> None:
        """It is logged again when it was fine in between."""
        node = NodeState(policy(shares=MANY // 2), 5, check)
        node.set_gpus((A,))
        node.set_gpus((A, B))
        cure(node)
        node.set_gpus((A, B, C, gpu("d")))
        assert len(logged(caplog, logging.ERROR)) == 2

    @pytest.mark.parametrize("kind", ["two rules", "too many retained"])
    def test_what_stays(self, caplog: pytest.LogCaptureFixture, kind: str) -> None:
        """Where even the offers of before would be refused now, they stay, with the GPUs' current health."""
        node = NodeState(policy(Rule("f:1", uuid="GPU-a"), Rule("f:2", pci_bus_id="af:00.0")), 5, check, lambda: 0.0)
        node.set_gpus((A,))
        if kind == "two rules":
            node.set_gpus((sick(attrs.evolve(A, pci_bus_id="00000000:AF:00.0")),))
        else:
            hold(node, shared=" ".join(f"a{number}" for number in range(MANY)))
            node.set_gpus((sick(A),))
        assert offered(node) == {SHARED: {"a": 4}}
        assert len(logged(caplog, logging.ERROR)) == 1
        with pytest.raises(UnhealthyShareError):
            node.allocate(SHARED, [["GPU-a::0"]], OPTIONS)


class TestSetPolicy:
    @pytest.mark.parametrize(
        ("rules", "expected"),
        [
            pytest.param(
                policy(attrs.evolve(WHOLE_B, shares=2), shares=9),
                {SHARED: {"a": 9}, WHOLE: {"b": 2}},
                id="other numbers",
            ),
            pytest.param(
                policy(WHOLE_B, Rule("f:2", uuid="GPU-a", resource="example.com/new")),
                {SHARED: {}, WHOLE: {"b": 1}, "example.com/new": {"a": 4}},
                id="a resource comes",
            ),
            pytest.param(policy(), {SHARED: {"a": 4, "b": 4}}, id="a resource goes"),
        ],
    )
    def test_applied(self, node: NodeState, rules: Policy, expected: dict[str, dict[str, int]]) -> None:
        """New rules apply at once, and wake the readers."""
        assert notifies(node, lambda: node.set_policy(rules))
        assert offered(node) == expected
        assert node.policy is rules

    @pytest.mark.parametrize(
        ("rules", "error"),
        [
            pytest.param(policy(WHOLE_B, Rule("f:2", name="*", shares=2)), PolicyConflictError, id="two rules"),
            pytest.param(policy(shares=MANY), OffersRefusedError, id="too many shares"),
        ],
    )
    def test_refused(self, node: NodeState, rules: Policy, error: type[Exception]) -> None:
        """Rules that can't be applied change nothing, now or later."""
        before, old = offered(node), node.policy

        def refuse() -> None:
            with pytest.raises(error):
                node.set_policy(rules)

        assert not notifies(node, refuse)
        assert (offered(node), node.policy) == (before, old)
        node.set_gpus((A, B, C))
        assert offered(node) == {SHARED: {"a": 4, "c": 4}, WHOLE: {"b": 1}}


def test_unmatched_rules(caplog: pytest.LogCaptureFixture) -> None:
    """Rules that match no GPU are logged together, with their places, once until that changes; not without GPUs."""
    absent, other, present = (
        Rule(f"f:{line}", uuid=f"GPU-{letter}") for line, letter in ((1, "x"), (2, "y"), (3, "a"))
    )
    node = NodeState(policy(), 5)
    node.set_policy(policy(absent, other, present))
    assert logged(caplog, logging.WARNING) == []
    for gpus in ((A,), (sick(A),), (A, gpu("x"), gpu("y")), (A,)):
        node.set_gpus(gpus)
    node.set_policy(policy(other))
    node.set_policy(policy())
    messages = logged(caplog, logging.WARNING)
    assert [[rule for rule in (absent, other, present) if str(rule) in message] for message in messages] == [
        [absent, other],
        [absent, other],
        [other],
    ]


class TestSetHolders:
    def test_fewer_shares(self, node: NodeState) -> None:
        """Shares that containers have stay known when there are fewer now, until they are free."""
        hold(node, shared="a0 a2 a3")
        node.set_policy(policy(WHOLE_B, shares=2))
        assert node.offered(SHARED)[0].share_ids() == ["GPU-a::0", "GPU-a::1", "GPU-a::2", "GPU-a::3"]
        assert notifies(node, partial(hold, node, shared="a3"))
        assert node.offered(SHARED)[0].share_ids() == ["GPU-a::0", "GPU-a::1", "GPU-a::3"]
        node.set_gpus((sick(A), B))
        node.set_holders(None)  # the last list counts as long as there is no other
        assert node.offered(SHARED)[0].share_ids() == ["GPU-a::0", "GPU-a::1", "GPU-a::3"]
        hold(node, shared="")
        assert node.offered(SHARED)[0].share_ids() == ["GPU-a::0", "GPU-a::1"]

    def test_by_resource(self, node: NodeState) -> None:
        """A GPU that is offered under another name now does not retain the shares of the old one."""
        hold(node, shared="a0 a3", whole="b0 b1")
        node.set_policy(policy(Rule("f:1", name="*", shares=1, resource=WHOLE)))
        assert offered(node) == {SHARED: {}, WHOLE: {"a": 1, "b": 2}}
        assert node.loads(SHARED) == {}
        assert [load.allocated for load in node.loads(WHOLE).values()] == [2, 2]

    def test_before_the_gpus(self) -> None:
        """Holders can be known before the GPUs are."""
        node = NodeState(policy(), 5)
        hold(node, shared="a9")
        node.set_gpus((A,))
        assert offered(node) == {SHARED: {"a": 5}}

    def test_no_news(self, node: NodeState) -> None:
        """Holders of shares that are offered anyway, or of no GPU, wake nobody."""
        for shares in ("a0", "a0", "a1", "x7"):
            assert not notifies(node, partial(hold, node, shared=shares))


class TestPressure:
    def test_withheld_and_released(self, node: NodeState) -> None:
        """The free shares of full units are withheld until there is room. Readers are woken once for each change."""
        hold(node, shared="a1")
        for percent, before, now, numbers, news in (
            (95, set(), set(), {}, False),
            (96, set(), {"GPU-a"}, {"a": {0, 2, 3}}, True),
            (96, {"GPU-a"}, {"GPU-a"}, {"a": {0, 2, 3}}, False),
            (90, {"GPU-a"}, set(), {}, True),
            (90, set(), set(), {}, False),
        ):
            fill(node, percent, A)
            changed = node.changed.next
            assert node.update_pressure(0.95) == (before, now)
            assert changed.is_set() is news
            assert withheld(node) == numbers

    def test_holders_change(self, node: NodeState) -> None:
        """A share is withheld when it becomes free, and no longer when a container has it."""
        fill(node, 99, A, B)
        hold(node, shared="a1", whole="b0")
        node.update_pressure(0.95)
        hold(node, shared="a0 a2", whole="")
        assert withheld(node) == {"a": {1, 3}, "b": {0}}

    def test_holders_unknown(self, node: NodeState) -> None:
        """A share in use is never withheld: where it is unknown which are, none is."""
        fill(node, 99, A)
        assert node.update_pressure(0.95) == (set(), set())
        hold(node, shared="a1")
        node.update_pressure(0.95)
        assert notifies(node, lambda: node.set_holders(None))
        assert withheld(node) == {}
        assert node.update_pressure(0.95) == ({"GPU-a"}, set())

    def test_gpus_change(self, node: NodeState) -> None:
        """Shares stay withheld when health changes, and when the GPU was away in between. The same GPUs are no news."""
        hold(node, shared="a1")
        fill(node, 99, A)
        node.update_pressure(0.95)
        for gpus, numbers in (((sick(A), B), {"a": {0, 2, 3}}), ((B,), {}), ((A, B), {"a": {0, 2, 3}})):
            node.set_gpus(gpus)
            assert withheld(node) == numbers
        assert not notifies(node, lambda: node.set_gpus((A, B)))


class TestSetClaims:
    def test_expected(self, node: NodeState) -> None:
        """What new claims take of a GPU is expected to be used, once, until they are given back."""

        def claimed(letter: str, *numbers: int, memory: int = 0) -> PreparedClaim:
            shares = tuple(Share(f"GPU-{letter}", number) for number in numbers)
            return PreparedClaim("", "team", "c", (), (ClaimedUnit("s", f"GPU-{letter}", SHARED, shares, memory),))

        first = {"1": claimed("a", 0, 1, memory=600), "2": claimed("a", 2), "3": claimed("z", 0)}
        assert notifies(node, lambda: node.set_claims(first))
        assert node.claims == first
        assert node.usage.grants.expected_bytes(0) == {"GPU-a": 600 + 250, "GPU-z": 0}
        node.usage.grants.reconcile(())
        node.set_claims({**first, "4": claimed("a", 3)})
        assert node.usage.grants.expected_bytes(0)["GPU-a"] == 600 + 2 * 250
        again = {"5": claimed("a", 0)}  # a share of a claim that is gone
        node.set_claims(again)
        assert node.usage.grants.expected_bytes(0) == {"GPU-a": 250}


class TestAllocate:
    def test_edits(self, node: NodeState) -> None:
        """A container gets what its shares bring, in the order asked for."""
        node.set_policy(policy())
        a, b = node.offered(SHARED)
        (edits,) = node.allocate(SHARED, [["GPU-b::0", "GPU-a::3", "GPU-b::2"]], OPTIONS)
        assert edits == container_edits([b, a, b], OPTIONS)

    @pytest.mark.parametrize("position", [0, 1], ids=["first", "last"])
    @pytest.mark.parametrize(
        ("share_id", "error", "fact"),
        [
            pytest.param("GPU-a::4", UnknownShareError, "GPU-a::4", id="one past the last share"),
            pytest.param("GPU-z::0", UnknownShareError, "GPU-z::0", id="no such GPU"),
            pytest.param("GPU-b::0", UnknownShareError, "GPU-b::0", id="of another resource"),
            pytest.param("GPU-a", UnknownShareError, "GPU-a", id="not a share"),
            pytest.param("", UnknownShareError, "", id="empty"),
            pytest.param("GPU-c::0", UnhealthyShareError, "XID 79", id="of an unhealthy GPU"),
            pytest.param("GPU-a::1", NotDistinctError, "", id="not distinct"),
        ],
    )
    def test_refused(
        self, node: NodeState, share_id: str, error: type[AllocationError], fact: str, position: int
    ) -> None:
        """One share that can't be had refuses all containers, wherever it stands, and nothing counts as granted."""
        node.set_gpus((A, B, sick(C)))
        hold(node)
        share_ids = ["GPU-a::0"]
        share_ids.insert(position, share_id)
        with pytest.raises(error) as refused:
            node.allocate(SHARED, [["GPU-a::2"], share_ids], STRICT)
        assert share_id in str(refused.value) or error is NotDistinctError
        assert fact in str(refused.value)
        assert node.usage.allocated(0) == frozenset()

    def test_follows_the_offers(self, node: NodeState) -> None:
        """Only current offers can be allocated: a recovered GPU, a retained share, no GPU that is gone."""
        node.set_gpus((sick(A), B))
        node.set_gpus((A, B))
        hold(node, shared="a9")
        node.allocate(SHARED, [["GPU-a::0", "GPU-a::9"]], OPTIONS)
        node.set_gpus((B,))
        for resource in (SHARED, "example.com/none"):
            with pytest.raises(UnknownShareError):
                node.allocate(resource, [["GPU-a::0"]], OPTIONS)

    def test_granted(self, node: NodeState, clock: Clock) -> None:
        """Shares count as allocated at once, and their parts of the memory as used, until both are seen."""
        hold(node)
        node.usage.set_figures({"GPU-a": Figures(1000, 900, 5), "GPU-b": Figures(1000, 900, 5)}, 0)
        node.allocate(SHARED, [["GPU-a::0", "GPU-a::1"]], OPTIONS)
        assert node.loads(SHARED) == {"GPU-a": UnitLoad(2, 4, 400, 5)}
        assert node.loads(WHOLE) == {"GPU-b": UnitLoad(0, 1, 900, 5)}
        node.set_gpus((A, attrs.evolve(B, memory_bytes=None)))
        node.allocate(WHOLE, [["GPU-b::0"]], OPTIONS)
        assert node.loads(WHOLE) == {"GPU-b": UnitLoad(1, 1, 900, 5)}
        clock.now = SETTLING_TIME
        assert node.loads(SHARED)["GPU-a"].allocated == 0

    def test_withheld(self, node: NodeState) -> None:
        """A withheld share that is handed out is in use, so no longer withheld. The others stay withheld."""
        fill(node, 99, A)
        hold(node, shared="a0")
        node.update_pressure(0.95)
        assert notifies(node, lambda: node.allocate(SHARED, [["GPU-a::2"]], OPTIONS))
        assert withheld(node) == {"a": {1, 3}}
        assert notifies(node, lambda: node.allocate(SHARED, [["GPU-a::0", "GPU-a::1"]], OPTIONS))
        assert withheld(node) == {"a": {3}}
        assert not notifies(node, lambda: node.allocate(SHARED, [["GPU-a::2"]], OPTIONS))
