"""The free shares that a container should get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import product

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgpu.deviceplugin.preferred import preferred
from sgpu.node.rank import MultiShare, Placement, UnitLoad
from sgpu.node.shares import Share

pytestmark = pytest.mark.pure


def ids(text: str) -> list[str]:
    """`a0 b1` → the ids of share 0 of GPU-a and share 1 of GPU-b."""
    return [f"GPU-{word[0]}::{word[1:]}" for word in text.split()]


def gpus(shares: int = 12, **allocated: int | None) -> dict[str, UnitLoad]:
    """GPUs of which only the number of allocated shares is known."""
    return {f"GPU-{name}": UnitLoad(allocated=count, shares=shares) for name, count in allocated.items()}


def with_instances(loads: dict[str, UnitLoad], letters: str) -> dict[str, UnitLoad]:
    """The same, with these as MIG instances: a container that has a share of one can use nothing else."""
    return {uuid: attrs.evolve(load, alone=uuid[-1] in letters) for uuid, load in loads.items()}


FIGURES = {**gpus(a=1), "GPU-b": UnitLoad(1, 12, 8, 5), "GPU-c": UnitLoad(1, 12, 9, 5)}
GIVEN_OUT = {**gpus(b=11), "GPU-a": UnitLoad(0, 12, others=12)}
INSTANCES = with_instances(gpus(a=1, b=1), "ab")
MIXED = with_instances(gpus(a=1, b=2, c=0, d=0), "ab")


@attrs.frozen
class Request:
    """A request of the kubelet, and the figures at that time."""

    available: Sequence[str]
    must_include: Sequence[str]
    size: int
    loads: dict[str, UnitLoad]

    def chosen(self, placement: Placement, multi_share: MultiShare) -> list[str]:
        return preferred(self.available, self.must_include, self.size, self.loads, placement, multi_share)


def case(
    policy: str,
    available: str,
    size: int,
    chosen: str,
    id: str,
    must: str = "",
    loads: dict[str, UnitLoad] | None = None,
) -> object:
    """A row of the table. `policy`: placement and multi-share, or `any`."""
    request = Request(ids(available), ids(must), size, gpus(a=0, b=0, c=0) if loads is None else loads)
    return pytest.param(policy, request, ids(chosen), id=f"{policy}: {id}")


@pytest.mark.parametrize(
    ("policy", "request_", "chosen"),
    [
        # One share comes from the unit that ranks first among those with a free one.
        case("spread distinct", "a0 b0", 1, "b0", "the unit that ranks first", loads=gpus(a=2, b=1)),
        case("spread distinct", "b0 a0", 1, "a0", "ties by UUID", loads=gpus(b=1, a=1)),
        case("spread distinct", "a10 a9 a2", 1, "a2", "the lowest number, not the first by text"),
        case("spread distinct", "b0 c0", 1, "c0", "figures unknown only for one that is not available", loads=FIGURES),
        case("spread distinct", "a9 b8 b9", 1, "b8", "unknown: what is not available", loads=gpus(a=None, b=None)),
        case("spread distinct", "a9 b8 b9", 1, "a9", "unknown for one", loads=gpus(a=3, b=None)),
        case("pack distinct", "a9 b8 b9", 1, "a9", "unknown: what is not available", loads=gpus(a=None, b=None)),
        case("spread distinct", "a0 b0", 1, "b0", "not the one that another plugin gave out", loads=GIVEN_OUT),
        # Distinct shares come from as many GPUs as possible, the same from as few: `test_best` has the rest.
        case("spread distinct", "a0 b0 c0", 3, "a5 a6 b0", "two to include count as used twice", must="a5 a6"),
        case("spread same", "b0 c0 c1", 4, "b7 c7 c0 c1", "the one of those it has with room", must="b7 c7"),
        # Of MIG instances a container can use one, or else GPUs.
        case("any", "a0 a1 b0 b1", 2, "a0 a1", "one instance", loads=INSTANCES),
        case("any", "a0 b0 b1", 2, "b0 b1", "the instance with room", loads=INSTANCES),
        case("any", "a0 a1 b0", 2, "b5 b0", "the instance it has", must="b5", loads=INSTANCES),
        case("any", "a0 b0", 2, "a0 b0", "two where none has room", loads=INSTANCES),
        case("spread distinct", "a0 a1 c0 d0", 2, "c0 d0", "GPUs, of which one is the best", loads=MIXED),
        case("pack distinct", "b0 b1 c0 d0", 2, "b0 b1", "the instance that is the best", loads=MIXED),
        case("spread distinct", "a0 a1 c0", 2, "a0 a1", "an instance, as too few of the GPUs are free", loads=MIXED),
        case("spread distinct", "a0 c0", 2, "c0 a0", "what there is", loads=MIXED),
        case("spread distinct", "a0 c0", 1, "c0", "the best", loads=MIXED),
        # Whatever the policy.
        case("any", "a0 a1 b0", 1, "b0 a1", "more to include than asked for", must="b0 a1"),
        case("any", "a0", 3, "a7 x7 a0", "to include: one that is not free, and one of no GPU", must="a7 x7"),
        case("any", "a0 a1", 2, "a0 a1", "one to include twice", must="a0 a0"),
        case("any", "a0", -1, "", "less than none asked for"),
        case("any", "a0 a01 a+1 a²", 3, "a0", "ids that name no share"),
        case("any", f"a{'9' * 5000} a1", 3, f"a{'8' * 5000} a1", "endless numbers", must=f"a{'8' * 5000}"),
        case("any", "x0 a0", 2, "a0", "an unknown GPU"),
        case("any", "a12 a11", 2, "a11", "a share that the GPU does not have"),
        case("any", "a0", 1, "", "no GPU known", loads={}),
        case("any", "a0 b0", 2, "b0", "a GPU without shares", loads={**gpus(b=0), **gpus(shares=0, a=0)}),
    ],
)
def test_chosen(policy: str, request_: Request, chosen: list[str]) -> None:
    """Shares to include come first, then those that the policy prefers; unknown ones are left out."""
    every = {
        f"{placement.value} {multi.value}": (placement, multi) for placement, multi in product(Placement, MultiShare)
    }
    for placement, multi_share in every.values() if policy == "any" else [every[policy]]:
        assert request_.chosen(placement, multi_share) == chosen


share_ids = st.builds("GPU-{}::{}".format, st.sampled_from("abcx"), st.integers(0, 12))
#: Ids as kubelets send them, and those that only a broken one would send.
any_ids = st.one_of(share_ids, st.text(max_size=8), st.sampled_from(["GPU-a::01", "GPU-a", "::", "::1", ""]))
any_loads = st.dictionaries(
    st.sampled_from(["GPU-a", "GPU-b", "GPU-c"]),
    st.builds(
        UnitLoad,
        allocated=st.none() | st.integers(0, 20),
        shares=st.integers(0, 12),
        free_memory=st.none() | st.integers(0, 3),
        utilization=st.none() | st.integers(0, 2),
    ),
)
any_requests = st.builds(
    Request,
    available=st.lists(any_ids, max_size=40),
    must_include=st.lists(any_ids, max_size=8),
    size=st.integers(-3, 50),
    loads=any_loads,
)


@given(request_=any_requests, placement=st.sampled_from(Placement), multi_share=st.sampled_from(MultiShare))
def test_any_request(request_: Request, placement: Placement, multi_share: MultiShare) -> None:
    """Those to include come first, then available shares up to the size, none twice.

    No share is passed over for a higher one of its unit, and the orders of ids and units make no difference.
    """
    chosen = request_.chosen(placement, multi_share)
    included = list(dict.fromkeys(request_.must_include))
    known = {
        share_id
        for share_id in {*request_.available} - {*included}
        if (share := Share.parse(share_id))
        and share.uuid in request_.loads
        and share.number < request_.loads[share.uuid].shares
    }
    assert chosen[: len(included)] == included
    assert set(chosen[len(included) :]) <= known
    assert len(chosen) == len(set(chosen)) == max(len(included), min(request_.size, len(included) + len(known)))

    passed_over = known - {*chosen}
    for share in (Share.parse(share_id) for share_id in chosen[len(included) :]):
        assert share
        assert passed_over.isdisjoint(str(Share(share.uuid, number)) for number in range(share.number))

    backwards = dict(reversed(request_.loads.items()))
    for other in (request_.available[::-1], sorted(request_.available)):
        assert attrs.evolve(request_, available=other, loads=backwards).chosen(placement, multi_share) == chosen


@st.composite
def small_requests(draw: st.DrawFn) -> Request:
    """Requests that are small enough to try every answer to."""
    loads = {
        f"GPU-{name}": UnitLoad(
            allocated=draw(st.none() | st.integers(0, 2)),
            shares=draw(st.integers(1, 4)),
            free_memory=draw(st.sampled_from([1, 2, 3, None])),
            utilization=draw(st.sampled_from([1, 2, None])),
        )
        for name in "abcd"[: draw(st.integers(1, 4))]
    }
    everything = [f"{uuid}::{number}" for uuid, load in loads.items() for number in range(load.shares)]
    available = draw(st.lists(st.sampled_from(everything), unique=True))
    must_include = draw(st.lists(st.sampled_from(everything), unique=True, max_size=2))
    return Request(available, must_include, draw(st.integers(1, 5)), loads)


class Judge:
    """The policy said another way: what is bad about an answer, the worst first. Lower is better.

    An answer is how many of the free shares it takes of each GPU.
    """

    def __init__(self, request: Request, placement: Placement, multi_share: MultiShare) -> None:
        self.multi_share = multi_share
        self.has = Counter(share_id[:5] for share_id in request.must_include)
        self.free = Counter(share_id[:5] for share_id in {*request.available} - {*request.must_include})
        self.rest = min(request.size - len(request.must_include), self.free.total())
        loads = {uuid: request.loads[uuid] for uuid in sorted(self.free)}
        memory_known = all(load.free_memory is not None for load in loads.values())
        utilization_known = all(load.utilization is not None for load in loads.values())
        self.cost: dict[str, list[Fraction]] = {}
        for order, (uuid, load) in enumerate(loads.items()):
            allocated = load.shares - self.free[uuid] if load.allocated is None else load.allocated
            memory = load.free_memory or 0 if memory_known else 0
            utilization = load.utilization or 0 if utilization_known else 0
            by_figures = [Fraction(allocated), Fraction(-memory), Fraction(utilization)]
            by_placement = [Fraction(-allocated, load.shares)] if placement is Placement.PACK else by_figures
            self.cost[uuid] = [*by_placement, Fraction(order)]

    def answers(self) -> Iterator[Counter[str]]:
        """Every one that has the right size."""
        for counts in product(*(range(room + 1) for room in self.free.values())):
            if sum(counts) == self.rest:
                yield Counter(dict(zip(self.free, counts, strict=True)))

    def faults(self, answer: Counter[str]) -> tuple[object, ...]:
        total = self.has + answer
        added = {uuid: count for uuid, count in answer.items() if count}
        if self.multi_share is MultiShare.SAME:
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
            [sum(column) for column in zip(*(self.cost[uuid] for uuid in answer.elements()), strict=True)],
        )


@settings(deadline=None, max_examples=400)
@given(request_=small_requests(), placement=st.sampled_from(Placement), multi_share=st.sampled_from(MultiShare))
@example(
    request_=Request(ids("a0 a1 b0 c0 c1 c2"), ids("b1"), 4, gpus(shares=4, a=1, b=2, c=0)),
    placement=Placement.PACK,
    multi_share=MultiShare.SAME,
)
def test_best(request_: Request, placement: Placement, multi_share: MultiShare) -> None:
    """No other division of the request among the GPUs is better under the policy."""
    chosen = request_.chosen(placement, multi_share)
    answer = Counter(share_id[:5] for share_id in chosen[len(request_.must_include) :])
    judge = Judge(request_, placement, multi_share)
    if judge.rest <= 0:
        assert not answer
    else:
        assert judge.faults(answer) == min(judge.faults(other) for other in judge.answers())
