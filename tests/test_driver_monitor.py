"""From the driver's messages to the node's GPUs. The clock stands still unless a test moves it."""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from sgpu.driver.health import Clearance, Fault, FaultRecord
from sgpu.driver.messages import RECOVERY_XID, DriverEvent, EventKind, Failure, GpuReport, NotReady, ReleasedGpu, Report
from sgpu.driver.monitor import Monitor
from sgpu.driver.xids import XIDS, XidClass, XidPolicy
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.gpu import Cordon, Gpu, Health
from sgpu.node.offers import Offer
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState

FIRST = GpuReport(
    uuid="GPU-a",
    name="Tesla T4",
    pci_bus_id="00000000:3B:00.0",
    device_nodes=("nvidia0", "nvidiactl"),
    numa_node=1,
    figures=Figures(memory_total=1000, memory_free=700, utilization=40, processes=(ProcessUse(7, 300, 40),)),
)
SECOND = attrs.evolve(FIRST, uuid="GPU-b", name="NVIDIA L4", pci_bus_id="00000000:5E:00.0", device_nodes=("nvidia1",))
THIRD = attrs.evolve(FIRST, uuid="GPU-c", pci_bus_id="00000000:86:00.0", device_nodes=("nvidia2",))
ASKING = attrs.evolve(FIRST, recovery_action=2)
NOW = 5000.0
#: An event that only a reset clears, and one that a quarantine clears.
CRITICAL, TRANSIENT = EventKind.FATAL_POISON, EventKind.NON_FATAL_POISON
#: An XID of each class.
XID = {xid_class: next(xid for xid in XIDS.values() if xid.xid_class is xid_class) for xid_class in XidClass}


class Watched:
    """A monitor, the node that it fills, and a clock to move."""

    def __init__(self, record: FaultRecord | None = None, policy: XidPolicy | None = None) -> None:
        self.now = NOW
        self.version = "550.1"
        self.offered: list[Sequence[Offer]] = []  # each time
        self.errors: Counter[tuple[str, str]] = Counter()
        self.node = NodeState(Policy("example.com/gpu", 10), interval=5, check=self.offered.append, clock=lambda: 0.0)
        self.monitor = Monitor(
            self.node, policy or XidPolicy(), record or FaultRecord(), self.errors, clock=lambda: self.now
        )

    def report(self, *gpus: GpuReport, at: float = 0, **fields: Any) -> None:  # noqa: ANN401  # as Report has them
        """A poll comes back, at this time of trio's."""
        report = Report(
            **{
                "gpus": gpus,
                "problems": (),
                "skipped": (),
                "driver_version": self.version,
                "library": "/l/ml.so",
                **fields,
            }
        )

        async def take() -> None:
            self.monitor.report(report)

        clock = trio.testing.MockClock()
        clock.jump(at)
        trio.run(take, clock=clock)

    def event(self, gpu: GpuReport, kind: EventKind, xid: int = 0) -> None:
        self.monitor.event(DriverEvent(gpu.uuid, kind, xid))

    @property
    def unhealthy(self) -> dict[str, str]:
        """UUID → why, of those that are."""
        assert all((gpu.health is Health.UNHEALTHY) is (gpu.reason != "") for gpu in self.node.gpus)
        return {gpu.uuid: gpu.reason for gpu in self.node.gpus if gpu.reason}

    @property
    def faults(self) -> dict[str, list[Clearance]]:
        """UUID → what clears each fault that is on record."""
        return {uuid: [fault.clearance for fault in faults] for uuid, faults in self.monitor.record.faults.items()}


Step = Callable[[Watched], None]


def report(*gpus: GpuReport, **fields: Any) -> Step:  # noqa: ANN401
    return lambda watched: watched.report(*gpus, **fields)


def event(gpu: GpuReport, kind: EventKind) -> Step:
    return lambda watched: watched.event(gpu, kind)


def unanswered(uuid: str) -> Step:
    return lambda watched: watched.monitor.unanswered(uuid, "it hangs")


def not_ready(*, gone: bool = False) -> Step:
    return lambda watched: watched.monitor.not_ready(NotReady("no driver", gone))


def upgrade(watched: Watched) -> None:
    watched.version = "560.2"
    watched.report(FIRST)


