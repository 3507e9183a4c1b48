"""What the driver said → what the node offers. The clock is explicit, and stands still unless a test moves it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import pytest
import trio

from sgpu.device import Device, Health
from sgpu.health import Cure, Fault
from sgpu.inventory import Inventory
from sgpu.monitor import EVENT_FAULTS, Memory, Monitor
from sgpu.report import DriverEvent, EventKind, GpuReport, NotReady, Report
from sgpu.usage import Sample
from sgpu.xids import XidPolicy

FIRST = GpuReport(
    uuid="GPU-a",
    name="Tesla T4",
    pci_bus_id="00000000:3B:00.0",
    device_nodes=("nvidia0", "nvidiactl"),
    numa_node=1,
    memory_total=1000,
    memory_used=300,
    memory_free=700,
    utilisation=40,
)
SECOND = attrs.evolve(FIRST, uuid="GPU-b", name="NVIDIA L4", pci_bus_id="00000000:5E:00.0", device_nodes=("nvidia1",))
THIRD = attrs.evolve(FIRST, uuid="GPU-c", pci_bus_id="00000000:86:00.0", device_nodes=("nvidia2",))
SHARES = 10
NOW = 1_700_000_000.0

XID_79 = "XID 79: GPU has fallen off the bus; reboot the node; contact support if it recurs"
XID_94_START = "XID 94: "
GONE = "the driver no longer answers for it"


def told(*gpus: GpuReport, version: str = "550.1", **fields: Any) -> Report:  # noqa: ANN401  # as Report has them
    """A report with these GPUs."""
    return Report(
        **{"gpus": gpus, "problems": (), "unasked": (), "driver_version": version, "library": "/l/nvml.so", **fields}
    )


class Lists(Inventory):
    """An inventory that keeps every list it got."""

    def __init__(self) -> None:
        super().__init__()
        self.lists: list[tuple[Device, ...]] = []

    def replace(self, devices: Iterable[Device]) -> None:
        """Keep it, and pass it on."""
        self.lists.append(tuple(devices))
        super().replace(self.lists[-1])


class Watched:
    """A monitor, the inventory it fills, and a clock to move."""

    def __init__(self, memory: Memory | None = None, policy: XidPolicy | None = None, shares: int = SHARES) -> None:
        self.now = NOW
        self.inventory = Lists()
        self.samples: list[Mapping[str, Sample]] = []
        self.monitor = Monitor(
            self.inventory,
            shares,
            policy or XidPolicy(),
            memory or Memory(),
            clock=lambda: self.now,
            sampled=self.samples.append,
        )

    def report(self, *gpus: GpuReport, **fields: Any) -> None:  # noqa: ANN401
        """A poll that came back."""
        self.monitor.report(told(*gpus, **fields))

    def xid(self, gpu: GpuReport, number: int) -> None:
        """An XID happens."""
        self.monitor.event(DriverEvent(gpu.uuid, EventKind.XID, number))

    @property
    def reasons(self) -> dict[str, str]:
        """UUID → why it is down (empty: it is not), in the order of the list; and that health agrees."""
        for device in self.inventory.devices:
            assert (device.health is Health.HEALTHY) is (device.reason == "")
        return {device.uuid: device.reason for device in self.inventory.devices}


@pytest.fixture
def watched() -> Watched:
    """With nothing known yet."""
    return Watched()


@pytest.fixture
def two() -> Watched:
    """With two healthy GPUs."""
    made = Watched()
    made.report(FIRST, SECOND)
    return made


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


class TestDevices:
    def test_a_device_has_all_its_facts(self, watched: Watched) -> None:
        """What the driver says of it, and as many shares as were asked for."""
        watched.report(FIRST)
        assert watched.inventory.devices == (
            Device(
                uuid="GPU-a",
                name="Tesla T4",
                pci_bus_id="00000000:3B:00.0",
                shares=SHARES,
                device_nodes=("nvidia0", "nvidiactl"),
                memory_bytes=1000,
                numa_node=1,
                health=Health.HEALTHY,
                reason="",
            ),
        )

    def test_in_the_driver_s_order(self, watched: Watched) -> None:
        """NVML's, which is that of the bus."""
        watched.report(SECOND, THIRD, FIRST)
        assert list(watched.reasons) == ["GPU-b", "GPU-c", "GPU-a"]

    def test_the_order_stays(self, two: Watched) -> None:
        """As first seen: one that comes later, or comes back, does not shuffle the list."""
        two.report(THIRD, SECOND)
        two.report(THIRD, SECOND, FIRST)
        assert list(two.reasons) == ["GPU-a", "GPU-b", "GPU-c"]

    def test_facts_that_change(self, two: Watched) -> None:
        """The last report counts."""
        changed = two.inventory.changed
        two.report(attrs.evolve(FIRST, memory_total=2000, device_nodes=("nvidia7",)), SECOND)
        assert changed.is_set()
        assert two.inventory.devices[0].memory_bytes == 2000
        assert two.inventory.devices[0].device_nodes == ("nvidia7",)

    def test_nothing_new_is_no_change(self, two: Watched) -> None:
        """An idle node sends nothing: not for the same report, nor for a GPU at work."""
        changed = two.inventory.changed
        two.report(FIRST, SECOND)
        two.report(attrs.evolve(FIRST, memory_used=999, memory_free=1, utilisation=100), SECOND)
        two.report(SECOND, FIRST)
        assert not changed.is_set()
        assert two.inventory.changed is changed

    def test_samples_of_each_report(self, two: Watched) -> None:
        """Handed on with every poll, whether or not the list changed."""
        two.report(attrs.evolve(FIRST, memory_free=1, utilisation=None), SECOND)
        assert two.samples == [
            {"GPU-a": Sample(1000, 700, 40), "GPU-b": Sample(1000, 700, 40)},
            {"GPU-a": Sample(1000, 1, None), "GPU-b": Sample(1000, 700, 40)},
        ]


