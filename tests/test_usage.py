"""What is known of how the GPUs are used, and what a choice goes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.device import Device
from sgpu.placement import GpuLoad
from sgpu.recent import SETTLING_TIME
from sgpu.report import ProcessReport
from sgpu.snapshot import ContainerUse
from sgpu.usage import STALE_AFTER, Holder, Sample, Usage

pytestmark = pytest.mark.pure

INTERVAL = 5.0


def gpu(uuid: str, shares: int = 4, memory: int | None = 1000) -> Device:
    return Device(
        uuid=uuid, name="Tesla T4", pci_bus_id="00000000:00:04.0", shares=shares, device_nodes=(), memory_bytes=memory
    )


A, B = gpu("GPU-a"), gpu("GPU-b")


def held(words: str) -> Mapping[str, Holder]:
    """`a0 b1` → share 0 of GPU a and share 1 of GPU b, each held by a pod of that name."""
    return {f"GPU-{word[0]}::{word[1:]}": Holder("default", f"pod-{word}", "main") for word in words.split()}


@pytest.fixture
def usage() -> Usage:
    return Usage(INTERVAL)


class TestHolder:
    def test_text(self) -> None:
        """A holder is named as operators name pods; which container it is does not matter to them."""
        assert str(Holder("team", "trainer-0", "main")) == "team/trainer-0"


class TestAllocated:
    @pytest.mark.parametrize(
        ("holders", "given", "allocated"),
        [
            pytest.param(None, "", None, id="not known"),
            pytest.param(None, "a0", None, id="not known, whatever was given"),
            pytest.param("", "", "", id="none"),
            pytest.param("a0 b1", "", "a0 b1", id="held"),
            pytest.param("", "a0", "a0", id="given, and not listed yet"),
            pytest.param("a0", "a0 a1", "a0 a1", id="both"),
        ],
    )
    def test_allocated(self, usage: Usage, holders: str | None, given: str, allocated: str | None) -> None:
        """The shares that the kubelet lists and those just given; not known as long as the kubelet does not tell."""
        usage.held(None if holders is None else held(holders))
        for share_id in held(given):
            usage.recent.give(A, share_id, now=100)
        assert usage.allocated(100) == (None if allocated is None else set(held(allocated)))

    def test_at_first(self, usage: Usage) -> None:
        """Before the kubelet was asked, nothing is known."""
        assert usage.holders is None
        assert usage.allocated(0) is None

    def test_no_longer_told(self, usage: Usage) -> None:
        """A kubelet that no longer tells is not taken for one that says none."""
        usage.held(held("a0"))
        usage.held(None)
        assert usage.allocated(0) is None
        assert usage.loads([A], 0)["GPU-a"].allocated is None

    def test_given_long_ago(self, usage: Usage) -> None:
        """What was given and never appeared on the list is free again after a while."""
        usage.held({})
        usage.recent.give(A, "GPU-a::0", now=0)
        assert usage.allocated(SETTLING_TIME - 1) == frozenset({"GPU-a::0"})
        assert usage.allocated(SETTLING_TIME) == frozenset()

    def test_released(self, usage: Usage) -> None:
        """A container that is gone from the list has nothing, however recently it got it."""
        usage.recent.give(A, "GPU-a::0", now=0)
        usage.held(held("a0"))
        usage.held({})
        assert usage.allocated(1) == frozenset()


class TestLoads:
    @pytest.mark.parametrize(
        ("holders", "given", "counts"),
        [
            pytest.param(None, "", (None, None), id="not known"),
            pytest.param(None, "a0", (None, None), id="not known, whatever was given"),
            pytest.param("", "", (0, 0), id="none"),
            pytest.param("a0 b0 a3", "", (2, 1), id="held"),
            pytest.param("a0", "a1", (2, 0), id="held and given"),
            pytest.param("a0", "a0", (1, 0), id="the same share"),
            pytest.param("z0", "", (0, 0), id="of a GPU that is not there"),
        ],
    )
    def test_allocated(
        self, usage: Usage, holders: str | None, given: str, counts: tuple[int | None, int | None]
    ) -> None:
        """How many shares of each GPU containers have, those just given included, each once."""
        for share_id in held(given):
            usage.recent.give(A, share_id, now=0)
        usage.held(None if holders is None else held(holders))
        loads = usage.loads([A, B], 1)
        assert (loads["GPU-a"].allocated, loads["GPU-b"].allocated) == counts

    def test_uuids_that_begin_alike(self, usage: Usage) -> None:
        """A GPU is not taken for another whose UUID goes on where its own ends."""
        usage.held({"GPU-a1::0": Holder("default", "other", "main")})
        assert usage.loads([gpu("GPU-a")], 0)["GPU-a"].allocated == 0
        assert usage.uses("GPU-a") == ()

    def test_sample(self, usage: Usage) -> None:
        """Free memory and utilisation are those of the sample; a GPU without one has neither."""
        usage.sampled({"GPU-a": Sample(memory_total=1000, memory_free=700, utilisation=20)}, now=0)
        assert usage.loads([A, B], 1) == {
            "GPU-a": GpuLoad(allocated=None, shares=4, free_memory=700, utilisation=20),
            "GPU-b": GpuLoad(allocated=None, shares=4, free_memory=None, utilisation=None),
        }

    @pytest.mark.parametrize(
        ("sample", "free", "utilisation"),
        [
            pytest.param(Sample(None, None, 20), None, 20, id="memory"),
            pytest.param(Sample(1000, 700, None), 700, None, id="utilisation"),
            pytest.param(Sample(1000, 0, 0), 0, 0, id="zero is known"),
        ],
    )
    def test_not_supported(self, usage: Usage, sample: Sample, free: int | None, utilisation: int | None) -> None:
        """What a GPU does not tell is not known; what it does tell is."""
        usage.sampled({"GPU-a": sample}, now=0)
        load = usage.loads([A], 0)["GPU-a"]
        assert (load.free_memory, load.utilisation) == (free, utilisation)

    @pytest.mark.parametrize(
        ("age", "free"),
        [
            pytest.param(0, 700, id="new"),
            pytest.param(STALE_AFTER * INTERVAL, 700, id="just not stale"),
            pytest.param(STALE_AFTER * INTERVAL + 0.1, None, id="stale"),
        ],
    )
    def test_stale(self, usage: Usage, age: float, free: int | None) -> None:
        """A sample that is several intervals old says nothing of the GPU now; who has which share is known still."""
        usage.held(held("a0"))
        usage.sampled({"GPU-a": Sample(1000, 700, 20)}, now=100)
        load = usage.loads([A], 100 + age)["GPU-a"]
        assert load.free_memory == free
        assert load.utilisation == (None if free is None else 20)
        assert load.allocated == 1

    def test_fresh_again(self, usage: Usage) -> None:
        """A sample after a pause counts like any other."""
        usage.sampled({"GPU-a": Sample(1000, 700, 20)}, now=0)
        usage.sampled({"GPU-a": Sample(1000, 600, 30)}, now=1000)
        assert usage.loads([A], 1001)["GPU-a"].free_memory == 600

    def test_given_counts_as_used(self, usage: Usage) -> None:
        """A share handed out moments ago takes its part of the memory before the model is loaded, and not for ever."""
        usage.sampled({"GPU-a": Sample(1000, 700, 0), "GPU-b": Sample(1000, 700, 0)}, now=0)
        usage.recent.give(A, "GPU-a::0", now=0)
        usage.recent.give(A, "GPU-a::1", now=0)
        loads = usage.loads([A, B], 1)
        assert (loads["GPU-a"].free_memory, loads["GPU-b"].free_memory) == (200, 700)
        usage.sampled({"GPU-a": Sample(1000, 150, 0)}, now=SETTLING_TIME)
        assert usage.loads([A], SETTLING_TIME)["GPU-a"].free_memory == 150

    def test_more_given_than_free(self, usage: Usage) -> None:
        """No GPU has less than no memory free."""
        usage.sampled({"GPU-a": Sample(1000, 100, 0)}, now=0)
        usage.recent.give(A, "GPU-a::0", now=0)
        assert usage.loads([A], 0)["GPU-a"].free_memory == 0

    @given(words=st.lists(st.tuples(st.sampled_from("abz"), st.integers(0, 9), st.booleans())))
    def test_counts_agree(self, words: list[tuple[str, int, bool]]) -> None:
        """Whatever is held and given: the counts are those of the allocated shares."""
        usage = Usage(INTERVAL)
        usage.held(held(" ".join(f"{name}{number}" for name, number, is_held in words if is_held)))
        for name, number, is_held in words:
            if not is_held:
                usage.recent.give(gpu(f"GPU-{name}"), f"GPU-{name}::{number}", now=0)
        loads = usage.loads([A, B], 0)
        allocated = usage.allocated(0) or frozenset()
        for device in (A, B):
            prefix = device.uuid + "::"
            assert loads[device.uuid].allocated == sum(share_id.startswith(prefix) for share_id in allocated)


def use(words: str, shares: int, memory: int | None, utilisation: int | None, processes: int) -> ContainerUse:
    """What `namespace/pod/container` takes; empty: those of no pod."""
    namespace, pod, container = (words or "//").split("/")
    return ContainerUse(namespace, pod, container, shares, memory, utilisation, processes)


def used(*processes: tuple[int, int | None, int | None]) -> Sample:
    """A GPU with these processes: id, bytes and percent."""
    return Sample(1000, 500, 50, tuple(ProcessReport(*process) for process in processes))


ONE, TWO = Holder("team", "one", "main"), Holder("team", "two", "main")


class TestUses:
    HELD: ClassVar = {
        "GPU-a::0": ONE,
        "GPU-a::1": TWO,
        "GPU-a::2": ONE,
        "GPU-b::0": TWO,
        "GPU-a::3": Holder("other", "z", "side"),
    }

    def test_shares(self, usage: Usage) -> None:
        """Where no more is known: each container with a share of this GPU once, in order."""
        usage.held(self.HELD)
        assert usage.uses("GPU-a") == (
            use("other/z/side", 1, None, None, 0),
            use("team/one/main", 2, None, None, 0),
            use("team/two/main", 1, None, None, 0),
        )
        assert usage.uses("GPU-b") == (use("team/two/main", 1, None, None, 0),)
        assert usage.uses("GPU-c") == ()
        assert not usage.processes_known

    @pytest.mark.parametrize(
        ("processes", "owners", "expected"),
        [
            pytest.param([], {}, [use("team/one/main", 2, 0, 0, 0)], id="none"),
            pytest.param([(7, 100, 30)], {7: ONE}, [use("team/one/main", 2, 100, 30, 1)], id="one"),
            pytest.param(
                [(7, 100, 30), (8, 5, 40)], {7: ONE, 8: ONE}, [use("team/one/main", 2, 105, 70, 2)], id="two of one"
            ),
            pytest.param(
                [(7, 100, 70), (8, 5, 31)],
                {7: ONE, 8: ONE},
                [use("team/one/main", 2, 105, 100, 2)],
                id="never over 100",
            ),
            pytest.param(
                [(7, 100, 30), (8, None, 1)],
                {7: ONE, 8: ONE},
                [use("team/one/main", 2, None, 31, 2)],
                id="memory unknown",
            ),
            pytest.param(
                [(7, 100, None), (8, 5, None)],
                {7: ONE, 8: ONE},
                [use("team/one/main", 2, 105, None, 2)],
                id="utilisation unknown",
            ),
            pytest.param(
                [(7, 100, 30), (8, 5, 1)],
                {7: ONE, 8: TWO},
                [use("team/one/main", 2, 100, 30, 1), use("team/two/main", 0, 5, 1, 1)],
                id="without a share",
            ),
            pytest.param(
                [(7, 100, 30), (8, 5, 1), (9, 6, 2)],
                {7: ONE, 8: None, 9: None},
                [use("", 0, 11, 3, 2), use("team/one/main", 2, 100, 30, 1)],
                id="of no pod",
            ),
            pytest.param([(7, 100, 30), (8, 5, 1)], {7: ONE}, [use("team/one/main", 2, 100, 30, 1)], id="ended"),
        ],
    )
    def test_processes(
        self,
        usage: Usage,
        processes: list[tuple[int, int | None, int | None]],
        owners: dict[int, Holder | None],
        expected: list[ContainerUse],
    ) -> None:
        """What its processes take, together; those of no pod under an empty name; what is not known is not guessed."""
        usage.held({"GPU-a::0": ONE, "GPU-a::1": ONE})
        usage.owned({"GPU-a": used(*processes)}, owners)
        assert usage.processes_known
        assert list(usage.uses("GPU-a")) == expected

    def test_each_gpu_by_itself(self, usage: Usage) -> None:
        """A process that uses two has something of each; one GPU may tell nothing."""
        usage.held(self.HELD)
        usage.owned({"GPU-a": used((7, 100, 30)), "GPU-c": used((7, 5, 1)), "GPU-b": Sample(1, 1, 1)}, {7: ONE})
        assert [each.memory_used for each in usage.uses("GPU-a")] == [0, 100, 0]
        assert usage.uses("GPU-b") == (use("team/two/main", 1, None, None, 0),)
        assert usage.uses("GPU-c") == (use("team/one/main", 0, 5, 1, 1),)

    def test_gone(self, usage: Usage) -> None:
        """What is no longer there is not shown any more."""
        usage.held(self.HELD)
        usage.owned({"GPU-a": used((7, 100, 30))}, {7: ONE})
        usage.held({})
        assert usage.uses("GPU-a") == (use("team/one/main", 0, 100, 30, 1),)
        usage.owned({"GPU-a": used()}, {})
        assert usage.uses("GPU-a") == ()

    def test_no_longer_told(self, usage: Usage) -> None:
        """Is not known."""
        usage.held({"GPU-a::0": ONE})
        usage.owned({"GPU-a": used((7, 100, 30))}, {7: ONE})
        usage.owned({"GPU-a": used((7, 100, 30))}, None)
        assert usage.uses("GPU-a") == (use("team/one/main", 1, None, None, 0),)
        assert not usage.processes_known

    @given(
        held=st.dictionaries(
            st.builds("GPU-{}::{}".format, st.sampled_from("ab"), st.integers(0, 9)), st.sampled_from([ONE, TWO])
        ),
        processes=st.dictionaries(
            st.integers(1, 20), st.tuples(st.sampled_from([ONE, TWO, None]), st.integers(0, 100), st.integers(0, 9))
        ),
    )
    def test_sums(self, held: dict[str, Holder], processes: dict[int, tuple[Holder | None, int, int]]) -> None:
        """Whoever has and uses what: nothing is lost, and nothing counted twice."""
        usage = Usage(INTERVAL)
        usage.held(held)
        sample = used(*((pid, memory, percent) for pid, (_, memory, percent) in processes.items()))
        usage.owned({"GPU-a": sample}, {pid: owner for pid, (owner, _, _) in processes.items()})
        uses = usage.uses("GPU-a")
        assert sum(each.shares for each in uses) == sum(share_id.startswith("GPU-a") for share_id in held)
        assert sum(each.memory_used or 0 for each in uses) == sum(memory for _, memory, _ in processes.values())
        assert sum(each.processes for each in uses) == len(processes)
        names = [(each.namespace, each.pod, each.container) for each in uses]
        assert names == sorted(set(names))
        assert all(each.shares or each.processes for each in uses)
        assert sum(used or 0 for used in usage.pods("GPU-a").values()) == sum(each.memory_used or 0 for each in uses)


class TestPods:
    def test_memory(self, usage: Usage) -> None:
        """That with most first, whatever container has it; then by name; those of no pod under an empty one."""
        usage.held({"GPU-a::0": Holder("team", "b", "main"), "GPU-a::1": Holder("team", "a", "main"), "GPU-b::0": TWO})
        owners = {1: Holder("team", "c", "x"), 2: Holder("team", "c", "y"), 3: None, 4: Holder("team", "d", "x")}
        usage.owned({"GPU-a": used((1, 30, 0), (2, 30, 0), (3, 50, 0), (4, None, 0))}, owners)
        assert list(usage.pods("GPU-a").items()) == [
            ("team/c", 60),
            ("", 50),
            ("team/a", 0),
            ("team/b", 0),
            ("team/d", None),
        ]

    def test_not_known(self, usage: Usage) -> None:
        """By name."""
        usage.held({"GPU-a::0": Holder("team", "b", "main"), "GPU-a::1": Holder("team", "a", "main")})
        assert list(usage.pods("GPU-a").items()) == [("team/a", None), ("team/b", None)]
        assert usage.pods("GPU-c") == {}

    def test_nothing_known(self, usage: Usage) -> None:
        """None are named where the kubelet does not tell."""
        assert usage.pods("GPU-a") == {}
