"""The loop that withholds, on trio's virtual clock: a kubelet and a driver that say what the test wants."""

from __future__ import annotations

import itertools
import logging
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
from sgpu.recent import SETTLING_TIME
from sgpu.sampler import GIB, Sampling, sample, withhold
from sgpu.usage import Holder, Sample, Usage

RESOURCE = "example.com/gpu"
SHARES = 4
WATERMARK = 0.95
INTERVAL = 5.0


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

    async def list_holders(self, socket: Path, resources: Collection[str]) -> Mapping[str, Holder]:
        await trio.sleep(self.delay)
        self.asked.append((trio.current_time(), resources))
        if isinstance(self.answer, str):
            raise PodResourcesError(self.answer)
        return self.answer


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
            nursery.start_soon(sample, Sampling(Path("/pods.sock"), INTERVAL, watermark), world.catalog, world.usage)
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
            sampling = Sampling(Path("/pods.sock"), INTERVAL, WATERMARK)
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


class TestCancellation:
    @pytest.mark.parametrize("after", [0.5, INTERVAL], ids=["while asking", "while sleeping"])
    def test_cancelled(self, monkeypatch: pytest.MonkeyPatch, after: float) -> None:
        """It can be given up at either of its waits."""

        async def slow(socket: Path, resources: Collection[str]) -> Mapping[str, Holder]:
            await trio.sleep(1)
            return {}

        monkeypatch.setattr(sampler, "list_holders", slow)

        async def main() -> None:
            with trio.move_on_after(after) as scope:
                await sample(Sampling(Path("/x"), INTERVAL, WATERMARK), Catalog(Policy(RESOURCE, 1)), Usage(INTERVAL))
            assert scope.cancelled_caught

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