class TestPresence:
    def test_a_gpu_that_is_gone_stays_listed(self, two: Watched) -> None:
        """Shares that vanish would read as healthy in a pod's status. The other is as it was."""
        two.report(SECOND)
        assert two.reasons == {"GPU-a": GONE, "GPU-b": ""}

    def test_and_comes_back(self, two: Watched) -> None:
        """With its first answer."""
        two.report(SECOND)
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}

    def test_all_gone(self, two: Watched) -> None:
        """A report of none is one about all."""
        two.report()
        assert two.reasons == {"GPU-a": GONE, "GPU-b": GONE}

    def test_one_more(self, two: Watched) -> None:
        """Hot-plugged, at the end of the list."""
        changed = two.inventory.changed
        two.report(FIRST, SECOND, THIRD)
        assert changed.is_set()
        assert two.reasons == {"GPU-a": "", "GPU-b": "", "GPU-c": ""}

    def test_one_that_was_not_asked_is_untouched(self, two: Watched) -> None:
        """Neither gone nor well: as it was, healthy or not."""
        two.report(SECOND, unasked=("GPU-a",))
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}
        two.monitor.unanswered("GPU-a", "it hangs")
        two.report(SECOND, unasked=("GPU-a",))
        assert two.reasons == {"GPU-a": "it hangs", "GPU-b": ""}

    def test_one_that_is_not_known_and_not_asked(self, two: Watched) -> None:
        """Is nobody's: there is nothing to list yet."""
        two.report(FIRST, SECOND, unasked=("GPU-c",))
        assert list(two.reasons) == ["GPU-a", "GPU-b"]

    def test_a_problem_that_no_list_shows(self, two: Watched, caplog: pytest.LogCaptureFixture) -> None:
        """A GPU that can't be offered, not even as unhealthy, is a line in the log, once for as long as it lasts."""
        caplog.clear()
        for _ in range(3):
            two.report(FIRST, SECOND, problems=("GPU 2 is left out: x", "GPU 3 is left out: y"))
        assert warnings(caplog) == ["GPU 2 is left out: x; GPU 3 is left out: y"]
        two.report(FIRST, SECOND, problems=("GPU 2 is left out: x",))
        assert warnings(caplog)[1:] == ["GPU 2 is left out: x"]
        two.report(FIRST, SECOND)
        two.report(FIRST, SECOND, problems=("GPU 2 is left out: x",))
        assert warnings(caplog)[2:] == ["GPU 2 is left out: x"]


