"""The view of how GPUs are used, and the figures for a choice."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.node.container import Container
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.gpu import Gpu, units
from sgpu.node.grants import SETTLING_TIME
from sgpu.node.offers import Offer
from sgpu.node.rank import UnitLoad
from sgpu.node.shares import Share
from sgpu.node.usage import STALE_AFTER, ContainerUse, Usage

pytestmark = pytest.mark.pure

INTERVAL = 5.0
A, B = (Offer(units(Gpu(uuid, "Tesla T4", "00000000:00:04.0", ()))[0], shares=4) for uuid in ("GPU-a", "GPU-b"))
A0, A1 = Share("GPU-a", 0), Share("GPU-a", 1)
ONE, TWO = Container("team", "one", "main"), Container("team", "two", "main")


def held(text: str) -> Mapping[Share, Container]:
    """`a0 b1` → share 0 of GPU-a and share 1 of GPU-b, each held by a pod of that name."""
    return {
        Share(f"GPU-{word[0]}", int(word[1:])): Container("default", f"pod-{word}", "main") for word in text.split()
    }


@pytest.fixture
def usage() -> Usage:
    return Usage(INTERVAL)


def test_container_text() -> None:
    """A container is named by its pod, as operators name pods."""
    assert str(ONE) == "team/one"


class TestAllocated:
    @pytest.mark.parametrize(
        ("holders", "granted", "allocated", "loads"),
        [
            *((None, "a0", None, (None, None)), ("", "", "", (0, 0)), ("a0 b0 a3", "", "a0 b0 a3", (2, 1))),
            *(("", "a0", "a0", (1, 0)), ("a0", "a0 a1", "a0 a1", (2, 0)), ("z0", "", "z0", (0, 0))),
        ],
    )
    def test_allocated(
        self,
        usage: Usage,
        holders: str | None,
        granted: str,
        allocated: str | None,
        loads: tuple[int | None, int | None],
    ) -> None:
        """The shares that the kubelet lists and those just granted, each once; unknown while it does not list them."""
        for share in held(granted):
            usage.grants.add(share, 0, now=0)
        usage.set_holders(None if holders is None else held(holders))
        assert usage.allocated(1) == (None if allocated is None else set(held(allocated)))
        assert tuple(load.allocated for load in usage.loads([A, B], 1).values()) == loads

    def test_unknown(self, usage: Usage) -> None:
        """Nothing is known before the kubelet was asked, nor when it no longer answers."""
        assert usage.holders is None
        assert usage.allocated(0) is None
        usage.set_holders(held("a0"))
        usage.set_holders(None)
        assert usage.allocated(0) is None
        assert usage.loads([A], 0)["GPU-a"].allocated is None
        assert usage.uses("GPU-a") == ()

    def test_released(self, usage: Usage) -> None:
        """A share that is gone from the list is free, however recently it was granted."""
        usage.grants.add(A0, 0, now=0)
        usage.set_holders(held("a0"))
        usage.set_holders(None)
        usage.set_holders({})
        assert usage.allocated(1) == frozenset()


class TestLoads:
    @pytest.mark.parametrize(
        ("figures", "age", "load"),
        [
            pytest.param(Figures(1000, 700, 20), 0, UnitLoad(1, 4, 700, 20), id="known"),
            pytest.param(Figures(None, None, 20), 0, UnitLoad(1, 4, None, 20), id="no memory"),
            pytest.param(Figures(1000, 700, None), 0, UnitLoad(1, 4, 700, None), id="no utilization"),
            pytest.param(Figures(1000, 0, 0), 0, UnitLoad(1, 4, 0, 0), id="zero is known"),
            pytest.param(Figures(1000, 700, 20), STALE_AFTER * INTERVAL, UnitLoad(1, 4, 700, 20), id="not stale yet"),
            pytest.param(Figures(1000, 700, 20), STALE_AFTER * INTERVAL + 0.1, UnitLoad(1, 4), id="stale"),
        ],
    )
    def test_figures(self, usage: Usage, figures: Figures, age: float, load: UnitLoad) -> None:
        """Free memory and utilization are known where figures say so that are not several intervals old."""
        usage.set_holders(held("a0"))
        usage.set_figures({"GPU-a": figures, "GPU-x": Figures(1, 1, 1)}, now=100)
        assert usage.loads([A, B], 100 + age) == {"GPU-a": load, "GPU-b": UnitLoad(0, 4)}
        usage.set_figures({"GPU-a": Figures(1000, 600, 30)}, now=1000)
        assert usage.loads([A], 1001) == {"GPU-a": UnitLoad(1, 4, 600, 30)}

    def test_granted_counts_as_used(self, usage: Usage) -> None:
        """A share granted moments ago takes its part of the memory at once, until the figures show it."""
        usage.set_figures({"GPU-a": Figures(1000, 700), "GPU-b": Figures(1000, 700)}, now=0)
        usage.grants.add(A0, 250, now=0)
        usage.grants.add(A1, 250, now=0)
        assert [load.free_memory for load in usage.loads([A, B], 1).values()] == [200, 700]
        usage.set_figures({"GPU-a": Figures(1000, 400)}, now=1)
        assert usage.loads([A], 1)["GPU-a"].free_memory == 0
        usage.set_figures({"GPU-a": Figures(1000, 150)}, now=SETTLING_TIME)
        assert usage.loads([A], SETTLING_TIME)["GPU-a"].free_memory == 150


def use(name: str, shares: int, memory: int | None, utilization: int | None, processes: int) -> ContainerUse:
    """Return the shares and use of `namespace/pod/container`; empty: processes of no pod."""
    namespace, pod, container = (name or "//").split("/")
    return ContainerUse(namespace, pod, container, shares, memory, utilization, processes)


def used(*processes: tuple[int, int | None, int | None]) -> Figures:
    """Figures with these processes: id, bytes and percent."""
    return Figures(1000, 500, 50, tuple(ProcessUse(*process) for process in processes))


one, two = partial(use, "team/one/main"), partial(use, "team/two/main")
Processes = list[tuple[int, int | None, int | None]]


class TestUses:
    def test_shares(self, usage: Usage) -> None:
        """Each container with a share of this GPU is there once, in order, also where no more is known."""
        other = Container("other", "z", "side")
        usage.set_holders({A0: ONE, A1: TWO, Share("GPU-a", 2): ONE, Share("GPU-b", 0): TWO, Share("GPU-a", 3): other})
        side = use("other/z/side", 1, None, None, 0)
        assert usage.uses("GPU-a") == (side, one(2, None, None, 0), two(1, None, None, 0))
        assert usage.uses("GPU-b") == (two(1, None, None, 0),)
        assert usage.uses("GPU-c") == ()
        assert not usage.processes_known

    @pytest.mark.parametrize(
        ("processes", "owners", "expected"),
        [
            pytest.param([], {}, [one(2, 0, 0, 0)], id="none"),
            pytest.param([(7, 100, 30), (8, 5, 40)], {7: ONE, 8: ONE}, [one(2, 105, 70, 2)], id="two of one"),
            pytest.param([(7, 1, 70), (8, 5, 31)], {7: ONE, 8: ONE}, [one(2, 6, 100, 2)], id="max 100"),
            pytest.param([(7, None, 30), (8, 5, 1)], {7: ONE, 8: ONE}, [one(2, None, 31, 2)], id="no memory"),
            pytest.param([(7, 100, None), (8, 5, 1)], {7: ONE, 8: ONE}, [one(2, 105, None, 2)], id="no utilization"),
            pytest.param(
                [(7, 9, 30), (8, 5, 1)], {7: ONE, 8: TWO}, [one(2, 9, 30, 1), two(0, 5, 1, 1)], id="without a share"
            ),
            pytest.param(
                *([(7, 9, 30), (8, 5, 1), (9, 6, 2)], {7: ONE, 8: None, 9: None}),
                *([use("", 0, 11, 3, 2), one(2, 9, 30, 1)],),
                id="of no pod",
            ),
            pytest.param([(7, 100, 30), (8, 5, 1)], {7: ONE}, [one(2, 100, 30, 1)], id="ended"),
        ],
    )
    def test_processes(
        self, usage: Usage, processes: Processes, owners: dict[int, Container | None], expected: list[ContainerUse]
    ) -> None:
        """A container uses what its processes use together. A sum with an unknown part is unknown."""
        usage.set_holders({A0: ONE, A1: ONE})
        usage.set_owners({"GPU-a": used(*processes)}, owners)
        assert usage.processes_known
        assert list(usage.uses("GPU-a")) == expected

    def test_claimants(self, usage: Usage) -> None:
        """All containers that have a share by one claim have it; it is allocated once."""
        claimants = {A0: (ONE, TWO), Share("GPU-b", 0): (ONE,)}
        usage.set_holders({A0: TWO})
        assert usage.set_claimants(claimants)
        assert not usage.set_claimants(claimants)
        assert [(use.pod, use.shares) for use in usage.uses("GPU-a")] == [("one", 1), ("two", 1)]
        assert usage.loads([A], 0)["GPU-a"].allocated == 1

    def test_each_gpu_by_itself(self, usage: Usage) -> None:
        """A process can use two GPUs. Where the driver does not list a GPU's processes, use of it is unknown."""
        usage.set_holders({A0: ONE, A1: TWO, Share("GPU-b", 0): TWO})
        usage.set_owners({"GPU-a": used((7, 100, 30)), "GPU-c": used((7, 5, 1)), "GPU-b": Figures(1, 1, 1)}, {7: ONE})
        assert [each.memory_used for each in usage.uses("GPU-a")] == [100, 0]
        assert usage.uses("GPU-b") == (two(1, None, None, 0),)
        assert usage.uses("GPU-c") == (one(0, 5, 1, 1),)

    def test_changes(self, usage: Usage) -> None:
        """Each new list of holders or owners shows at once, also after a look; owners can become unknown."""
        figures = {"GPU-a": used((7, 100, 30))}
        usage.set_holders({A0: ONE})
        assert usage.uses("GPU-a") == (one(1, None, None, 0),)
        usage.set_owners(figures, {7: ONE})
        assert usage.uses("GPU-a") == (one(1, 100, 30, 1),)
        usage.set_holders({})
        assert usage.uses("GPU-a") == (one(0, 100, 30, 1),)
        usage.set_holders({A0: ONE})
        usage.set_owners(figures, None, "no cgroups")
        assert usage.uses("GPU-a") == (one(1, None, None, 0),)
        assert (usage.processes_known, usage.processes_problem) == (False, "no cgroups")
        usage.set_owners(figures, {})
        assert (usage.processes_known, usage.processes_problem) == (True, "")
        for exceeded in (50, 50, 40):
            usage.set_exceeded({"GPU-a": {ONE: exceeded}})
            assert [each.exceeded for each in usage.uses("GPU-a")] == [exceeded]

    def test_kept(self, usage: Usage) -> None:
        """A look after which all is as before, or which is about another GPU, makes nothing anew."""
        usage.set_holders({A0: ONE})
        usage.set_owners({"GPU-a": used((7, 100, 30))}, {7: ONE})
        before = usage.uses("GPU-a")
        usage.set_holders({A0: ONE, Share("GPU-b", 0): TWO})
        usage.set_owners({"GPU-a": used((7, 100, 30)), "GPU-b": used((8, 1, 1))}, {7: ONE, 8: TWO})
        assert usage.uses("GPU-a") is before

    @given(
        held=st.dictionaries(
            st.builds(Share, st.sampled_from(["GPU-a", "GPU-b"]), st.integers(0, 9)), st.sampled_from([ONE, TWO])
        ),
        processes=st.dictionaries(
            st.integers(1, 20), st.tuples(st.sampled_from([ONE, TWO, None]), st.integers(0, 100), st.integers(0, 9))
        ),
    )
    def test_sums(self, held: dict[Share, Container], processes: dict[int, tuple[Container | None, int, int]]) -> None:
        """Whoever has and uses what, nothing is lost and nothing is counted twice."""
        usage = Usage(INTERVAL)
        usage.set_holders(held)
        figures = used(*((pid, memory, percent) for pid, (_, memory, percent) in processes.items()))
        usage.set_owners({"GPU-a": figures}, {pid: owner for pid, (owner, _, _) in processes.items()})
        uses = usage.uses("GPU-a")
        assert sum(each.shares for each in uses) == sum(share.uuid == "GPU-a" for share in held)
        memory = sum(memory for _, memory, _ in processes.values())
        assert sum(each.memory_used or 0 for each in uses) == memory
        assert sum(each.processes for each in uses) == len(processes)
        names = [(each.namespace, each.pod, each.container) for each in uses]
        assert names == sorted(set(names))
        assert all(each.shares or each.processes for each in uses)
        assert sum(used or 0 for used in usage.pods("GPU-a").values()) == memory


