"""The loop that withholds, on trio's virtual clock: a kubelet and a driver that say what the test wants."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from sgpu import sampler
from sgpu.catalog import Catalog
from sgpu.device import Device
from sgpu.inventory import Inventory
from sgpu.podresources import TIMEOUT, PodResourcesError
from sgpu.policy import Policy
from sgpu.processes import HOST_NAMESPACE, Places
from sgpu.recent import SETTLING_TIME
from sgpu.report import ProcessReport
from sgpu.sampler import Sampling, sample, withhold
from sgpu.units import GIB
from sgpu.usage import Holder, Sample, Usage

RESOURCE = "example.com/gpu"
SHARES = 4
WATERMARK = 0.95
INTERVAL = 5.0
NOWHERE = Places(Path("/nowhere/proc"), Path("/nowhere/containers"))


def gpu(uuid: str) -> Device:
    return Device(
        uuid=uuid,
        name="Tesla T4",
        pci_bus_id="00000000:3B:00.0",
        shares=SHARES,
        device_nodes=(),
        memory_bytes=100 * GIB,
    )


def percent(used: int) -> Sample:
    """A GPU with this much of its memory used."""
    return Sample(memory_total=100 * GIB, memory_free=(100 - used) * GIB, utilisation=0)


def held(words: str) -> dict[str, Holder]:
    """`a0 b1` → share 0 of GPU a and share 1 of GPU b, each held by a pod of that name."""
    return {f"GPU-{word[0]}::{word[1:]}": Holder("team", f"pod-{word}", "main") for word in words.split()}


@attrs.define
class FakeKubelet:
    """Answers what it is told to, or fails. `asked` has when and for which resources."""

    answer: Mapping[str, Holder] | str = attrs.field(factory=dict)
    asked: list[tuple[float, Collection[str]]] = attrs.field(factory=list)
    delay: float = 0.0

    async def list_holders(self, socket: Path, resources: Collection[str]) -> Mapping[str, Mapping[str, Holder]]:
        await trio.sleep(self.delay)
        self.asked.append((trio.current_time(), resources))
        if isinstance(self.answer, str):
            raise PodResourcesError(self.answer)
        return dict.fromkeys(resources, self.answer)


class World:
    """Two GPUs, what is known of them, and the loop at work; one round of it is an interval."""

    def __init__(self, kubelet: FakeKubelet) -> None:
        self.kubelet = kubelet
        self.usage = Usage(INTERVAL)
        self.catalog = Catalog(Policy(RESOURCE, SHARES))
        self.catalog.replace((gpu("GPU-a"), gpu("GPU-b")))
        self.inventory = self.catalog.inventories[RESOURCE]

    async def round(self, **used: int | None) -> str:
        """Give the GPUs so many percent of used memory, wait for the next round, and say what is withheld then."""
        samples = {
            f"GPU-{name}": Sample(None, None, 0) if part is None else percent(part) for name, part in used.items()
        }
        self.usage.sampled({**self.usage.samples, **samples}, trio.current_time())
        await trio.sleep(INTERVAL)
        return shown(self.inventory)


def shown(inventory: Inventory) -> str:
    """`a0 b1`, as `held` reads it, of the shares that are withheld."""
    return " ".join(f"{device.uuid[-1]}{number}" for device in inventory.devices for number in sorted(device.withheld))


@pytest.fixture
def kubelet(monkeypatch: pytest.MonkeyPatch) -> FakeKubelet:
    fake = FakeKubelet()
    monkeypatch.setattr(sampler, "list_holders", fake.list_holders)
    return fake


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged so far, at any level."""
    with caplog.at_level(logging.DEBUG, "sgpu"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "sgpu.sampler"]


def virtual(kubelet: FakeKubelet, test: Callable[[World], Awaitable[None]], watermark: float = WATERMARK) -> World:
    """Run the loop and the test beside it, half an interval apart, on a clock that jumps."""
    world = World(kubelet)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                sample, Sampling(Path("/pods.sock"), INTERVAL, watermark, NOWHERE), world.catalog, world.usage
            )
            await trio.sleep(INTERVAL / 2)
            await test(world)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return world


