"""The one piece of changing state, on trio's virtual clock."""

from __future__ import annotations

import attrs
import pytest
import trio
import trio.testing

from sgpu.device import Device, Health
from sgpu.inventory import Inventory
from sgpu.simulation import simulated_devices

pytestmark = pytest.mark.pure

FIRST = Device(uuid="GPU-a", name="Tesla T4", pci_bus_id="0:3B:0.0", shares=2, device_nodes=("nvidia0",))
SECOND = Device(uuid="GPU-b", name="Tesla T4", pci_bus_id="0:5E:0.0", shares=20, device_nodes=("nvidia1",))
SICK = attrs.evolve(FIRST, health=Health.UNHEALTHY, reason="XID 79")


class TestFind:
    @pytest.mark.parametrize(
        ("share_id", "device"),
        [
            pytest.param("GPU-a::0", FIRST, id="first share"),
            pytest.param("GPU-a::1", FIRST, id="last share"),
            pytest.param("GPU-a::2", None, id="one past the last share"),
            pytest.param("GPU-b::2", SECOND, id="the number counts for its own GPU"),
            pytest.param("GPU-c::0", None, id="no such GPU"),
            pytest.param("GPU-a", None, id="a UUID is no share"),
            pytest.param("", None, id="empty"),
        ],
    )
    def test_find(self, share_id: str, device: Device | None) -> None:
        """A share id leads to its GPU, and only to a share that the GPU has."""
        assert Inventory([FIRST, SECOND]).find(share_id) is device

    def test_empty(self) -> None:
        """Before GPUs are found there are none."""
        inventory = Inventory()
        assert inventory.devices == ()
        assert inventory.find("GPU-a::0") is None

    def test_after_replace(self) -> None:
        """Shares are looked up among the GPUs there are now: changed ones as they are, and gone ones not at all."""
        inventory = Inventory([FIRST, SECOND])
        inventory.replace([SICK])
        assert inventory.find("GPU-a::0") is SICK
        assert inventory.find("GPU-b::0") is None


class TestReplace:
    def test_swapped_whole(self) -> None:
        """Who holds the old list keeps it as it was."""
        inventory = Inventory([FIRST])
        before = inventory.devices
        inventory.replace(iter([FIRST, SECOND]))
        assert before == (FIRST,)
        assert inventory.devices == (FIRST, SECOND)

    def test_every_waiter_is_woken(self) -> None:
        """A change wakes all who wait, each once: streams see every change, they do not compete for it."""

        async def main() -> None:
            inventory = Inventory([FIRST])
            woken: list[int] = []

            async def wait(number: int) -> None:
                await inventory.changed.wait()
                woken.append(number)

            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
                assert woken == []
                inventory.replace([SICK])
            assert sorted(woken) == [0, 1, 2]

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    @pytest.mark.parametrize(
        "same",
        [
            pytest.param((FIRST, SECOND), id="the same objects"),
            pytest.param((attrs.evolve(FIRST), attrs.evolve(SECOND)), id="equal objects"),
        ],
    )
    def test_equal_wakes_nobody(self, same: tuple[Device, ...]) -> None:
        """A list equal to the last one wakes nobody, so that an idle node sends nothing."""

        async def main() -> None:
            inventory = Inventory([FIRST, SECOND])
            changed = inventory.changed
            inventory.replace(list(same))
            assert inventory.changed is changed
            with trio.move_on_after(3600) as scope:
                await changed.wait()
            assert scope.cancelled_caught

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    def test_order_is_a_change(self) -> None:
        """The same GPUs in another order are another list."""
        inventory = Inventory([FIRST, SECOND])
        changed = inventory.changed
        inventory.replace([SECOND, FIRST])
        assert changed.is_set()
        assert inventory.devices == (SECOND, FIRST)

    def test_fresh_event(self) -> None:
        """After a change the next one can be waited for: the new event is unset."""
        inventory = Inventory([FIRST])
        for devices in ([SICK], [FIRST], []):
            changed = inventory.changed
            inventory.replace(devices)
            assert changed.is_set()
            assert not inventory.changed.is_set()


