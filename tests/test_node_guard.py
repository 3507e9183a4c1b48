"""The containers that use too much of a GPU's memory, and the choice of whom to end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.node.container import Container, Owners, Process
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.guard import SAMPLES, GuardPolicy, OverUse, OverUsers, Sample, over_uses

pytestmark = pytest.mark.pure

#: A container may use 30 of 100 bytes, and 5 more are tolerated.
POLICY = GuardPolicy(threshold=0.9, tolerance_part=0.1, tolerance_bytes=2, exempt=frozenset({"kube-system"}))
BIG, SMALL, SYSTEM = (
    Container("team", "big", "main"),
    Container("team", "small", "main"),
    Container("kube-system", "x", "y"),
)
ALLOWED = {BIG: 30, SMALL: 30, SYSTEM: 30}
GPU = "GPU-a"


def figures(*memory: int | None, free: int | None = 5) -> Figures:
    """Processes 1, 2 … that use so much of a GPU."""
    return Figures(100, free, 0, tuple(ProcessUse(pid, used, 0) for pid, used in enumerate(memory, 1)))


def owners(*containers: Container | None, unknown: int = 0, mps: int = 0) -> Owners:
    """Processes 1, 2 … are in these."""
    return Owners(
        dict(enumerate(containers, 1)),
        frozenset({unknown}),
        frozenset({mps}),
        {pid: Process(pid, 1000 + pid) for pid in range(1, len(containers) + 1)},
    )


@pytest.mark.parametrize(
    ("figures", "owners", "expected"),
    [
        pytest.param(figures(36), owners(BIG), {BIG: (36, 1)}, id="too much"),
        pytest.param(figures(35), owners(BIG), {}, id="within the tolerance"),
        pytest.param(figures(36, free=10), owners(BIG), {}, id="the GPU is not full"),
        pytest.param(figures(18, 10, 19), owners(BIG, SMALL, BIG), {BIG: (37, 3)}, id="several processes"),
        pytest.param(figures(40, 50), owners(BIG, SMALL), {BIG: (40, 1), SMALL: (50, 2)}, id="several containers"),
        pytest.param(figures(90), owners(SYSTEM), {}, id="exempt namespace"),
        pytest.param(figures(90), owners(None), {}, id="no pod"),
        pytest.param(figures(90), owners(Container("team", "stray", "main")), {}, id="no share"),
        pytest.param(figures(90, 90), owners(BIG), {BIG: (90, 1)}, id="one process has ended"),
        pytest.param(figures(90, None), owners(BIG, BIG), {}, id="the memory of one process is unknown"),
        pytest.param(figures(90, None), owners(BIG, SMALL), {BIG: (90, 1)}, id="that of another container is"),
        pytest.param(figures(90, 1), owners(BIG, unknown=2), {}, id="the container of one process is unknown"),
        pytest.param(figures(90), owners(BIG, mps=1), {}, id="an MPS server"),
        pytest.param(figures(90, free=None), owners(BIG), {}, id="free memory unknown"),
        pytest.param(Figures(None, 5, 0, figures(90).processes), owners(BIG), {}, id="total memory unknown"),
        pytest.param(Figures(100, 5, 0, None), owners(BIG), {}, id="processes unknown"),
    ],
)
def test_over_uses(figures: Figures, owners: Owners, expected: dict[Container, tuple[int, int]]) -> None:
    """Name who uses more than its part and the tolerance of a full GPU, with its largest process."""
    uses = {use.container: use for use in over_uses(GPU, figures, owners, ALLOWED, POLICY)}
    assert {container: (use.used, use.process.pid) for container, use in uses.items()} == expected
    assert all((use.allowed, use.tolerance, use.gpu_used, use.gpu_total) == (30, 5, 95, 100) for use in uses.values())


class World:
    """Samples of one GPU, a second apart."""

    def __init__(self) -> None:
        self.over = OverUsers(POLICY)
        self.now = 0.0

    def sample(self, *memory: int | None, again: bool = False, mps: int = 0) -> list[str]:
        """Take one of BIG and SMALL, and return the pods that are named from then on."""
        self.now += not again
        sample = Sample(self.now, {GPU: figures(*memory)}, owners(BIG, SMALL, mps=mps))
        return [use.container.pod for use in self.over.take(sample, {GPU: ALLOWED})]

    def samples(self, *memory: int | None) -> None:
        for _ in range(SAMPLES):
            self.sample(*memory)

    def named(self) -> list[str]:
        return [use.container.pod for use in self.over.named().get(GPU, [])]

    def choose(self) -> OverUse | None:
        choices = self.over.choose()
        assert len(choices) <= 1
        return choices[0] if choices else None

    def end(self, use: OverUse | None, *, give_up: bool = False) -> None:
        assert use
        self.over.done(use, self.now, give_up=give_up)


@pytest.fixture
def world() -> World:
    return World()


class TestNamed:
    def test_in_a_row(self, world: World) -> None:
        """Name a container in its third sample in a row, once, for as long as it uses too much."""
        assert [world.sample(used) for used in (40, 40, 30, 40, 40, 40, 40)] == [[], [], [], [], [], ["big"], []]
        assert world.named() == ["big"]
        world.sample(30)
        assert world.named() == []

    def test_the_same_sample(self, world: World) -> None:
        """Count each sample once, however often it is seen."""
        assert [world.sample(40, again=again) for again in (False, True, True, False)] == [[], [], [], []]
        assert world.sample(40) == ["big"]
        assert world.sample(40, again=True) == []
        assert world.named() == ["big"]

    def test_unknown(self, world: World) -> None:
        """Begin to count again after a sample that is unknown, as a whole or of this GPU."""
        for forget in (
            lambda: world.over.take(None, {}),
            lambda: world.sample(None),
            lambda: world.over.take(Sample(world.now + 0.5, {}, owners()), {GPU: ALLOWED}),
        ):
            world.samples(40)
            assert world.over.last(GPU, BIG)
            forget()
            assert world.over.last(GPU, BIG) is None
            assert world.named() == []
            assert world.sample(40) == []


class TestChoice:
    def test_largest(self, world: World) -> None:
        """Choose the one that is furthest above its part, once it is named, and no other until that is done."""
        assert [world.choose() for _ in range(2) if not world.sample(40, 50)] == [None, None]
        world.sample(40, 50)
        choice = world.choose()
        assert choice
        assert (choice.container, choice.process, choice.process_memory) == (SMALL, Process(2, 1002), 50)
        world.samples(90, 50)
        assert world.choose() is None

    def test_new_look(self, world: World) -> None:
        """Choose the next one by three samples that were taken after the last one's end."""
        world.samples(40, 50)
        world.end(world.choose())
        world.over.take(Sample(world.now - 0.1, {GPU: figures(40)}, owners(BIG)), {GPU: ALLOWED})
        for _ in range(SAMPLES - 1):
            world.sample(40)
            assert world.choose() is None
        world.sample(40)
        choice = world.choose()
        assert choice
        assert choice.container == BIG

    def test_given_up(self, world: World) -> None:
        """Never choose a process again that can't be ended, but another one; its id may be used again."""
        world.samples(40, 50)
        world.end(world.choose(), give_up=True)
        world.samples(40, 50)
        choice = world.choose()
        assert choice
        assert choice.container == BIG
        world.end(choice, give_up=True)
        world.samples(40, 50)
        assert world.choose() is None
        world.over.take(Sample(world.now + 0.5, {}, owners()), {})
        world.samples(40, 50)
        assert world.choose()

    def test_mps(self, world: World) -> None:
        """Choose nobody on a GPU that an MPS server uses: a client's end may be that of all."""
        for _ in range(SAMPLES):
            world.sample(40, 1, mps=2)
        assert world.named() == ["big"]
        assert world.choose() is None

    def test_several_gpus(self, world: World) -> None:
        """Choose one on each GPU at the same time, but a process that uses two of them once."""
        for now in range(SAMPLES):
            both = {"GPU-a": figures(40, 50), "GPU-b": figures(40), "GPU-c": figures(1, 40)}
            allowed = dict.fromkeys(both, ALLOWED)
            world.over.take(Sample(float(now), both, owners(BIG, SMALL)), allowed)
        assert [(use.uuid, use.container) for use in world.over.choose()] == [("GPU-a", SMALL), ("GPU-b", BIG)]