class TestLoop:
    def test_it_asks_each_interval(self, kubelet: FakeKubelet) -> None:
        """At once, and from then on once an interval, for the resources that are offered."""

        async def test(world: World) -> None:
            await trio.sleep(10 * INTERVAL)

        virtual(kubelet, test)
        times = [time - kubelet.asked[0][0] for time, _ in kubelet.asked]
        assert times == pytest.approx([INTERVAL * number for number in range(11)])
        assert {tuple(resources) for _, resources in kubelet.asked} == {(RESOURCE,)}

    @pytest.mark.parametrize("delay", [0.0, TIMEOUT], ids=["at once", "late"])
    def test_it_says_when_it_is_heard_of_again(self, kubelet: FakeKubelet, delay: float) -> None:
        """However long the kubelet takes to answer."""
        kubelet.delay = delay
        said: list[tuple[float, float]] = []

        async def main() -> None:
            sampling = Sampling(Path("/pods.sock"), INTERVAL, WATERMARK, NOWHERE)
            with trio.move_on_after(20 * INTERVAL):
                await sample(
                    sampling,
                    Catalog(Policy(RESOURCE, SHARES)),
                    Usage(INTERVAL),
                    lambda seconds: said.append((trio.current_time(), seconds)),
                )

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert len(said) > 5
        for (time, seconds), (later, _) in itertools.pairwise(said):
            assert later <= time + seconds

    def test_only_the_free_shares_of_a_full_gpu(self, kubelet: FakeKubelet) -> None:
        """Neither those that containers have, nor the other GPU's."""
        kubelet.answer = held("a1 a3 b0")

        async def test(world: World) -> None:
            assert await world.round(a=10, b=10) == ""
            assert await world.round(a=96, b=10) == "a0 a2"

        virtual(kubelet, test)

    def test_hysteresis(self, kubelet: FakeKubelet) -> None:
        """Above the watermark they go, and they come back 5 points below it, not before."""

        async def test(world: World) -> None:
            assert await world.round(a=95, b=10) == ""
            assert await world.round(a=96) == "a0 a1 a2 a3"
            assert await world.round(a=94) == "a0 a1 a2 a3"
            assert await world.round(a=91) == "a0 a1 a2 a3"
            assert await world.round(a=90) == ""
            assert await world.round(a=95) == ""

        virtual(kubelet, test)

    def test_a_share_that_comes_free_while_the_gpu_is_full(self, kubelet: FakeKubelet) -> None:
        """It is withheld from then on; one that was handed out in between is not."""
        kubelet.answer = held("a0 a1 a2")

        async def test(world: World) -> None:
            assert await world.round(a=96) == "a3"
            kubelet.answer = held("a0 a1")
            assert await world.round(a=96) == "a2 a3"
            world.usage.recent.give(gpu("GPU-a"), "GPU-a::3", trio.current_time())
            assert await world.round(a=96) == "a2"
            kubelet.answer = held("a0 a1 a3")
            assert await world.round(a=96) == "a2"

        virtual(kubelet, test)

    def test_what_was_handed_out_moments_ago_is_not_withheld(self, kubelet: FakeKubelet) -> None:
        """Though the kubelet's list lacks it, as it is made while pods are admitted."""

        async def test(world: World) -> None:
            world.usage.recent.give(gpu("GPU-a"), "GPU-a::2", trio.current_time())
            assert await world.round(a=96) == "a0 a1 a3"
            await trio.sleep(SETTLING_TIME)
            assert await world.round(a=96) == "a0 a1 a2 a3"

        virtual(kubelet, test)

    @pytest.mark.parametrize("watermark", [0.0, 1.0], ids=["off", "never exceeded"])
    def test_switched_off(self, kubelet: FakeKubelet, watermark: float) -> None:
        """Nothing is withheld, however full."""

        async def test(world: World) -> None:
            assert await world.round(a=100, b=100) == ""

        virtual(kubelet, test, watermark)

    def test_memory_not_supported(self, kubelet: FakeKubelet) -> None:
        """A GPU that does not tell its memory is left alone, and no other one for that."""

        async def test(world: World) -> None:
            assert await world.round(a=None, b=96) == "b0 b1 b2 b3"

        virtual(kubelet, test)

    def test_a_gpu_that_comes_later(self, kubelet: FakeKubelet) -> None:
        """It is looked at like those before it, and one that goes is forgotten."""

        async def test(world: World) -> None:
            assert await world.round(a=96, c=96) == "a0 a1 a2 a3"
            world.catalog.replace((gpu("GPU-c"), gpu("GPU-b")))
            assert await world.round(c=96) == "c0 c1 c2 c3"

        virtual(kubelet, test)

    def test_nobody_is_woken_without_a_change(self, kubelet: FakeKubelet) -> None:
        """Round after round with the same is no news for the kubelet."""

        async def test(world: World) -> None:
            await world.round(a=96)
            changed = world.inventory.changed
            for used in (96, 99, 93, 97):
                await world.round(a=used, b=used - 50)
            assert world.inventory.changed is changed

        virtual(kubelet, test)