@pytest.fixture
def two() -> Watched:
    """With two healthy GPUs."""
    made = Watched()
    made.report(FIRST, SECOND)
    return made


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestGpus:
    def test_facts(self, two: Watched) -> None:
        """Take over what the driver says of a GPU; the last report counts."""
        gpu = Gpu(
            uuid="GPU-a",
            name="Tesla T4",
            pci_bus_id="00000000:3B:00.0",
            device_nodes=("nvidia0", "nvidiactl"),
            memory_bytes=1000,
            memory_total=1000,
            numa_node=1,
            health=Health.HEALTHY,
            reason="",
        )
        assert two.node.gpus[0] == gpu
        changed = two.node.changed.next
        two.report(
            attrs.evolve(FIRST, figures=Figures(memory_total=2000, memory_reserved=50), device_nodes=("nvidia7",)),
            SECOND,
        )
        assert changed.is_set()
        later = attrs.evolve(gpu, memory_bytes=1950, memory_total=2000, device_nodes=("nvidia7",))
        assert two.node.gpus[0] == later
        two.report(attrs.evolve(FIRST, figures=Figures(), device_nodes=("nvidia7",)), SECOND)
        assert two.node.gpus[0] == later  # a card's memory does not change

    def test_order(self, two: Watched) -> None:
        """Keep the GPUs in the order in which they were first seen."""
        two.report(THIRD, SECOND)
        two.report(THIRD, SECOND, FIRST)
        assert [gpu.uuid for gpu in two.node.gpus] == ["GPU-a", "GPU-b", "GPU-c"]

    def test_use_is_no_change(self, two: Watched) -> None:
        """Wake nobody because a GPU is used more or less."""
        changed = two.node.changed.next
        two.report(SECOND, attrs.evolve(FIRST, figures=Figures(memory_total=1000, memory_free=1, utilization=100)))
        assert not changed.is_set()

    def test_figures(self, two: Watched) -> None:
        """Hand on the figures of each report, with trio's time."""
        figures = Figures(memory_total=1000, memory_free=1)
        two.report(attrs.evolve(FIRST, figures=figures), at=42)
        assert (two.node.usage.figures, two.node.usage.sampled_at) == ({"GPU-a": figures}, 42)

    def test_since(self, two: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep the time of the last change of a GPU's health, whatever the reason is meanwhile."""
        start = two.node.gpus[1].since
        since = []
        for now, step in enumerate((event(FIRST, CRITICAL), report(SECOND), report(FIRST, SECOND)), start=100):
            monkeypatch.setattr(time, "time", partial(float, now))
            step(two)
            since.append([gpu.since for gpu in two.node.gpus])
        assert since == [[100, start], [100, start], [102, start]]

    def test_failed_calls(self, two: Watched) -> None:
        """Count failed calls of the library by function and code."""
        for code in (999, 999, 15):
            two.monitor.call_failed(Failure("nvmlDeviceGetName", code))
        assert two.errors == {("nvmlDeviceGetName", "999"): 2, ("nvmlDeviceGetName", "15"): 1}


class TestUnhealthy:
    @pytest.mark.parametrize(
        ("steps", "unhealthy"),
        [
            pytest.param([report(SECOND)], ["GPU-a"], id="one is gone"),
            pytest.param([report()], ["GPU-a", "GPU-b"], id="all are gone"),
            pytest.param([report(FIRST, SECOND, THIRD)], [], id="one more"),
            pytest.param([report(SECOND, nodeless=("GPU-a",))], ["GPU-a"], id="without device node"),
            pytest.param([report(SECOND, skipped=("GPU-a",))], [], id="skipped"),
            pytest.param([report(FIRST, SECOND, skipped=("GPU-c",))], [], id="a stranger is skipped"),
            pytest.param([report(ASKING, SECOND)], ["GPU-a"], id="the poll shows a problem"),
            pytest.param([unanswered("GPU-b")], ["GPU-b"], id="one hangs"),
            pytest.param([unanswered("")], ["GPU-a", "GPU-b"], id="the driver hangs"),
            pytest.param([unanswered(""), report(FIRST, skipped=("GPU-b",))], ["GPU-b"], id="one was not asked since"),
            pytest.param([unanswered("GPU-c")], [], id="a stranger hangs"),
            pytest.param([not_ready()], ["GPU-a", "GPU-b"], id="no driver"),
        ],
    )
    def test_until_it_is_over(self, two: Watched, steps: list[Step], unhealthy: list[str]) -> None:
        """Keep a GPU listed as unhealthy while it can't be used, and no other; its next good answer ends that."""
        for step in steps:
            step(two)
        assert list(two.unhealthy) == unhealthy
        assert [gpu.uuid for gpu in two.node.gpus][:2] == ["GPU-a", "GPU-b"]
        two.report(FIRST, SECOND, THIRD)
        assert two.unhealthy == {}

    def test_reasons(self, two: Watched) -> None:
        """Say all that is wrong; a missing device node is another reason than a GPU that is gone."""
        two.event(FIRST, TRANSIENT)
        two.monitor.unanswered("GPU-a", "it hangs")
        assert re.fullmatch("it hangs.*poison.*", two.unhealthy["GPU-a"])
        two.report(SECOND, nodeless=("GPU-a",))
        nodeless = two.unhealthy["GPU-a"]
        assert re.search("node.*poison", nodeless)
        two.report(SECOND)
        assert two.unhealthy["GPU-a"] != nodeless
        two.report(ASKING, SECOND)
        assert re.fullmatch("[^;]*poison.*; .*reboot.*", two.unhealthy["GPU-a"])

    @pytest.mark.parametrize("step", [lambda each: each.monitor.unanswered("", "it hangs"), not_ready(gone=True)])
    def test_silent_by_itself(self, two: Watched, step: Step) -> None:
        """When the driver answers again, a GPU that is still not asked has the reason of its own again."""
        two.monitor.unanswered("GPU-b", "it crashed")
        step(two)
        assert two.unhealthy["GPU-b"] != "it crashed"
        two.report(FIRST, skipped=("GPU-b",))
        assert two.unhealthy == {"GPU-b": "it crashed"}
        two.report(FIRST)
        assert two.unhealthy["GPU-b"] != "it crashed"
        two.report(FIRST, SECOND)
        two.monitor.unanswered("", "it hangs")
        two.report(FIRST, skipped=("GPU-b",))
        assert two.unhealthy == {"GPU-b": "it hangs"}

    def test_before_the_first_report(self) -> None:
        """List no GPU that the driver has not reported."""
        watched = Watched(FaultRecord("550.1", {"GPU-a": (Fault("x", NOW, Clearance.RESET),)}))
        watched.monitor.unanswered("", "it hangs")
        watched.event(FIRST, CRITICAL)
        assert watched.node.gpus == ()


class TestEvents:
    @pytest.mark.parametrize(
        ("kind", "clearance"),
        {
            EventKind.DOUBLE_BIT_ECC: Clearance.RESET,
            EventKind.NON_FATAL_POISON: Clearance.QUARANTINE,
            EventKind.FATAL_POISON: Clearance.RESET,
            EventKind.GPU_UNAVAILABLE: Clearance.RESET,
        }.items(),
        ids=lambda value: value.name,
    )
    def test_kinds(self, two: Watched, kind: EventKind, clearance: Clearance) -> None:
        """Take the event for a fault of its GPU alone, and record when it happened and what clears it."""
        two.event(SECOND, kind)
        assert two.monitor.record.faults == {"GPU-b": (Fault(two.unhealthy["GPU-b"], NOW, clearance),)}
        assert list(two.unhealthy) == ["GPU-b"]

    @pytest.mark.parametrize("kind", EventKind)
    def test_stranger(self, two: Watched, kind: EventKind) -> None:
        """Handle every kind, and ignore events of a GPU that no report has."""
        two.event(THIRD, kind, XID[XidClass.RESET].number)
        assert (two.faults, two.unhealthy) == ({}, {})

    @pytest.mark.parametrize(
        ("xid_class", "clearance"),
        [(XidClass.TRANSIENT, Clearance.QUARANTINE), (XidClass.RESET, Clearance.RESET)],
        ids=["transient", "reset"],
    )
    def test_xid(self, two: Watched, xid_class: XidClass, clearance: Clearance) -> None:
        """Take an XID for a fault: its class decides what clears it, and the reason names it and NVIDIA's action."""
        xid = XID[xid_class]
        two.event(FIRST, EventKind.XID, xid.number)
        assert two.faults == {"GPU-a": [clearance]}
        assert list(two.unhealthy) == ["GPU-a"]
        assert [gpu.needs_reset for gpu in two.node.gpus] == [clearance is Clearance.RESET, False]
        assert all(fact in two.unhealthy["GPU-a"] for fact in (f"XID {xid.number}", xid.meaning, xid.action))

    @pytest.mark.parametrize(
        ("xid_class", "why"),
        [(XidClass.APPLICATION, "the application's fault"), (XidClass.RESET, "-ignore-xids")],
        ids=["application", "told to ignore"],
    )
    def test_ignored_xid(self, caplog: pytest.LogCaptureFixture, xid_class: XidClass, why: str) -> None:
        """Only log an XID that is the application's fault, or that the operator ignores, and which it is."""
        number = XID[xid_class].number
        watched = Watched(policy=XidPolicy(ignored=frozenset({XID[XidClass.RESET].number})))
        watched.report(FIRST)
        caplog.clear()
        watched.event(FIRST, EventKind.XID, number)
        assert (watched.faults, watched.unhealthy) == ({}, {})
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert re.search(rf"GPU-a.*XID {number}\b.*{why}", record.getMessage())

    @pytest.mark.parametrize(("kind", "xid"), [(EventKind.XID, RECOVERY_XID), (EventKind.RECOVERY_ACTION, 0)])
    def test_changed_recovery_action(self, kind: EventKind, xid: int) -> None:
        """Take no change of the recovery action for a fault, be it critical to the operator: the poll shows it."""
        watched = Watched(policy=XidPolicy(critical=frozenset({RECOVERY_XID})))
        watched.report(FIRST)
        watched.event(FIRST, kind, xid)
        assert (watched.faults, watched.unhealthy) == ({}, {})


class TestEvidence:
    """Evidence that the monitor passes on; health decides what it clears."""

    @pytest.mark.parametrize(
        ("steps", "faulty"),
        [
            pytest.param([report(FIRST, SECOND)], True, id="a clean poll"),
            pytest.param([report(SECOND)], False, id="it was gone"),
            pytest.param([report(SECOND, nodeless=("GPU-a",))], True, id="its device node was gone"),
            pytest.param([report(SECOND, skipped=("GPU-a",))], True, id="it was skipped"),
            pytest.param([unanswered("")], True, id="the library hung or crashed"),
            pytest.param([not_ready()], True, id="the driver could not be asked"),
            pytest.param([not_ready(gone=True)], False, id="it was gone too"),
            pytest.param([not_ready(gone=True), not_ready()], False, id="gone, then not asked"),
            pytest.param([not_ready(gone=True), report(SECOND, skipped=("GPU-a",))], False, id="gone, then skipped"),
            pytest.param([upgrade], False, id="another version"),
            pytest.param([upgrade, event(FIRST, CRITICAL)], True, id="another version before the fault"),
            pytest.param(
                [not_ready(gone=True), report(FIRST), event(FIRST, CRITICAL)], True, id="gone before the fault"
            ),
        ],
    )
    def test_reset(self, two: Watched, steps: list[Step], faulty: bool) -> None:
        """Clear a critical fault when the GPU or its driver was away, and not only silent."""
        two.event(FIRST, CRITICAL)
        for step in steps:
            step(two)
        two.report(FIRST, SECOND)
        assert two.faults == ({"GPU-a": [Clearance.RESET]} if faulty else {})

    def test_quarantine(self, two: Watched) -> None:
        """Measure a quarantine on the monitor's clock, from event to poll."""
        two.event(FIRST, TRANSIENT)
        for seconds, unhealthy in ((59.9, ["GPU-a"]), (0.1, [])):
            two.now += seconds
            assert list(two.unhealthy) == ["GPU-a"]  # it does not end by itself
            two.report(FIRST, SECOND)
            assert list(two.unhealthy) == unhealthy

    def test_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Use the clock that runs from the node's start, unless told otherwise."""
        monkeypatch.setattr(time, "clock_gettime", lambda clock: {time.CLOCK_BOOTTIME: 77.0}[clock])
        assert inspect.signature(Monitor).parameters["clock"].default() == 77.0


ALONE = report(FIRST, released=[SECOND.pci_bus_id])


class TestReleased:
    """The driver's process leaves a cordoned GPU alone."""

    CORDONED = Gpu(
        SECOND.uuid, SECOND.name, SECOND.pci_bus_id, SECOND.device_nodes, 900, 1000, cordon=Cordon("bad row", 7, True)
    )

    @staticmethod
    def cordoned(watched: Watched, *gpus: Gpu) -> None:
        watched.node.set_cordoned({gpu.uuid: gpu for gpu in gpus})

    def test_it_is_not_gone(self, two: Watched) -> None:
        """It keeps its place and its health, has no figures, and is no fault while the driver is away, either."""
        self.cordoned(two, self.CORDONED)
        assert two.monitor.to_release() == (ReleasedGpu(SECOND.pci_bus_id, "nvidia1"),)
        ALONE(two)
        two.monitor.not_ready(NotReady("no driver"))
        ALONE(two)
        assert [(gpu.uuid, gpu.released) for gpu in two.node.gpus] == [("GPU-a", False), ("GPU-b", True)]
        assert two.unhealthy == {}
        assert two.node.usage.figures.keys() == {"GPU-a"}

    def test_one_that_was_never_seen(self) -> None:
        """After a restart, one is as the record of its cordon has it, in the driver's order."""
        watched = Watched()
        self.cordoned(watched, attrs.evolve(self.CORDONED, pci_bus_id="00000000:01:00.0"))
        watched.report(FIRST, released=["00000000:01:00.0"])
        gpu, _ = watched.node.gpus
        assert (gpu.uuid, gpu.memory_bytes, gpu.memory_total, gpu.released) == ("GPU-b", 900, 1000, True)
        assert watched.unhealthy == {}

    def test_uncordoned_meanwhile(self, two: Watched) -> None:
        """A report of a process that leaves it alone still does not mean that it is gone: that would end faults."""
        two.event(SECOND, CRITICAL)
        self.cordoned(two, self.CORDONED)
        ALONE(two)
        self.cordoned(two)
        ALONE(two)
        two.report(FIRST, SECOND)
        assert two.faults == {"GPU-b": [Clearance.RESET]}
        assert not two.node.gpus[1].released

    def test_the_process_is_replaced(self, two: Watched) -> None:
        """What the process of before said holds no longer: one that is cordoned anew may be open again."""
        self.cordoned(two, self.CORDONED)
        ALONE(two)
        two.monitor.replaced()
        assert not two.node.gpus[1].released
        ALONE(two)
        assert two.node.gpus[1].released

    def test_a_reset(self, two: Watched) -> None:
        """A fault for which the driver wanted a reset is over when it wants none any more after the cordon."""
        two.event(SECOND, CRITICAL)
        two.report(FIRST, attrs.evolve(SECOND, recovery_action=1))
        self.cordoned(two, self.CORDONED)
        ALONE(two)
        assert "GPU-b" in two.unhealthy
        self.cordoned(two)
        two.report(FIRST, attrs.evolve(SECOND, recovery_action=0))
        assert two.unhealthy == {}

    def test_it_did_not_come_back(self, two: Watched) -> None:
        """One that is gone after the cordon is a fault."""
        self.cordoned(two, self.CORDONED)
        ALONE(two)
        self.cordoned(two)
        two.report(FIRST)
        assert two.unhealthy.keys() == {"GPU-b"}

    @pytest.mark.parametrize("released", [[SECOND.pci_bus_id], []], ids=["left alone", "not even that"])
    def test_held(self, two: Watched, released: Sequence[str], caplog: pytest.LogCaptureFixture) -> None:
        """Say why one that was to be released can't be reset; it is released when that is over."""
        self.cordoned(two, self.CORDONED)
        caplog.clear()
        two.report(FIRST, *([] if released else [SECOND]), released=released, held="it is open")
        gpu = two.node.gpus[1]
        assert (gpu.released, gpu.held) == (False, "it is open")
        assert ["it is open" in warning for warning in warnings(caplog)] == [True]
        ALONE(two)
        assert (two.node.gpus[1].released, two.node.gpus[1].held) == (True, "")


class TestRecord:
    def test_changes(self) -> None:
        """Notify of each change: a driver's version, a fault, the same fault later, and its end."""
        watched = Watched()
        versions = ["550.1"] * 4 + ["560.2"]
        faults: list[list[float]] = [[], [NOW + 61], [NOW + 122], [], []]
        steps = [report(FIRST), event(FIRST, TRANSIENT), event(FIRST, TRANSIENT), report(FIRST), upgrade]
        for step, version, since in zip(steps, versions, faults, strict=True):
            changed = watched.monitor.record_changed.next
            step(watched)
            assert changed.is_set()
            record = watched.monitor.record
            assert record.driver_version == version
            assert [fault.since for each in record.faults.values() for fault in each] == since
            watched.now += 61

    def test_no_changes(self, two: Watched) -> None:
        """Record nothing that the next poll shows again, and write nothing while nothing happens."""
        two.event(SECOND, CRITICAL)
        changed = two.monitor.record_changed.next
        two.report(ASKING, SECOND)
        two.report(SECOND, problems=("GPU 0 is left out",))
        two.monitor.unanswered("", "it hangs")
        two.monitor.not_ready(NotReady("no driver"))
        for _ in range(3):
            two.now += 3600
            two.report(FIRST, SECOND)
        assert not changed.is_set()


class TestRestored:
    RECORD = FaultRecord(
        "550.1", {uuid: (Fault("it broke", NOW - 1000, Clearance.RESET),) for uuid in ("GPU-a", "GPU-c")}
    )

    def test_first_report(self, caplog: pytest.LogCaptureFixture) -> None:
        """Never offer a GPU as healthy that was faulty when the daemon ended; log that, and write nothing for it."""
        watched = Watched(self.RECORD)
        changed = watched.monitor.record_changed.next
        watched.report(FIRST, SECOND)
        assert [offer.unit.gpu.reason for offer in watched.offered[0]] == ["it broke", ""]
        assert watched.monitor.record == self.RECORD
        assert not changed.is_set()
        (line,) = warnings(caplog)
        assert re.search("GPU-a.*it broke", line)

    @pytest.mark.parametrize(
        ("happens", "faulty"),
        [
            pytest.param(report(FIRST, SECOND), ["GPU-a"], id="gone"),
            pytest.param(report(FIRST, skipped=("GPU-c",)), ["GPU-a", "GPU-c"], id="skipped"),
            pytest.param(not_ready(gone=True), [], id="driver away"),
            pytest.param(upgrade, [], id="another driver"),
        ],
    )
    def test_evidence(self, happens: Step, faulty: list[str]) -> None:
        """Take the first message for evidence like any other, also about a GPU that is not there yet."""
        watched = Watched(self.RECORD)
        happens(watched)
        watched.report(FIRST, SECOND, THIRD)
        assert list(watched.faults) == faulty

    def test_unknown_version(self) -> None:
        """Take a driver's version for no evidence where the one before is unknown."""
        watched = Watched(FaultRecord("", self.RECORD.faults))
        watched.report(FIRST, THIRD)
        assert list(watched.faults) == ["GPU-a", "GPU-c"]


class TestLog:
    def test_start(self, caplog: pytest.LogCaptureFixture) -> None:
        """Introduce the driver and each GPU once, and the driver again after it was away."""
        watched = Watched()
        for _ in range(3):
            watched.report(FIRST, SECOND)
        driver, first, second = caplog.messages
        assert re.search("550.1.*/l/ml.so", driver)
        assert re.search("GPU-a.*Tesla T4.*00000000:3B:00.0", first)
        assert re.search("GPU-b.*NVIDIA L4.*00000000:5E:00.0", second)
        assert warnings(caplog) == []
        watched.monitor.not_ready(NotReady("no driver", gone=True))
        caplog.clear()
        watched.report(FIRST, SECOND)
        assert [message for message in caplog.messages if "550.1" in message] == [driver]
        assert len(caplog.messages) == 3  # and both GPUs are healthy again

    def test_health(self, two: Watched, caplog: pytest.LogCaptureFixture) -> None:
        """Log each change of the reason once, and the reason again when it is over."""
        reasons = []
        for happens in (
            event(FIRST, CRITICAL),
            report(FIRST, SECOND),
            event(FIRST, CRITICAL),
            report(SECOND),
            report(SECOND),
        ):
            happens(two)
            reasons.append(two.unhealthy["GPU-a"])
        two.report(FIRST, SECOND)
        two.report(FIRST, SECOND)
        lines = warnings(caplog)
        assert len(lines) == 3
        for line, reason in zip(lines, (reasons[0], reasons[-1], reasons[-1]), strict=True):
            assert re.search(rf"GPU-a.*Tesla T4.*{re.escape(reason)}", line)

    def test_problems(self, two: Watched, caplog: pytest.LogCaptureFixture) -> None:
        """Log GPUs that can't even be listed, once for as long as that lasts."""
        for problems in (("x", "y"), ("x", "y"), ("x",), (), ("x",)):
            two.report(FIRST, SECOND, problems=problems)
        assert warnings(caplog) == ["x; y", "x", "x"]

    def test_waiting(self, caplog: pytest.LogCaptureFixture) -> None:
        """Log why there is no GPU once for each reason, and again when it comes back."""
        watched = Watched()
        assert watched.monitor.waiting == ""
        for reason in ("no driver", "no driver", "no node", "no node"):
            watched.monitor.not_ready(NotReady(reason))
            assert watched.monitor.waiting == reason
        watched.report()
        assert watched.monitor.waiting == ""
        watched.monitor.not_ready(NotReady("no node"))
        assert [line.rpartition(" no ")[2] for line in warnings(caplog)] == ["driver", "node", "node"]


class TestLoggedOften:
    def test_ignored_xids(self, caplog: pytest.LogCaptureFixture) -> None:
        """A storm of them is one line a minute for each GPU and XID, with how many there were."""
        caplog.set_level(logging.INFO)
        watched = Watched()
        watched.report(FIRST, SECOND)
        caplog.clear()
        number = XID[XidClass.APPLICATION].number
        for _ in range(2000):
            watched.event(FIRST, EventKind.XID, number)
        watched.event(SECOND, EventKind.XID, number)
        assert len(caplog.messages) == 2
        watched.now += 60
        watched.event(FIRST, EventKind.XID, number)
        assert len(caplog.messages) == 3
        assert "1999" in caplog.messages[-1]


def test_since_when_after_a_restart() -> None:
    """The fault is as old as the record says, not as the daemon."""
    fault = Fault("poisoned", NOW - 1000, Clearance.RESET)
    watched = Watched(FaultRecord("550.1", {FIRST.uuid: (fault,)}))
    watched.report(FIRST)
    (gpu,) = watched.node.gpus
    assert time.time() - gpu.since == pytest.approx(1000, abs=60)


class TestAdopted:
    """What the daemon before has recorded, once this one has polled the driver itself."""

    RECORD = FaultRecord(
        "550.1",
        {
            FIRST.uuid: (Fault("a reset is due", NOW - 100, Clearance.RESET),),
            THIRD.uuid: (Fault("unknown here", NOW, Clearance.RESET),),
        },
    )

    def test_beside_what_was_seen_here(self) -> None:
        """Keep both, each from its own time."""
        watched = Watched()
        watched.report(FIRST, SECOND)
        watched.event(SECOND, TRANSIENT)
        watched.monitor.adopt(self.RECORD)
        watched.monitor.adopt(self.RECORD)
        assert watched.faults == {
            FIRST.uuid: [Clearance.RESET],
            SECOND.uuid: [Clearance.QUARANTINE],
            THIRD.uuid: [Clearance.RESET],
        }
        assert watched.unhealthy[FIRST.uuid] == "a reset is due"
        ages = {gpu.uuid: time.time() - gpu.since for gpu in watched.node.gpus}
        assert ages == pytest.approx({FIRST.uuid: 100, SECOND.uuid: 0}, abs=10)

    def test_of_another_driver(self) -> None:
        """That it was replaced clears what a reset clears, at the next poll."""
        watched = Watched()
        watched.report(FIRST)
        watched.monitor.adopt(attrs.evolve(self.RECORD, driver_version="535.2"))
        watched.report(FIRST)
        assert watched.unhealthy == {}

    def test_before_the_first_poll(self) -> None:
        """It is as if this daemon had started with it."""
        watched = Watched()
        watched.monitor.adopt(self.RECORD)
        watched.version = "550.2"
        watched.report(FIRST)
        assert watched.unhealthy == {}


def test_gpus_without_events(caplog: pytest.LogCaptureFixture) -> None:
    """Warn of them once, by UUID; it is no fault."""
    caplog.set_level(logging.WARNING)
    watched = Watched()
    for _ in range(3):
        watched.report(FIRST, SECOND, eventless=(SECOND.uuid,))
    (message,) = caplog.messages
    assert SECOND.uuid in message
    assert FIRST.uuid not in message
    assert {gpu.health for gpu in watched.node.gpus} == {Health.HEALTHY}
