"""Which of the free shares a container should get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import product

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgpu.device import Share
from sgpu.placement import GpuLoad, MultiShare, Placement, preferred

pytestmark = pytest.mark.pure

SPREAD, PACK = Placement.SPREAD, Placement.PACK
DISTINCT, SAME, STRICT = MultiShare.DISTINCT, MultiShare.SAME, MultiShare.STRICT_DISTINCT


def ids(text: str) -> list[str]:
    """`a0 b1` → the ids of share 0 of GPU a and share 1 of GPU b."""
    return [f"GPU-{word[0]}::{word[1:]}" for word in text.split()]


def gpus(shares: int = 12, **allocated: int | None) -> dict[str, GpuLoad]:
    """GPUs of which no more is known than how many shares are allocated."""
    return {f"GPU-{name}": GpuLoad(allocated=count, shares=shares) for name, count in allocated.items()}


def sampled(*rows: tuple[str, int, int | None, int | None]) -> dict[str, GpuLoad]:
    """GPUs with a sample: name, allocated shares, free bytes, percent of utilisation."""
    return {
        f"GPU-{name}": GpuLoad(allocated=allocated, shares=12, free_memory=free, utilisation=utilisation)
        for name, allocated, free, utilisation in rows
    }


def case(
    available: str,
    size: int,
    chosen: str,
    id: str,
    must: str = "",
    loads: Mapping[str, GpuLoad] | None = None,
) -> object:
    return pytest.param(available, must, size, gpus(a=0, b=0, c=0) if loads is None else loads, chosen, id=id)


class TestRank:
    """One share: which GPU is the best."""

    @pytest.mark.parametrize(
        ("available", "must", "size", "loads", "chosen"),
        [
            case("a0 b0", 1, "b0", "fewest allocated", loads=gpus(a=2, b=1)),
            case("a0 b0", 1, "b0", "fewest, whatever its memory", loads=sampled(("a", 2, 9, 0), ("b", 1, 1, 99))),
            case("a0 b0", 1, "b0", "then most free memory", loads=sampled(("a", 1, 8, 0), ("b", 1, 9, 99))),
            case("a0 b0", 1, "b0", "then lowest utilisation", loads=sampled(("a", 1, 8, 10), ("b", 1, 8, 9))),
            case("b0 a0", 1, "a0", "then by UUID", loads=sampled(("b", 1, 8, 9), ("a", 1, 8, 9))),
            case("a0 b0", 1, "a0", "memory unknown for one", loads=sampled(("a", 1, None, 5), ("b", 1, 9, 5))),
            case("a0 b0", 1, "b0", "memory unknown, utilisation not", loads=sampled(("a", 1, None, 6), ("b", 1, 9, 5))),
            case("a0 b0", 1, "a0", "utilisation unknown for one", loads=sampled(("a", 1, 8, 9), ("b", 1, 8, None))),
            case(
                "b0 c0",
                1,
                "c0",
                "unknown only for one that is not offered",
                loads=sampled(("a", 1, None, None), ("b", 1, 8, 5), ("c", 1, 9, 5)),
            ),
            case("a9 b8 b9", 1, "b8", "allocated unknown: what is not offered", loads=gpus(a=None, b=None)),
            case("a9 b8 b9", 1, "a9", "allocated unknown for one", loads=gpus(a=3, b=None)),
            case("a10 a9 a2", 1, "a2", "the lowest number, not the first by text"),
            case("c0 b0", 1, "b0", "only what is offered", loads=gpus(a=0, b=1, c=2)),
        ],
    )
    def test_spread(self, available: str, must: str, size: int, loads: Mapping[str, GpuLoad], chosen: str) -> None:
        """By allocated shares, then free memory, then utilisation, each only where it is known for all."""
        assert preferred(ids(available), ids(must), size, loads, SPREAD, DISTINCT) == ids(chosen)

    @pytest.mark.parametrize(
        ("available", "must", "size", "loads", "chosen"),
        [
            case("a0 b0", 1, "b0", "most allocated", loads=gpus(a=1, b=2)),
            case("a0 b0", 1, "b0", "whatever the sample", loads=sampled(("a", 1, 1, 99), ("b", 2, 9, 0))),
            case("a0 b0", 1, "a0", "ties by UUID, whatever the sample", loads=sampled(("b", 1, 9, 0), ("a", 1, 1, 9))),
            case(
                "a0 b0",
                1,
                "b0",
                "by the part that is allocated",
                loads={"GPU-a": GpuLoad(allocated=5, shares=100), "GPU-b": GpuLoad(allocated=2, shares=4)},
            ),
            case("a9 b8 b9", 1, "a9", "allocated unknown: what is not offered", loads=gpus(a=None, b=None)),
        ],
    )
    def test_pack(self, available: str, must: str, size: int, loads: Mapping[str, GpuLoad], chosen: str) -> None:
        """The fullest GPU."""
        assert preferred(ids(available), ids(must), size, loads, PACK, DISTINCT) == ids(chosen)


class TestSeveral:
    """More than one share for a container."""

    @pytest.mark.parametrize("multi_share", [DISTINCT, STRICT])
    @pytest.mark.parametrize(
        ("available", "must", "size", "loads", "chosen"),
        [
            case("a0 a1 b0 b1", 2, "a0 b0", "one of each"),
            case("a0 b0 c0", 2, "b0 c0", "the best of them", loads=gpus(a=9, b=0, c=1)),
            case("a0 a1 b0 b1", 3, "a0 a1 b0", "more than there are GPUs"),
            case("a0 a1 a2 b0 b1 b2", 4, "a0 a1 b0 b1", "reused evenly, though one is better", loads=gpus(a=0, b=9)),
            case("a0 a1 a2 a3 b0", 4, "a0 a1 a2 b0", "reused where there is room"),
            case("a0 a1 b0 b1", 2, "a1 b0", "what must be counts as used", must="a1"),
            case("a0 b0 c0", 3, "a5 a6 b0", "what must be counts as used twice", must="a5 a6"),
        ],
    )
    def test_distinct(
        self,
        available: str,
        must: str,
        size: int,
        loads: Mapping[str, GpuLoad],
        chosen: str,
        multi_share: MultiShare,
    ) -> None:
        """From as many GPUs as possible, and evenly when there are too few."""
        assert preferred(ids(available), ids(must), size, loads, SPREAD, multi_share) == ids(chosen)

    @pytest.mark.parametrize(
        ("available", "must", "size", "loads", "chosen"),
        [
            case("a0 b0 b1 c0 c1", 2, "b0 b1", "one with room"),
            case("a0 b0 b1 c0 c1", 2, "c0 c1", "the best with room", loads=gpus(a=0, b=9, c=8)),
            case("a0 b0 b1 c0 c1 c2", 2, "a4 a0", "the one it has", must="a4"),
            case("a0 b0 b1 c0 c1 c2", 3, "a4 a0 b0", "the one it has, as far as it goes", must="a4"),
            case("a0 b0 c0 c1", 3, "b7 c7 c0", "one of those it has", must="b7 c7", loads=gpus(a=0, b=9, c=8)),
            case("b0 c0 c1", 4, "b7 c7 c0 c1", "the one of those it has with room", must="b7 c7"),
            case("a0 b0 b1 c0 c1", 3, "a0 b0 b1", "two where one will not do"),
            case(
                "a0 b0 b1 b2 c0 c1 c2",
                6,
                "b0 b1 b2 c0 c1 c2",
                "not the best one where it would take a third",
                loads=gpus(a=0, b=9, c=9),
            ),
            case("a0 b0", 5, "a0 b0", "all where there are too few"),
        ],
    )
    def test_same(self, available: str, must: str, size: int, loads: Mapping[str, GpuLoad], chosen: str) -> None:
        """From one GPU where one has room, else from as few as possible, those first that the container has."""
        assert preferred(ids(available), ids(must), size, loads, SPREAD, SAME) == ids(chosen)

    @pytest.mark.parametrize(
        ("available", "must", "size", "loads", "chosen"),
        [
            case("a11 b10 b11", 2, "b10 b11", "not the fullest, which has no room", loads=gpus(a=11, b=10, c=0)),
            case("a8 a9 b10 b11", 2, "b10 b11", "the fullest with room", loads=gpus(a=8, b=10)),
            case("a0 a1 b11 c10 c11", 3, "c10 c11 b11", "the fullest two", loads=gpus(a=0, b=11, c=10)),
        ],
    )
    def test_pack_same(self, available: str, must: str, size: int, loads: Mapping[str, GpuLoad], chosen: str) -> None:
        """The fullest GPU that has room for the whole rest of the request."""
        assert sorted(preferred(ids(available), ids(must), size, loads, PACK, SAME)) == sorted(ids(chosen))

    def test_pack_distinct(self) -> None:
        """One each of the fullest GPUs."""
        available = ids("a1 a2 b2 c3 c4")
        assert preferred(available, [], 2, gpus(a=1, b=2, c=3), PACK, DISTINCT) == ids("c3 b2")


class TestRequest:
    """Whatever the policy."""

    @pytest.mark.parametrize("placement", Placement)
    @pytest.mark.parametrize("multi_share", MultiShare)
    @pytest.mark.parametrize(
        ("available", "must", "size", "loads", "chosen"),
        [
            case("a0 a1 b0", 2, "b0 a1", "just those that must be", must="b0 a1"),
            case("a0 a1 b0", 1, "b0 a1", "more that must be than asked for", must="b0 a1"),
            case("a0 a1", 2, "a7 a0", "one that must be but is not free", must="a7"),
            case("a0", 2, "x7 a0", "one that must be but is no GPU's", must="x7"),
            case("a0 a0 a1", 3, "a0 a1", "one offered twice"),
            case("a0 a1", 2, "a0 a1", "one demanded twice", must="a0 a0"),
            case("a0", 0, "", "none asked for"),
            case("a0", -1, "", "less than none"),
            case("", 3, "", "none free"),
            case("a0 a01 a+1 a²", 3, "a0", "ids that name no share"),
            case("x0 a0", 2, "a0", "a GPU that is not known"),
            case("a12 a11", 2, "a11", "a share that the GPU does not have"),
            case("a0", 1, "", "no GPU known", loads={}),
            case("a0 b0", 2, "b0", "a GPU without shares", loads={**gpus(b=0), **gpus(shares=0, a=0)}),
        ],
    )
    def test_preferred(
        self,
        available: str,
        must: str,
        size: int,
        loads: Mapping[str, GpuLoad],
        chosen: str,
        placement: Placement,
        multi_share: MultiShare,
    ) -> None:
        """What must be included comes first; what is not known is left out; fewer than asked for if there are."""
        assert preferred(ids(available), ids(must), size, loads, placement, multi_share) == ids(chosen)

    def test_endless_number(self) -> None:
        """An id whose number is longer than Python converts is no error."""
        endless = f"GPU-a::{'9' * 5000}"
        assert preferred([endless, *ids("a1")], [], 2, gpus(a=0), SPREAD, SAME) == ids("a1")
        assert preferred(ids("a1"), [endless], 2, gpus(a=0), SPREAD, SAME) == [endless, *ids("a1")]


share_ids = st.builds("GPU-{}::{}".format, st.sampled_from("abcx"), st.integers(0, 12))
#: Ids as kubelets send them, and what only a broken one would.
any_ids = st.one_of(share_ids, st.text(max_size=8), st.sampled_from(["GPU-a::01", "GPU-a", "::", "::1", ""]))
any_loads = st.dictionaries(
    st.sampled_from(["GPU-a", "GPU-b", "GPU-c"]),
    st.builds(
        GpuLoad,
        allocated=st.none() | st.integers(0, 20),
        shares=st.integers(0, 12),
        free_memory=st.none() | st.integers(0, 3),
        utilisation=st.none() | st.integers(0, 2),
    ),
)

#: Gives a test any request that a kubelet could make.
any_request = given(
    available=st.lists(any_ids, max_size=40),
    must_include=st.lists(any_ids, max_size=8),
    size=st.integers(-3, 50),
    loads=any_loads,
    placement=st.sampled_from(Placement),
    multi_share=st.sampled_from(MultiShare),
)
#: Times belong to the machine.
untimed = settings(deadline=None)


class TestAnyRequest:
    """Whatever the kubelet asks; a method raising is a failure of each of these."""

    @untimed
    @any_request
    def test_answer(
        self,
        available: list[str],
        must_include: list[str],
        size: int,
        loads: dict[str, GpuLoad],
        placement: Placement,
        multi_share: MultiShare,
    ) -> None:
        """First all that must be included, in its order, then offered shares up to the size; none twice."""
        chosen = preferred(available, must_include, size, loads, placement, multi_share)
        demanded = list(dict.fromkeys(must_include))
        known = {
            share_id
            for share_id in {*available} - {*demanded}
            if (share := Share.parse(share_id)) and share.uuid in loads and share.number < loads[share.uuid].shares
        }
        assert chosen[: len(demanded)] == demanded
        assert set(chosen[len(demanded) :]) <= known
        assert len(chosen) == len(set(chosen))
        assert len(chosen) == max(len(demanded), min(size, len(demanded) + len(known)))

    @untimed
    @any_request
    def test_order(
        self,
        available: list[str],
        must_include: list[str],
        size: int,
        loads: dict[str, GpuLoad],
        placement: Placement,
        multi_share: MultiShare,
    ) -> None:
        """The orders in which ids are offered and GPUs are known make no difference."""
        chosen = preferred(available, must_include, size, loads, placement, multi_share)
        assert preferred(available[::-1], must_include, size, loads, placement, multi_share) == chosen
        backwards = dict(reversed(loads.items()))
        assert preferred(sorted(available), must_include, size, backwards, placement, multi_share) == chosen

    @untimed
    @any_request
    def test_lowest(
        self,
        available: list[str],
        must_include: list[str],
        size: int,
        loads: dict[str, GpuLoad],
        placement: Placement,
        multi_share: MultiShare,
    ) -> None:
        """No share is passed over for a higher one of the same GPU."""
        chosen = preferred(available, must_include, size, loads, placement, multi_share)
        passed_over = {*available} - {*chosen}
        for share in (Share.parse(share_id) for share_id in chosen[len(dict.fromkeys(must_include)) :]):
            assert share
            assert passed_over.isdisjoint(f"{share.uuid}::{number}" for number in range(share.number))


@attrs.frozen
class Small:
    """A request that is small enough to try every answer to."""

    available: list[str]
    must_include: list[str]
    size: int
    loads: dict[str, GpuLoad]


@st.composite
def small_requests(draw: st.DrawFn) -> Small:
    loads = {
        f"GPU-{name}": GpuLoad(
            allocated=draw(st.none() | st.integers(0, 2)),
            shares=draw(st.integers(1, 4)),
            free_memory=draw(st.sampled_from([1, 2, 3, None])),
            utilisation=draw(st.sampled_from([1, 2, None])),
        )
        for name in "abcd"[: draw(st.integers(1, 4))]
    }
    everything = [f"{uuid}::{number}" for uuid, load in loads.items() for number in range(load.shares)]
    available = draw(st.lists(st.sampled_from(everything), unique=True))
    must_include = draw(st.lists(st.sampled_from(everything), unique=True, max_size=2))
    return Small(available, must_include, draw(st.integers(1, 5)), loads)


class Judge:
    """The policy said another way: what is bad about an answer, the worst first. Lower is better.

    An answer is how many of the free shares it takes of each GPU.
    """

    def __init__(self, request: Small, placement: Placement, multi_share: MultiShare) -> None:
        self.multi_share = multi_share
        self.has = Counter(share_id[:5] for share_id in request.must_include)
        self.free = Counter(share_id[:5] for share_id in {*request.available} - {*request.must_include})
        self.rest = min(request.size - len(request.must_include), self.free.total())
        loads = {uuid: request.loads[uuid] for uuid in self.free}
        memory_known = all(load.free_memory is not None for load in loads.values())
        utilisation_known = all(load.utilisation is not None for load in loads.values())
        self.cost: dict[str, tuple[Fraction, ...]] = {}
        for order, (uuid, load) in enumerate(sorted(loads.items())):
            allocated = load.shares - self.free[uuid] if load.allocated is None else load.allocated
            if placement is PACK:
                self.cost[uuid] = (Fraction(-allocated, load.shares), Fraction(order))
            else:
                memory = load.free_memory or 0 if memory_known else 0
                utilisation = load.utilisation or 0 if utilisation_known else 0
                self.cost[uuid] = (Fraction(allocated), Fraction(-memory), Fraction(utilisation), Fraction(order))

    def answers(self) -> Iterator[Counter[str]]:
        """Every one that has the right size."""
        for counts in product(*(range(room + 1) for room in self.free.values())):
            if sum(counts) == self.rest:
                yield Counter(dict(zip(self.free, counts, strict=True)))

    def faults(self, answer: Counter[str]) -> tuple[object, ...]:
        total = self.has + answer
        if self.multi_share is SAME:
            added = {uuid: count for uuid, count in answer.items() if count}
            return (
                len(total),  # GPUs in all
                -sum(added[uuid] for uuid in added if uuid in self.has),  # the room of those it has is used
                len(added),
                sorted(self.cost[uuid] for uuid in added),
                [-added[uuid] for uuid in sorted(added, key=self.cost.__getitem__)],  # the better ones are used up
            )
        return (
            -len(total),
            sum(count * count for count in total.values()),  # least when even
            *(sum(answer[uuid] * self.cost[uuid][figure] for uuid in answer) for figure in range(self.figures)),
        )

    @property
    def figures(self) -> int:
        return max((len(cost) for cost in self.cost.values()), default=0)


class TestBest:
    @settings(deadline=None, max_examples=400)
    @given(request_=small_requests(), placement=st.sampled_from(Placement), multi_share=st.sampled_from(MultiShare))
    @example(
        request_=Small(ids("a0 a1 b0 c0 c1 c2"), ids("b1"), 4, gpus(shares=4, a=1, b=2, c=0)),
        placement=PACK,
        multi_share=SAME,
    )
    def test_by_brute_force(self, request_: Small, placement: Placement, multi_share: MultiShare) -> None:
        """No other division of the request among the GPUs is better under the policy."""
        chosen = preferred(
            request_.available, request_.must_include, request_.size, request_.loads, placement, multi_share
        )
        answer = Counter(share_id[:5] for share_id in chosen[len(request_.must_include) :])
        judge = Judge(request_, placement, multi_share)
        if judge.rest <= 0:
            assert not answer
        else:
            assert judge.faults(answer) == min(judge.faults(other) for other in judge.answers())