class TestUnanswered:
    def test_one(self, two: Watched) -> None:
        """A call about one GPU is that GPU's."""
        two.monitor.unanswered("GPU-b", "it hangs")
        assert two.reasons == {"GPU-a": "", "GPU-b": "it hangs"}

    def test_the_driver(self, two: Watched) -> None:
        """A call about none is about all."""
        two.monitor.unanswered("", "it hangs")
        assert two.reasons == {"GPU-a": "it hangs", "GPU-b": "it hangs"}

    def test_a_stranger(self, two: Watched) -> None:
        """One that was never listed: nothing to tell."""
        changed = two.inventory.changed
        two.monitor.unanswered("GPU-c", "it hangs")
        assert not changed.is_set()

    def test_before_the_first_report(self, watched: Watched) -> None:
        """No GPU is known, so none is listed."""
        watched.monitor.unanswered("", "it hangs")
        assert watched.inventory.devices == ()

    def test_an_answer_ends_it(self, two: Watched) -> None:
        """By itself; of the other, nothing is known yet."""
        two.monitor.unanswered("", "it hangs")
        two.report(FIRST, unasked=("GPU-b",))
        assert two.reasons == {"GPU-a": "", "GPU-b": "it hangs"}

    def test_the_process_is_no_gpu(self, two: Watched) -> None:
        """That the library hung, or took its process down, and another answers: no GPU was reset by that."""
        two.xid(FIRST, 79)
        two.monitor.unanswered("", "the driver's library took its process down (SIGABRT)")
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": XID_79, "GPU-b": ""}