class TestPods:
    def test_memory(self, usage: Usage) -> None:
        """Pods come with the most memory first, all containers together, then by name; an empty name for no pod."""
        usage.set_holders({A0: Container("team", "b", "main"), A1: Container("team", "a", "main")})
        c_x, c_y, d = (Container("team", *names) for names in (("c", "x"), ("c", "y"), ("d", "x")))
        usage.set_owners(
            {"GPU-a": used((1, 30, 0), (2, 30, 0), (3, 50, 0), (4, None, 0))}, {1: c_x, 2: c_y, 3: None, 4: d}
        )
        expected = [("team/c", 60), ("", 50), ("team/a", 0), ("team/b", 0), ("team/d", None)]
        assert list(usage.pods("GPU-a").items()) == expected

    def test_unknown(self, usage: Usage) -> None:
        """Pods come by name where their memory is unknown, and there are none where the kubelet lists none."""
        assert usage.pods("GPU-a") == {}
        usage.set_holders({A0: Container("team", "b", "main"), A1: Container("team", "a", "main")})
        assert list(usage.pods("GPU-a").items()) == [("team/a", None), ("team/b", None)]


def test_processes_of_some_pod(usage: Usage) -> None:
    """Where one may be any pod's, a container without known processes has unknown figures, and not 0."""
    usage.set_holders({A0: ONE, Share("GPU-b", 0): TWO})
    figures = {uuid: Figures(processes=(ProcessUse(7, 3, 10),)) for uuid in ("GPU-a", "GPU-b")}
    usage.set_owners(figures, {}, unknown={7})
    assert [use.memory_used for use in usage.uses("GPU-a")] == [None]
    usage.set_owners(figures, {})
    assert [use.memory_used for use in usage.uses("GPU-a")] == [0]
    usage.set_owners(figures, {7: TWO})
    assert {use.pod: use.memory_used for use in usage.uses("GPU-a")} == {"one": 0, "two": 3}