#: Bytes of processes 1 and 2 of BIG and 3 of SMALL, the id of one whose container is unknown, and of an MPS server.
SIZES = st.sampled_from([None, 1, 18, 36, 36, 60])
STEP = st.tuples(SIZES, SIZES, SIZES, st.sampled_from([0] * 9 + [2]), st.sampled_from([0] * 9 + [2]))


@given(st.lists(STEP, min_size=SAMPLES, max_size=12))
def test_never_within_its_limit(course: list[tuple[int | None, int | None, int | None, int, int]]) -> None:
    """Choose only a process of a container that used more than it may by all of the last samples."""
    over = OverUsers(POLICY)
    excess: list[set[Container]] = []
    for now, (one, two, three, unknown, mps) in enumerate(course):
        sample = Sample(now, {GPU: figures(one, two, three)}, owners(BIG, BIG, SMALL, unknown=unknown, mps=mps))
        over.take(sample, {GPU: ALLOWED})
        uses = {BIG: None if one is None or two is None else one + two, SMALL: three}
        excess.append({container for container, used in uses.items() if not unknown and used and used > 35})
        for use in over.choose():
            assert len(excess) >= SAMPLES
            assert all(use.container in each for each in excess[-SAMPLES:])
            assert use.process.pid in ((1, 2) if use.container is BIG else (3,))
            assert not mps
            over.done(use, now, give_up=False)