class TestEvents:
    @pytest.mark.parametrize("kind", [kind for kind in EventKind if kind in EVENT_FAULTS])
    def test_each_kind(self, two: Watched, kind: EventKind) -> None:
        """Strikes its GPU and no other, and is remembered with when and what cures it."""
        two.monitor.event(DriverEvent("GPU-b", kind))
        reason, cure = EVENT_FAULTS[kind]
        assert two.reasons == {"GPU-a": "", "GPU-b": reason}
        assert two.monitor.memory.faults == {"GPU-b": (Fault(reason, NOW, cure),)}

    def test_every_kind_is_seen_to(self) -> None:
        """Those that are a fault by themselves, XIDs, and what asks for a poll."""
        assert set(EventKind) == {*EVENT_FAULTS, EventKind.XID, EventKind.RECOVERY_ACTION}

    @pytest.mark.parametrize(
        ("kind", "cure"),
        [
            (EventKind.DOUBLE_BIT_ECC, Cure.RESET),
            (EventKind.NON_FATAL_POISON, Cure.QUARANTINE),
            (EventKind.FATAL_POISON, Cure.RESET),
            (EventKind.GPU_UNAVAILABLE, Cure.RESET),
        ],
        ids=lambda value: value.name,
    )
    def test_cures(self, kind: EventKind, cure: Cure) -> None:
        """Only poison that was contained goes away by itself."""
        assert EVENT_FAULTS[kind][1] is cure

    @pytest.mark.parametrize(
        ("number", "cure", "words"),
        [
            pytest.param(79, Cure.RESET, XID_79, id="needs a reset"),
            pytest.param(94, Cure.QUARANTINE, XID_94_START, id="transient"),
            pytest.param(5000, Cure.RESET, "XID 5000: not in NVIDIA's catalogue; ", id="unknown"),
        ],
    )
    def test_xids(self, two: Watched, number: int, cure: Cure, words: str) -> None:
        """The number, its meaning and what NVIDIA says to do; and the cure of its class."""
        two.xid(FIRST, number)
        (fault,) = two.monitor.memory.faults["GPU-a"]
        assert (fault.since, fault.cure) == (NOW, cure)
        assert fault.reason.startswith(words)
        assert two.reasons == {"GPU-a": fault.reason, "GPU-b": ""}

    @pytest.mark.parametrize("number", [13, 31, 43])
    def test_an_application_s_xid(self, two: Watched, caplog: pytest.LogCaptureFixture, number: int) -> None:
        """Changes nothing; a line for whoever looks for it, at a level that alarms nobody."""
        caplog.clear()
        changed, memory_changed = two.inventory.changed, two.monitor.memory_changed
        two.xid(FIRST, number)
        assert not changed.is_set()
        assert not memory_changed.is_set()
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert record.message.startswith(f"GPU GPU-a: XID {number}: ")
        assert record.message.endswith("; an application's fault, ignored")

    @pytest.mark.parametrize(
        ("policy", "number", "cure"),
        [
            pytest.param(XidPolicy(ignored=frozenset({79})), 79, None, id="ignored"),
            pytest.param(XidPolicy(critical=frozenset({13})), 13, Cure.RESET, id="critical"),
            pytest.param(XidPolicy(critical=frozenset({94})), 94, Cure.RESET, id="critical, not only transient"),
        ],
    )
    def test_the_operator_s_say(self, policy: XidPolicy, number: int, cure: Cure | None) -> None:
        """Goes before the table."""
        watched = Watched(policy=policy)
        watched.report(FIRST)
        watched.xid(FIRST, number)
        assert [fault.cure for faults in watched.monitor.memory.faults.values() for fault in faults] == (
            [cure] if cure else []
        )

    @pytest.mark.parametrize(
        "policy",
        [XidPolicy(), XidPolicy(critical=frozenset({154})), XidPolicy(ignored=frozenset({154}))],
        ids=["as it is", "critical", "ignored"],
    )
    @pytest.mark.parametrize(
        "event",
        [DriverEvent("GPU-a", EventKind.XID, 154), DriverEvent("GPU-a", EventKind.RECOVERY_ACTION)],
        ids=["XID 154", "event"],
    )
    def test_a_changed_recovery_action_is_no_fault(self, policy: XidPolicy, event: DriverEvent) -> None:
        """It may have changed to none: the poll that comes at once says what it is."""
        watched = Watched(policy=policy)
        watched.report(FIRST)
        changed = watched.inventory.changed
        watched.monitor.event(event)
        assert not changed.is_set()
        watched.report(attrs.evolve(FIRST, recovery_action=2))
        assert watched.reasons == {"GPU-a": "the driver asks to reboot the node"}

    @pytest.mark.parametrize("kind", list(EventKind))
    def test_a_gpu_that_is_not_known(self, two: Watched, kind: EventKind) -> None:
        """Changes nothing."""
        changed, memory_changed = two.inventory.changed, two.monitor.memory_changed
        two.monitor.event(DriverEvent("GPU-c", kind, 79))
        assert not changed.is_set()
        assert not memory_changed.is_set()

    def test_more_than_one(self, two: Watched) -> None:
        """All reasons are told, in the order in which they came."""
        two.xid(FIRST, 79)
        two.xid(FIRST, 94)
        two.report(attrs.evolve(FIRST, recovery_action=1), SECOND)
        starts = [two.reasons["GPU-a"].find(start) for start in (XID_79, XID_94_START, "the driver asks to reset")]
        assert starts == sorted(starts)
        assert starts[0] == 0


