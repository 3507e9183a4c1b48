"""What is wanted of the driver, and what is known of each limit."""

from __future__ import annotations

import pytest

from sgpu.node.cgroup_limit import ContainerLimit, LimitAnswer, LimitState, Target, WantedLimit
from sgpu.node.container import Container
from sgpu.node.enforcement import Enforcement
from sgpu.node.limits import WantedLimits

pytestmark = pytest.mark.pure

POD = Target("GPU-a", "/pod1")
LEAF = Target("GPU-a", "/pod1/c")
MAIN = Container("team", "trainer", "main")


def wanting(*targets: Target, hard: int = 5) -> WantedLimits:
    return WantedLimits(dict.fromkeys(targets, hard), dict.fromkeys(set(targets) & {LEAF}, MAIN))


def table(enforcement: Enforcement) -> tuple[WantedLimit, ...]:
    """The limits of the table, each of which has its own target for a key."""
    made = enforcement.table()
    assert list(made) == [wanted.target for wanted in made.values()]
    return tuple(made.values())


def answer(target: Target, state: LimitState, hard: int | None = 5, read: int | None = 5) -> LimitAnswer:
    return LimitAnswer(WantedLimit(*target, hard), state, read, 3, "" if state is LimitState.ENFORCED else "why")


@pytest.fixture
def enforcement() -> Enforcement:
    made = Enforcement()
    made.want(wanting(POD, LEAF))
    return made


def test_table(enforcement: Enforcement) -> None:
    """Set what is wanted, and remove what sgpu has set and is wanted no more; nothing that somebody else has set."""
    assert table(enforcement) == (WantedLimit(*POD, 5), WantedLimit(*LEAF, 5))
    enforcement.answer([answer(POD, LimitState.ENFORCED), answer(LEAF, LimitState.FOREIGN)])
    assert table(enforcement) == (WantedLimit(*POD, 5, ours=True), WantedLimit(*LEAF, 5))
    enforcement.want(wanting())
    assert table(enforcement) == (WantedLimit(*POD, None, ours=True),)
    enforcement.answer([answer(POD, LimitState.REMOVED, None)])
    assert table(enforcement) == ()


def test_adopted(enforcement: Enforcement) -> None:
    """Limits of an earlier sgpu are ours, and are removed unless they are wanted, once somebody has said what is."""
    old = Target("GPU-b", "/pod9")
    undecided = Enforcement()
    undecided.adopt([POD, old])
    assert (table(undecided), set(undecided.recorded())) == ((), {POD, old})
    undecided.want(wanting())
    assert len(table(undecided)) == 2
    changed = enforcement.changed.next
    enforcement.adopt([POD, old])
    assert changed.is_set()
    assert table(enforcement) == (
        WantedLimit(*POD, 5, ours=True),
        WantedLimit(*LEAF, 5),
        WantedLimit(*old, None, ours=True),
    )
    enforcement.forget([old])
    assert [wanted.target for wanted in table(enforcement)] == [POD, LEAF]


def test_recorded(enforcement: Enforcement) -> None:
    """Record what is about to be set, too; not what turned out to be somebody else's."""
    enforcement.adopt([Target("GPU-b", "/pod9")])
    enforcement.answer([answer(LEAF, LimitState.FOREIGN)])
    assert set(enforcement.recorded()) == {POD, Target("GPU-b", "/pod9")}


@pytest.mark.parametrize(
    ("answered", "known"),
    [
        pytest.param(
            None, ContainerLimit(5, LimitState.PENDING, reason="the driver has not answered yet"), id="no answer yet"
        ),
        pytest.param(
            answer(LEAF, LimitState.ENFORCED, 4),
            ContainerLimit(5, LimitState.PENDING, reason="the driver has not answered yet"),
            id="answer to another limit",
        ),
        pytest.param(
            answer(LEAF, LimitState.ENFORCED, 5, 6), ContainerLimit(6, LimitState.ENFORCED, 3), id="read back"
        ),
        pytest.param(
            answer(LEAF, LimitState.REFUSED, 5, None), ContainerLimit(5, LimitState.REFUSED, 3, "why"), id="refused"
        ),
    ],
)
def test_state(enforcement: Enforcement, answered: LimitAnswer | None, known: ContainerLimit) -> None:
    """A limit is what the driver reads back, and pending until it answers for the one that is wanted."""
    if answered:
        enforcement.answer([answered])
    assert enforcement.state(LEAF) == known
    assert enforcement.by_container() == {"GPU-a": {MAIN: known}}
    assert enforcement.state(Target("GPU-b", "/pod1")) is None


def test_gone(enforcement: Enforcement) -> None:
    """Nothing is known of a cgroup that is gone, though it is wanted until somebody looks."""
    enforcement.answer([answer(LEAF, LimitState.ENFORCED)])
    enforcement.forget([LEAF])
    known = enforcement.state(LEAF)
    assert known
    assert known.state is LimitState.PENDING


def test_unknown_target_of_a_container(enforcement: Enforcement) -> None:
    """A container whose limit is no longer wanted has none."""
    enforcement.want(WantedLimits({}, {LEAF: MAIN}))
    assert enforcement.by_container() == {}


def test_problems(enforcement: Enforcement) -> None:
    """Count the limits that are not enforced, by reason."""
    enforcement.answer([answer(POD, LimitState.REFUSED), answer(LEAF, LimitState.FOREIGN)])
    assert enforcement.problems() == {"why": 2}
    enforcement.answer([answer(POD, LimitState.ENFORCED), answer(LEAF, LimitState.PENDING)])
    assert enforcement.problems() == {}


@pytest.mark.parametrize(
    ("wanted", "changed", "answered"),
    [
        pytest.param(wanting(POD, LEAF), False, False, id="the same"),
        pytest.param(wanting(POD), True, True, id="another table"),
        pytest.param(WantedLimits({POD: 5, LEAF: 5}), False, True, id="another name"),
    ],
)
def test_notified(enforcement: Enforcement, wanted: WantedLimits, changed: bool, answered: bool) -> None:
    """The driver's side is woken for another table, and who waits for a limit for all that may decide it."""
    events = (enforcement.changed.next, enforcement.answered.next)
    enforcement.want(wanted)
    assert tuple(event.is_set() for event in events) == (changed, answered)