class TestUnknown:
    def test_nothing_is_withheld(self, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """Without PodResources the feature is off, and says so once."""
        kubelet.answer = "nobody there"

        async def test(world: World) -> None:
            for _ in range(5):
                assert await world.round(a=99) == ""

        virtual(kubelet, test)
        assert messages() == [
            "which shares are in use is not known, so that none is withheld: nobody there",
        ]

    def test_it_comes_later(self, kubelet: FakeKubelet) -> None:
        """From then on, free shares are withheld."""
        kubelet.answer = "nobody there"

        async def test(world: World) -> None:
            assert await world.round(a=99) == ""
            kubelet.answer = held("a0")
            assert await world.round(a=99) == "a1 a2 a3"

        virtual(kubelet, test)

    def test_it_goes_away(self, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """For a moment, as when the kubelet restarts, what it said last holds; after that nothing is withheld.

        Because it may be in use by then. Each time it goes is told.
        """
        kubelet.answer = held("a0")

        async def test(world: World) -> None:
            for _ in range(2):
                assert await world.round(a=99) == "a1 a2 a3"
                kubelet.answer = "nobody there"
                for _ in range(sampler.TOLERATED - 1):
                    assert await world.round(a=99) == "a1 a2 a3"
                assert await world.round(a=99) == ""
                assert await world.round(a=99) == ""
                kubelet.answer = held("a0")

        virtual(kubelet, test)
        assert sum("is not known" in message for message in messages()) == 2

    def test_what_is_kept_stays_known(self, kubelet: FakeKubelet) -> None:
        """A share beyond the number that there are now is known by its id as long as a container has it.

        That the kubelet does not tell for a while is no sign that it is free.
        """
        kubelet.answer = held("a7")

        async def test(world: World) -> None:
            await world.round()
            assert world.inventory.find("GPU-a::7") is not None
            kubelet.answer = "nobody there"
            await world.round()
            assert world.inventory.find("GPU-a::7") is not None
            kubelet.answer = {}
            await world.round()
            assert world.inventory.find("GPU-a::7") is None

        virtual(kubelet, test)


class TestLog:
    def test_once_a_change(self, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """How full the GPU is and whose pods use it, when it becomes full; and when that is over."""
        kubelet.answer = held("a0 a1 b0")

        async def test(world: World) -> None:
            for used in (10, 96, 97, 92, 90, 10):
                await world.round(a=used)

        virtual(kubelet, test)
        assert messages() == [
            "GPU GPU-a: its memory is full: 96.0 of 100.0 GiB are used, by team/pod-a0, team/pod-a1; "
            "its free shares are withheld",
            "GPU GPU-a: its free shares are no longer withheld",
        ]

    def test_by_none_of_ours(self, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """Memory that no pod of ours uses is told as such: something else runs there."""

        async def test(world: World) -> None:
            await world.round(a=96)

        virtual(kubelet, test)
        (line,) = messages()
        assert "by no pod that has a share of it" in line

    def test_each_gpu(self, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """A line for each, in order."""

        async def test(world: World) -> None:
            await world.round(b=96, a=97)

        virtual(kubelet, test)
        assert [message.split(":")[0] for message in messages()] == ["GPU GPU-a", "GPU GPU-b"]


class TestWithhold:
    def test_every_inventory(self) -> None:
        """GPUs that are offered under different names are each looked at."""
        usage = Usage(INTERVAL)
        usage.held(held("a0 b0"))
        usage.sampled({"GPU-a": percent(96), "GPU-b": percent(97)}, now=0)
        inventories = [Inventory([gpu("GPU-a")]), Inventory([gpu("GPU-b")]), Inventory()]
        assert withhold(WATERMARK, inventories, usage, frozenset(), now=0) == {"GPU-a", "GPU-b"}
        assert [shown(inventory) for inventory in inventories] == ["a1 a2 a3", "b1 b2 b3", ""]

    def test_not_known(self) -> None:
        """As long as it is not known which shares are in use, none is withheld, and those that were no more."""
        usage = Usage(INTERVAL)
        inventory = Inventory([gpu("GPU-a")])
        inventory.withhold({"GPU-a": frozenset({1})})
        usage.sampled({"GPU-a": percent(99)}, now=0)
        assert withhold(WATERMARK, [inventory], usage, frozenset({"GPU-a"}), now=0) == set()
        assert shown(inventory) == ""


class TestPods:
    """Whom the log names when a GPU is full."""

    POD_0, POD_1 = Holder("team", "pod-a0", "main"), Holder("team", "pod-a1", "main")

    @pytest.mark.parametrize(
        ("processes", "words"),
        [
            pytest.param(None, "team/pod-a0, team/pod-a1", id="not known"),
            pytest.param([], "team/pod-a0, team/pod-a1", id="none"),
            pytest.param([(1, POD_0, 2), (2, POD_1, 90)], "team/pod-a1 (90.0 GiB), team/pod-a0 (2.0 GiB)", id="both"),
            pytest.param([(1, POD_1, 90)], "team/pod-a1 (90.0 GiB)", id="one of them"),
            pytest.param([(1, POD_1, 90), (2, POD_1, 2)], "team/pod-a1 (92.0 GiB)", id="with two processes"),
            pytest.param([(1, POD_1, None)], "team/pod-a1", id="one that is not known"),
            pytest.param(
                [(1, Holder("x", "y", "z"), 90), (2, None, 3), (3, POD_0, 1)],
                "x/y (90.0 GiB), processes of no pod (3.0 GiB), team/pod-a0 (1.0 GiB)",
                id="without a share",
            ),
        ],
    )
    def test_log(
        self,
        messages: Callable[[], list[str]],
        processes: list[tuple[int, Holder | None, int | None]] | None,
        words: str,
    ) -> None:
        """Those that use most of it first, with what they use, as far as it is known."""
        usage = Usage(INTERVAL)
        usage.held(held("a0 a1 b0"))
        samples = {"GPU-a": percent(96)}
        if processes is not None:
            told = tuple(ProcessReport(pid, None if used is None else used * GIB, 0) for pid, _, used in processes)
            samples = {"GPU-a": attrs.evolve(percent(96), processes=told)}
        usage.sampled(samples, now=0)
        usage.owned(samples, {pid: owner for pid, owner, _ in processes or ()})
        withhold(WATERMARK, [Inventory([gpu("GPU-a")])], usage, frozenset(), now=0)
        assert messages() == [
            f"GPU GPU-a: its memory is full: 96.0 of 100.0 GiB are used, by {words}; its free shares are withheld"
        ]


class TestAttribution:
    """Whose the processes are, with a /proc that the test makes."""

    ID = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"

    @pytest.fixture
    def places(self, tmp_path: Path) -> Places:
        """One process of a pod (7), one of the host (8), and an MPS server (9)."""
        places = Places(tmp_path / "proc", tmp_path / "containers")
        (places.proc / "self/ns").mkdir(parents=True)
        (places.proc / "self/ns/pid").symlink_to(HOST_NAMESPACE)
        for pid, name, path in ((7, "python", f"/kubepods/pod1/{self.ID}"), (8, "X", "/"), (9, "nvidia-cuda-mps", "/")):
            (places.proc / str(pid)).mkdir()
            (places.proc / str(pid) / "cgroup").write_text(f"0::{path}\n")
            (places.proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {'1 ' * 18} 1 0\n")
        places.container_logs.mkdir()
        (places.container_logs / f"one_team_main-{self.ID}.log").touch()
        return places

    def run(self, places: Places, usage: Usage, kubelet: FakeKubelet, until: Callable[[], object]) -> None:
        """The loop, with a short interval, until that is so."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                sampling = Sampling(Path("/pods.sock"), 0.01, WATERMARK, places)
                nursery.start_soon(sample, sampling, Catalog(Policy(RESOURCE, SHARES)), usage)
                with trio.fail_after(10):
                    while not until():
                        usage.sampled(usage.samples, trio.current_time())
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

        trio.run(main)

    def told(self, *pids: int) -> Sample:
        return Sample(100, 50, 10, tuple(ProcessReport(pid, pid * 10, 5) for pid in pids))

    def test_each(self, places: Places, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """The pod's and nobody's; one that has ended is not shown; and it goes with the next sample."""
        kubelet.answer = held("a0")
        usage = Usage(INTERVAL)
        usage.sampled({"GPU-a": self.told(6, 7, 8), "GPU-b": self.told()}, 0)
        self.run(places, usage, kubelet, lambda: usage.processes_known)
        shown = [(use.namespace, use.pod, use.shares, use.memory_used, use.processes) for use in usage.uses("GPU-a")]
        assert shown == [("", "", 0, 80, 1), ("team", "one", 0, 70, 1), ("team", "pod-a0", 1, 0, 0)]
        assert usage.uses("GPU-b") == ()
        usage.sampled({"GPU-a": self.told()}, 0)
        kubelet.answer = {}
        self.run(places, usage, kubelet, lambda: not usage.uses("GPU-a"))
        assert messages() == []

    def test_a_disk_that_hangs(self, places: Places, kubelet: FakeKubelet, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is left behind when the daemon stops."""
        asked, over, done = threading.Event(), threading.Event(), threading.Event()

        def hang(*_: object) -> None:
            asked.set()
            over.wait(10)
            done.set()

        monkeypatch.setattr("sgpu.processes.find_owners", hang)
        kubelet.answer = {}
        usage = Usage(INTERVAL)
        usage.sampled({"GPU-a": self.told(7)}, 0)
        try:
            self.run(places, usage, kubelet, asked.is_set)
            assert not done.is_set()
        finally:
            over.set()

    def test_though_the_kubelet_does_not_tell(self, places: Places, kubelet: FakeKubelet) -> None:
        """It needs no PodResources."""
        kubelet.answer = "nobody there"
        usage = Usage(INTERVAL)
        usage.sampled({"GPU-a": self.told(7)}, 0)
        self.run(places, usage, kubelet, lambda: usage.uses("GPU-a"))
        assert [(use.pod, use.memory_used) for use in usage.uses("GPU-a")] == [("one", 70)]

    def test_it_can_t_be_told(self, places: Places, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """Is said once, with what to do; what was known is not shown on; the shares are."""
        kubelet.answer = held("a0")
        usage = Usage(INTERVAL)
        usage.sampled({"GPU-a": self.told(7)}, 0)
        self.run(places, usage, kubelet, lambda: usage.processes_known)
        (places.proc / "self/ns/pid").unlink()
        (places.proc / "self/ns/pid").symlink_to("pid:[4026532281]")
        rounds = len(kubelet.asked)
        self.run(places, usage, kubelet, lambda: len(kubelet.asked) > rounds + 3)
        assert not usage.processes_known
        assert [(use.pod, use.shares, use.memory_used) for use in usage.uses("GPU-a")] == [("pod-a0", 1, None)]
        (message,) = messages()
        assert message.startswith("which pod uses how much of a GPU is not known: the host's process ids are not seen")
        assert message.endswith("set hostPID: true for the pod")
        assert message.endswith(f": {usage.processes_trouble}")
        assert usage.processes_trouble.startswith("the host's")

    def test_the_driver_does_not_tell(
        self, places: Places, kubelet: FakeKubelet, messages: Callable[[], list[str]]
    ) -> None:
        """Then nobody is looked for, and nothing said."""
        usage = Usage(INTERVAL)
        usage.sampled({"GPU-a": percent(10)}, 0)
        self.run(NOWHERE, usage, kubelet, lambda: len(kubelet.asked) > 2)
        assert not usage.processes_known
        assert not usage.processes_trouble
        assert messages() == []

    def test_the_driver_no_longer_answers(self, places: Places) -> None:
        """What it said long ago is not shown on."""
        usage = Usage(INTERVAL)

        async def main() -> None:
            attribution = sampler._Attribution(places, usage)
            for age in (0.0, 100 * INTERVAL):
                usage.sampled({"GPU-a": self.told(7)}, trio.current_time() - age)
                await attribution.update()
                assert usage.processes_known is (not age)
                assert len(usage.uses("GPU-a")) == (not age)

        trio.run(main)

    def test_mps(self, places: Places, kubelet: FakeKubelet, messages: Callable[[], list[str]]) -> None:
        """A server that stands for others is told once for each GPU."""
        usage = Usage(INTERVAL)
        usage.sampled({"GPU-a": self.told(9), "GPU-b": self.told(7)}, 0)
        self.run(places, usage, kubelet, lambda: len(kubelet.asked) > 3)
        assert messages() == [
            "GPU GPU-a: an MPS server uses it; what is not known of its clients is shown as the server's"
        ]


class TestCancellation:
    @pytest.mark.parametrize("after", [0.5, INTERVAL], ids=["while asking", "while sleeping"])
    def test_cancelled(self, monkeypatch: pytest.MonkeyPatch, after: float) -> None:
        """It can be given up at either of its waits."""

        async def slow(socket: Path, resources: Collection[str]) -> Mapping[str, Mapping[str, Holder]]:
            await trio.sleep(1)
            return {}

        monkeypatch.setattr(sampler, "list_holders", slow)

        async def main() -> None:
            with trio.move_on_after(after) as scope:
                await sample(
                    Sampling(Path("/x"), INTERVAL, WATERMARK, NOWHERE), Catalog(Policy(RESOURCE, 1)), Usage(INTERVAL)
                )
            assert scope.cancelled_caught

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