class TestBack:
    def test_after_a_quarantine(self, two: Watched) -> None:
        """With the first poll after it, not before and not by itself."""
        two.xid(FIRST, 94)
        two.now += 59.9
        two.report(FIRST, SECOND)
        assert two.reasons["GPU-a"].startswith(XID_94_START)
        two.now += 0.1
        assert two.reasons["GPU-a"].startswith(XID_94_START)
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}

    def test_not_by_waiting(self, two: Watched) -> None:
        """A reset is a reset."""
        two.xid(FIRST, 79)
        for _ in range(100):
            two.now += 3600
            two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": XID_79, "GPU-b": ""}

    def test_it_was_gone(self, two: Watched) -> None:
        """Which is what a reset looks like from here."""
        two.xid(FIRST, 79)
        two.report(SECOND)
        assert two.reasons["GPU-a"] == f"{GONE}; {XID_79}"
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}

    def test_it_had_no_device_node(self, two: Watched) -> None:
        """Which is no reset: what it had, it still has."""
        two.xid(FIRST, 79)
        two.report(SECOND, nodeless=("GPU-a",))
        assert two.reasons["GPU-a"] == f"its device node is not there; {XID_79}"
        two.report(FIRST, SECOND)
        assert two.reasons["GPU-a"] == XID_79

    def test_the_driver_was_away(self, two: Watched) -> None:
        """All are down meanwhile, each still with what it had; when it is back, all are as new."""
        two.xid(FIRST, 79)
        two.monitor.not_ready(NotReady("no driver", gone=True))
        assert two.reasons == {"GPU-a": f"its driver is not there; {XID_79}", "GPU-b": "its driver is not there"}
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}

    def test_the_driver_was_away_and_a_gpu_is_not_asked(self, two: Watched) -> None:
        """It gets the benefit when it answers."""
        two.xid(FIRST, 79)
        two.monitor.not_ready(NotReady("no driver", gone=True))
        two.report(SECOND, unasked=("GPU-a",))
        assert two.reasons["GPU-b"] == ""
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}

    @pytest.mark.parametrize("last", [True, False], ids=["gone last", "gone first"])
    def test_the_driver_was_away_for_more_than_one_reason(self, two: Watched, last: bool) -> None:
        """One of them is enough."""
        two.xid(FIRST, 79)
        two.monitor.not_ready(NotReady("no driver", gone=not last))
        two.monitor.not_ready(NotReady("no node", gone=last))
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}

    def test_it_could_not_be_asked(self, two: Watched) -> None:
        """A device node that was missing, or a library, is no driver that was."""
        two.xid(FIRST, 79)
        two.monitor.not_ready(NotReady("no node"))
        assert two.reasons == {"GPU-a": f"its driver is not there; {XID_79}", "GPU-b": "its driver is not there"}
        two.report(FIRST, SECOND)
        assert two.reasons == {"GPU-a": XID_79, "GPU-b": ""}

    def test_another_version_of_the_driver(self, two: Watched) -> None:
        """It can only be another if it was reloaded, even if nobody saw that."""
        two.xid(FIRST, 79)
        two.report(FIRST, SECOND, version="560.2")
        assert two.reasons == {"GPU-a": "", "GPU-b": ""}
        two.xid(FIRST, 79)
        two.report(FIRST, SECOND, version="560.2")
        assert two.reasons["GPU-a"] == XID_79

    def test_the_driver_is_back_only_once(self, two: Watched) -> None:
        """Faults after that are new."""
        two.monitor.not_ready(NotReady("no driver", gone=True))
        two.report(FIRST, SECOND)
        two.xid(FIRST, 79)
        two.report(FIRST, SECOND)
        assert two.reasons["GPU-a"] == XID_79