class TestWithhold:
    def test_listed_and_released(self) -> None:
        """The numbers that are withheld are the GPU's own until others are; the GPU is the same otherwise."""
        inventory = Inventory([FIRST, SECOND])
        inventory.withhold({"GPU-b": frozenset({1, 2})})
        assert inventory.devices == (FIRST, attrs.evolve(SECOND, withheld=frozenset({1, 2})))
        assert inventory.find("GPU-b::1") is inventory.devices[1]
        inventory.withhold({"GPU-a": frozenset({0})})
        assert inventory.devices == (attrs.evolve(FIRST, withheld=frozenset({0})), SECOND)
        inventory.withhold({})
        assert inventory.devices == (FIRST, SECOND)

    def test_readers_are_woken_once(self) -> None:
        """By a change of what is withheld, and not when it is said again."""
        inventory = Inventory([FIRST])
        numbers = {"GPU-a": frozenset({1})}
        for withheld, wakes in ((numbers, True), (dict(numbers), False), ({}, True), ({}, False)):
            changed = inventory.changed
            inventory.withhold(withheld)
            assert changed.is_set() is wakes

    def test_kept_when_the_gpus_change(self) -> None:
        """What is withheld stays so when the driver has news, and when the GPU was away in between."""
        inventory = Inventory([FIRST, SECOND])
        inventory.withhold({"GPU-a": frozenset({1})})
        inventory.replace([SICK, SECOND])
        assert inventory.devices == (attrs.evolve(SICK, withheld=frozenset({1})), SECOND)
        inventory.replace([SECOND])
        assert list(inventory.devices) == [SECOND]
        inventory.replace([FIRST, SECOND])
        assert inventory.devices == (attrs.evolve(FIRST, withheld=frozenset({1})), SECOND)

    def test_the_same_news_wakes_nobody(self) -> None:
        """The driver's word knows nothing of withheld shares; it is no change for that."""
        inventory = Inventory([FIRST])
        inventory.withhold({"GPU-a": frozenset({1})})
        changed = inventory.changed
        inventory.replace([FIRST])
        assert not changed.is_set()

    def test_a_gpu_that_is_not_there(self) -> None:
        """Shares of a GPU that is not there are withheld from nobody."""
        inventory = Inventory([FIRST])
        changed = inventory.changed
        inventory.withhold({"GPU-z": frozenset({0})})
        assert not changed.is_set()


class TestWaitFilled:
    @pytest.mark.parametrize("seconds", [0, 5], ids=["there already", "later"])
    def test_wait_filled(self, seconds: int) -> None:
        """It waits for the first GPU, over changes that bring none."""

        async def main() -> None:
            inventory = Inventory([] if seconds else [FIRST])

            async def fill() -> None:
                inventory.changed.set()  # a change without a GPU
                inventory.changed = trio.Event()
                await trio.sleep(seconds)
                inventory.replace([FIRST])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill)
                started = trio.current_time()
                await inventory.wait_filled()
                assert trio.current_time() - started == pytest.approx(seconds)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    def test_cancelled(self) -> None:
        """It can be given up."""

        async def main() -> None:
            with trio.move_on_after(1) as scope:
                await Inventory().wait_filled()
            assert scope.cancelled_caught

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class TestReader:
    def test_change_while_sending(self) -> None:
        """A reader that takes `changed` before `devices` misses nothing that happens while it sends."""

        async def main() -> None:
            inventory = Inventory([FIRST])
            sent: list[tuple[Device, ...]] = []

            async def read() -> None:
                while True:
                    changed = inventory.changed
                    devices = inventory.devices
                    await trio.sleep(1)  # sending, to a slow kubelet
                    sent.append(devices)
                    await changed.wait()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.sleep(0.5)
                inventory.replace([SICK])  # in the middle of the first message
                await trio.sleep(1)
                assert sent == [(FIRST,)]
                inventory.replace([FIRST, SECOND])  # two in the middle of the second
                inventory.replace([SECOND])
                await trio.sleep(10)
                assert sent == [(FIRST,), (SICK,), (SECOND,)]
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    def test_cancelled_reader(self) -> None:
        """A reader that goes away while it waits takes nothing from the others."""

        async def main() -> None:
            inventory = Inventory([FIRST])
            with trio.move_on_after(1):
                await inventory.changed.wait()
            changed = inventory.changed
            inventory.replace([SICK])
            with trio.fail_after(1):
                await changed.wait()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class TestGive:
    """A share that a container gets is in use, and one in use is never withheld."""

    def test_a_withheld_share_that_is_given_away_is_no_longer_withheld(self) -> None:
        """The kubelet chose it just before it heard. The others stay withheld."""
        (device,) = simulated_devices(1, 4)
        inventory = Inventory([device])
        inventory.withhold({device.uuid: frozenset({1, 2, 3})})
        changed = inventory.changed
        inventory.give([f"{device.uuid}::2", "no share"])
        assert inventory.devices[0].withheld == {1, 3}
        assert changed.is_set()

    @pytest.mark.parametrize("withheld", [(), (1, 3)], ids=["none are", "others are"])
    def test_a_share_that_is_not_withheld_is_no_news(self, withheld: tuple[int, ...]) -> None:
        """As for most."""
        (device,) = simulated_devices(1, 4)
        inventory = Inventory([device])
        if withheld:
            inventory.withhold({device.uuid: frozenset(withheld)})
        changed = inventory.changed
        inventory.give([f"{device.uuid}::2"])
        assert not changed.is_set()