class TestMemory:
    def test_the_first_report(self, watched: Watched) -> None:
        """Which driver it is, is worth keeping: another one later is evidence."""
        changed = watched.monitor.memory_changed
        watched.report(FIRST)
        assert changed.is_set()
        assert watched.monitor.memory == Memory("550.1")

    @pytest.mark.parametrize("number", [79, 94])
    def test_faults_come_and_go(self, two: Watched, number: int) -> None:
        """Each time anew, with an event that is not set."""
        changed = two.monitor.memory_changed
        two.xid(FIRST, number)
        assert changed.is_set()
        assert list(two.monitor.memory.faults) == ["GPU-a"]
        changed = two.monitor.memory_changed
        assert not changed.is_set()
        two.now += 60
        two.report(FIRST, SECOND, version="560.2")
        assert changed.is_set()
        assert two.monitor.memory == Memory("560.2")
        assert not two.monitor.memory_changed.is_set()

    def test_the_same_fault_later(self, two: Watched) -> None:
        """Its time is another."""
        two.xid(FIRST, 94)
        changed = two.monitor.memory_changed
        two.now += 1
        two.xid(FIRST, 94)
        assert changed.is_set()
        assert two.monitor.memory.faults["GPU-a"][0].since == NOW + 1

    def test_what_a_poll_shows_is_not_kept(self, two: Watched) -> None:
        """The next poll shows it again."""
        changed = two.monitor.memory_changed
        two.report(attrs.evolve(FIRST, recovery_action=1), SECOND)
        two.report(SECOND, problems=("GPU 0 is left out",))
        two.monitor.unanswered("", "it hangs")
        two.monitor.not_ready(NotReady("no driver"))
        two.report(FIRST, SECOND, unasked=())
        assert not changed.is_set()

    def test_an_idle_node(self, two: Watched) -> None:
        """Writes nothing, with a fault as without."""
        two.xid(FIRST, 79)
        changed = two.monitor.memory_changed
        for _ in range(10):
            two.now += 5
            two.report(FIRST, SECOND)
        assert not changed.is_set()
        assert two.monitor.memory_changed is changed

    def test_who_waits_is_woken(self, two: Watched) -> None:
        """And finds the new memory."""

        async def main() -> Memory:
            changed = two.monitor.memory_changed
            two.xid(FIRST, 79)
            with trio.fail_after(1):
                await changed.wait()
            return two.monitor.memory

        assert list(trio.run(main).faults) == ["GPU-a"]


class TestRestored:
    MEMORY = Memory(
        "550.1", {"GPU-a": (Fault("XID 79", NOW - 1000, Cure.RESET),), "GPU-c": (Fault("XID 48", NOW, Cure.RESET),)}
    )

    def test_the_first_list_has_it(self) -> None:
        """A kubelet never sees a GPU healthy that was down when the daemon ended."""
        watched = Watched(self.MEMORY)
        watched.report(FIRST, SECOND)
        assert [device.reason for device in watched.inventory.lists[0]] == ["XID 79", ""]

    def test_nothing_is_written_for_it(self) -> None:
        """What is read is what is there."""
        watched = Watched(self.MEMORY)
        changed = watched.monitor.memory_changed
        watched.report(FIRST, SECOND)
        assert watched.monitor.memory == self.MEMORY
        assert not changed.is_set()

    def test_a_gpu_that_is_not_there(self) -> None:
        """Is remembered, and was gone: when it is back, it was reset."""
        watched = Watched(self.MEMORY)
        watched.report(FIRST, SECOND)
        assert list(watched.monitor.memory.faults) == ["GPU-a", "GPU-c"]
        watched.report(FIRST, SECOND, THIRD)
        assert watched.reasons == {"GPU-a": "XID 79", "GPU-b": "", "GPU-c": ""}

    def test_a_gpu_that_is_not_asked(self) -> None:
        """Is remembered, and no more."""
        watched = Watched(self.MEMORY)
        watched.report(FIRST, SECOND, unasked=("GPU-c",))
        watched.report(FIRST, SECOND, THIRD)
        assert watched.reasons["GPU-c"] == "XID 48"

    def test_the_driver_is_away(self) -> None:
        """It was there when the fault happened, in the same boot; when it is back, it was reloaded."""
        watched = Watched(self.MEMORY)
        watched.monitor.not_ready(NotReady("no driver", gone=True))
        assert watched.inventory.devices == ()
        watched.report(FIRST, SECOND)
        assert watched.reasons == {"GPU-a": "", "GPU-b": ""}

    def test_another_driver(self) -> None:
        """It was replaced while the daemon was not there to see it."""
        watched = Watched(self.MEMORY)
        watched.report(FIRST, SECOND, version="560.2")
        assert watched.reasons == {"GPU-a": "", "GPU-b": ""}

    def test_a_quarantine_goes_on(self) -> None:
        """From when the fault happened, not from when the daemon started."""
        watched = Watched(Memory("550.1", {"GPU-a": (Fault("XID 94", NOW - 50, Cure.QUARANTINE),)}))
        watched.report(FIRST)
        assert watched.reasons == {"GPU-a": "XID 94"}
        watched.now += 10
        watched.report(FIRST)
        assert watched.reasons == {"GPU-a": ""}

    def test_a_quarantine_is_over(self) -> None:
        """While the daemon was not there."""
        watched = Watched(Memory("550.1", {"GPU-a": (Fault("XID 94", NOW - 60, Cure.QUARANTINE),)}))
        watched.report(FIRST)
        assert watched.reasons == {"GPU-a": ""}
        assert watched.monitor.memory == Memory("550.1")


class TestSince:
    def test_of_the_last_change_of_health(self, two: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the reason is meanwhile; each GPU by itself."""
        clock = itertools.count(100)
        monkeypatch.setattr(time, "time", lambda: float(next(clock)))
        two.xid(FIRST, 79)
        down, other = (device.since for device in two.inventory.devices)
        assert down >= 100 > 0 < other < 1e12
        two.report(SECOND)
        two.report(FIRST, SECOND, THIRD)
        assert two.inventory.devices[0].health is Health.HEALTHY
        back, same, _ = (device.since for device in two.inventory.devices)
        assert back > down
        assert same == other


class TestLog:
    def test_the_start(self, watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
        """The driver, and a line for each GPU; once."""
        for _ in range(3):
            watched.report(FIRST, SECOND)
        assert caplog.messages == [
            "driver 550.1 (/l/nvml.so)",
            "GPU GPU-a: Tesla T4 at 00000000:3B:00.0",
            "GPU GPU-b: NVIDIA L4 at 00000000:5E:00.0",
        ]
        assert {record.levelno for record in caplog.records} == {logging.INFO}

    def test_a_gpu_that_is_down_and_back(self, two: Watched, caplog: pytest.LogCaptureFixture) -> None:
        """One line for each change of reason, never one for a share."""
        caplog.clear()
        two.xid(FIRST, 79)
        two.report(FIRST, SECOND)
        two.xid(FIRST, 79)
        two.report(SECOND)
        two.report(SECOND)
        two.report(FIRST, SECOND)
        two.report(FIRST, SECOND)
        assert warnings(caplog) == [
            f"GPU GPU-a (Tesla T4): all its shares are unhealthy: {XID_79}",
            f"GPU GPU-a (Tesla T4): all its shares are unhealthy: {GONE}; {XID_79}",
            f"GPU GPU-a (Tesla T4): healthy again (it was down: {GONE}; {XID_79})",
        ]

    def test_a_gpu_that_is_down_from_the_start(self, caplog: pytest.LogCaptureFixture) -> None:
        """Said like any other."""
        Watched(Memory("550.1", {"GPU-a": (Fault("XID 79", NOW, Cure.RESET),)})).report(FIRST)
        assert warnings(caplog) == ["GPU GPU-a (Tesla T4): all its shares are unhealthy: XID 79"]

    def test_waiting(self, watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
        """Once for each reason, and again when it comes back."""
        for reason in ("no driver", "no driver", "no node", "no node"):
            watched.monitor.not_ready(NotReady(reason))
        assert warnings(caplog) == ["waiting for a GPU: no driver", "waiting for a GPU: no node"]
        watched.report(FIRST)
        caplog.clear()
        watched.monitor.not_ready(NotReady("no node"))
        watched.monitor.not_ready(NotReady("no node"))
        assert warnings(caplog) == [
            "waiting for a GPU: no node",
            "GPU GPU-a (Tesla T4): all its shares are unhealthy: its driver is not there",
        ]

    def test_the_driver_is_back(self, two: Watched, caplog: pytest.LogCaptureFixture) -> None:
        """With its version, which may be another; the GPUs are not introduced again."""
        two.monitor.not_ready(NotReady("no driver"))
        caplog.clear()
        two.report(FIRST, SECOND, version="560.2")
        assert caplog.messages == [
            "driver 560.2 (/l/nvml.so)",
            "GPU GPU-a (Tesla T4): healthy again (it was down: its driver is not there)",
            "GPU GPU-b (NVIDIA L4): healthy again (it was down: its driver is not there)",
        ]
