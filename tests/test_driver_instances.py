"""The conditions of MIG instances, as the monitor shows them in the node's GPUs. The clock stands still."""

from __future__ import annotations

import logging
import time
from collections import Counter

import attrs
import pytest
import trio

from sgpu.driver.health import QUARANTINE, Clearance, Fault, FaultRecord
from sgpu.driver.messages import DriverEvent, EventKind, GpuReport, InstanceReport, NotReady, Report
from sgpu.driver.monitor import Monitor
from sgpu.driver.xids import XidPolicy
from sgpu.node.figures import Figures
from sgpu.node.gpu import MigInstance, units
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState

pytestmark = pytest.mark.pure

FIGURES = Figures(1000, 400, None, ())
TRANSIENT, RESET, IGNORED = 94, 79, 13


def instance(letter: str, gpu_instance: int, compute_instance: int = 0, problem: str = "") -> InstanceReport:
    ids = (gpu_instance, compute_instance)
    return InstanceReport(f"MIG-{letter}", "A100 MIG 1g.5gb", "1g.5gb", *ids, 900, ("c/1",), FIGURES, problem)


A, B, C = instance("a", 1), instance("b", 2), instance("c", 2, 1)
CARD = GpuReport(
    "GPU-p",
    "A100",
    "0:3B:0.0",
    ("nvidia0",),
    figures=Figures(8000),
    mig_mode=True,
    recovery_action=0,
    instances=(A, B, C),
)
OTHER = GpuReport("GPU-o", "T4", "0:5E:0.0", ("nvidia1",), figures=Figures(99, 9, 5, ()))


class Watched:
    """A monitor of these GPUs, and a clock to move."""

    def __init__(self, *gpus: GpuReport, record: FaultRecord | None = None, problems: tuple[str, ...] = ()) -> None:
        self.now = 5000.0
        self.node = NodeState(Policy("example.com/gpu", 10), interval=5)
        clock = lambda: self.now  # noqa: E731
        self.monitor = Monitor(self.node, XidPolicy(), record or FaultRecord(), Counter(), clock=clock)
        self.report(*gpus, problems=problems)

    def report(self, *gpus: GpuReport, problems: tuple[str, ...] = (), version: str = "550.1") -> None:
        async def take() -> None:
            self.monitor.report(Report(gpus, problems, (), version, "/l"))

        trio.run(take)

    def xid(self, number: int, *ids: int, uuid: str = "GPU-p") -> None:
        self.monitor.event(DriverEvent(uuid, EventKind.XID, number, *ids))

    @property
    def down(self) -> str:
        """The last letters of the units that are unhealthy."""
        return "".join(unit.uuid[-1] for gpu in self.node.gpus for unit in units(gpu) if unit.reason)

    @property
    def recorded(self) -> set[str]:
        return set(self.monitor.record.faults)


def without_b(**facts: object) -> GpuReport:
    return attrs.evolve(CARD, instances=(A, C), **facts)  # type: ignore[arg-type]


def test_facts() -> None:
    """The node has the instances as the driver says, and figures of each, not of their card."""
    watched = Watched(CARD, OTHER)
    gpu = watched.node.gpus[0]
    assert (gpu.mig_mode, gpu.mig_pending, gpu.memory_total) == (True, False, 8000)
    assert gpu.instances[0] == MigInstance("MIG-a", "A100 MIG 1g.5gb", "1g.5gb", 900, ("c/1",))
    assert set(watched.node.usage.figures) == {"MIG-a", "MIG-b", "MIG-c", "GPU-o"}


class TestEvents:
    @pytest.mark.parametrize(
        ("ids", "down"),
        [
            pytest.param((1, 0), "a", id="one"),
            pytest.param((2, 1), "c", id="one of two in a GPU instance"),
            pytest.param((2,), "bc", id="all of a GPU instance"),
            pytest.param((), "abc", id="no instance"),
            pytest.param((7, 0), "", id="one that nobody knows"),
        ],
    )
    def test_xid(self, ids: tuple[int, ...], down: str) -> None:
        """An XID marks the instance that it is of; one without an instance marks all of the card."""
        watched = Watched(CARD, OTHER)
        watched.xid(TRANSIENT, *ids)
        assert watched.down == down

    def test_not_in_mig_mode(self) -> None:
        """Ids in an event of a GPU that is not in MIG mode say nothing."""
        watched = Watched(CARD, OTHER)
        watched.xid(TRANSIENT, 1, 0, uuid="GPU-o")
        assert watched.down == "o"

    def test_of_the_card(self) -> None:
        """Other events are about the card."""
        watched = Watched(CARD)
        watched.monitor.event(DriverEvent("GPU-p", EventKind.FATAL_POISON))
        assert watched.down == "abc"

    def test_ignored(self, caplog: pytest.LogCaptureFixture) -> None:
        """An application's XID is logged with its instance, and marks nothing."""
        caplog.set_level(logging.INFO)
        watched = Watched(CARD)
        watched.xid(IGNORED, 2, 1)
        watched.xid(IGNORED, 2)
        assert watched.down == ""
        assert [message.split(":")[0] for message in caplog.messages[-2:]] == ["MIG instance MIG-c", "GPU GPU-p"]

    def test_before_the_poll(self) -> None:
        """An event of an instance that no poll has found yet counts when the next one does, and not for later ones."""
        watched = Watched(attrs.evolve(CARD, instances=(A,)))
        watched.xid(TRANSIENT, 2, 1)
        watched.xid(TRANSIENT, 2, 1)
        watched.report(attrs.evolve(CARD, instances=(A, C)))
        assert watched.down == "c"
        watched.report(CARD)
        assert watched.down == "c"

    @pytest.mark.parametrize(
        ("steps", "down"),
        [
            pytest.param("X", "d", id="no word of it"),
            pytest.param("CX", "d", id="before the event"),
            pytest.param("XC", "", id="after it"),
        ],
    )
    def test_replaced_before_the_poll(self, steps: str, down: str) -> None:
        """An event can be of the instance that took the place of another, unless that came later."""
        watched = Watched(CARD)
        for step in steps:
            if step == "X":
                watched.xid(TRANSIENT, 1, 0)
            else:
                watched.monitor.event(DriverEvent("GPU-p", EventKind.MIG_CONFIG_CHANGE))
        watched.report(attrs.evolve(CARD, instances=(instance("d", 1), B, C)))
        assert watched.down == down

    def test_unknown_before_another(self) -> None:
        """An event of an instance that nobody knows yet still counts when others are created after it."""
        watched = Watched(attrs.evolve(CARD, instances=(A,)))
        watched.xid(TRANSIENT, 2, 1)
        watched.monitor.event(DriverEvent("GPU-p", EventKind.MIG_CONFIG_CHANGE))
        watched.report(CARD)
        assert watched.down == "c"

    @pytest.mark.parametrize("how", ["reset", "reloaded"])
    def test_reset_before_the_poll(self, how: str) -> None:
        """No event from before a reset is about what is there afterwards."""
        watched = Watched(CARD, OTHER)
        watched.xid(RESET, 1, 0)
        if how == "reset":
            watched.report(OTHER)
        else:
            watched.monitor.not_ready(NotReady("no driver", gone=True))
        watched.report(attrs.evolve(CARD, instances=(instance("d", 1), B, C)), OTHER)
        assert watched.down == ""


class TestHealing:
    def test_quarantine(self) -> None:
        """A transient fault is over after a time of clean polls, of the instance and of its card."""
        watched = Watched(CARD)
        watched.xid(TRANSIENT, 1, 0)
        watched.now += QUARANTINE - 1
        watched.report(attrs.evolve(CARD, rows_pending=True))
        assert watched.down == "abc"
        watched.now += QUARANTINE - 1
        watched.report(CARD)
        assert watched.down == "a"
        watched.now += 1
        watched.report(CARD)
        assert watched.down == ""

    def test_withdrawn(self) -> None:
        """When the driver withdraws what it asked of the card, a fault that needs a reset is over."""
        watched = Watched(CARD)
        watched.xid(RESET, 1, 0)
        watched.report(attrs.evolve(CARD, recovery_action=1))
        assert watched.down == "abc"
        watched.report(CARD)
        assert watched.down == ""

    def test_card_was_gone(self) -> None:
        """A card that was gone and is back was reset, and its instances with it."""
        watched = Watched(attrs.evolve(CARD, recovery_action=None), OTHER)
        watched.xid(RESET, 1, 0)
        watched.now += 1000
        watched.report(OTHER)
        assert watched.down == "abc"
        watched.report(attrs.evolve(CARD, recovery_action=None), OTHER)
        assert watched.down == ""

    @pytest.mark.parametrize("reload", ["not ready", "another version"])
    def test_reloaded(self, reload: str) -> None:
        """A driver that was reloaded has reset all instances."""
        watched = Watched(CARD)
        watched.xid(RESET, 1, 0)
        if reload == "not ready":
            watched.monitor.not_ready(NotReady("no driver", gone=True))
            watched.report(CARD)
        else:
            watched.report(CARD, version="560.2")
        assert watched.down == ""

    def test_destroyed(self) -> None:
        """The faults of an instance that was destroyed are over."""
        watched = Watched(CARD)
        watched.xid(RESET, 2, 0)
        assert watched.recorded == {"MIG-b"}
        watched.report(without_b())
        assert (watched.down, watched.recorded) == ("", set())
        watched.report(CARD)
        assert watched.down == ""

    def test_problem(self, caplog: pytest.LogCaptureFixture) -> None:
        """An instance without its device nodes is unhealthy until they are there; the log says so each time."""
        missing = attrs.evolve(CARD, instances=(attrs.evolve(A, problem="no node"), B, C))
        watched = Watched(missing)
        assert watched.down == "a"
        watched.report(CARD)
        assert watched.down == ""
        assert [message for message in caplog.messages if "no node" in message] == [
            "MIG instance MIG-a (A100 MIG 1g.5gb) is unhealthy: no node",
            "MIG instance MIG-a (A100 MIG 1g.5gb) is healthy again; it was unhealthy: no node",
        ]


def test_adopt() -> None:
    """Take the faults of instances that another daemon recorded meanwhile, also of one that is not seen yet."""
    watched = Watched(CARD)
    faults = (Fault("XID 95", 4980.0, Clearance.RESET),)
    watched.monitor.adopt(FaultRecord("550.1", {"MIG-b": faults, "MIG-d": faults}))
    assert (watched.down, watched.recorded) == ("b", {"MIG-b", "MIG-d"})
    assert time.time() - watched.node.gpus[0].instances[1].since == pytest.approx(20, abs=10)
    watched.report(CARD)
    assert watched.recorded == {"MIG-b"}


class TestUnknown:
    def test_error(self) -> None:
        """A card that fails to answer keeps its instances, without figures, and all are unhealthy."""
        watched = Watched(CARD)
        error = GpuReport("GPU-p", "A100", "0:3B:0.0", ("nvidia0",), error="999")
        watched.report(error)
        assert watched.down == "abc"
        assert watched.node.usage.figures == dict.fromkeys(("MIG-a", "MIG-b", "MIG-c"), Figures())
        watched.report(CARD)
        assert watched.down == ""

    def test_memory(self) -> None:
        """The memory of a card in MIG mode stays known when a poll does not say it: shares depend on it."""
        watched = Watched(CARD)
        watched.report(attrs.evolve(CARD, figures=Figures()))
        assert watched.node.gpus[0].memory_total == 8000

    def test_mode(self) -> None:
        """Another mode brings other units."""
        watched = Watched(CARD)
        watched.report(attrs.evolve(CARD, mig_mode=False, instances=()))
        assert watched.node.gpus[0].instances == ()
        assert set(watched.node.usage.figures) == {"GPU-p"}


class TestRecord:
    RECORD = FaultRecord("550.1", {"MIG-b": (Fault("XID 79", 4000.0, Clearance.RESET),)})
    SILENT = attrs.evolve(CARD, recovery_action=None)

    def test_restart(self) -> None:
        """The faults of an instance outlive a restart of the daemon, with the time since when it has them."""
        watched = Watched(self.SILENT, record=self.RECORD)
        assert (watched.down, watched.recorded) == ("b", {"MIG-b"})
        since = {unit.uuid: unit.since for unit in units(watched.node.gpus[0])}
        assert since["MIG-b"] == pytest.approx(time.time() - 1000, abs=60)

    def test_destroyed_meanwhile(self) -> None:
        """An instance that is not there any more is forgotten, once every GPU has answered."""
        watched = Watched(without_b(), record=self.RECORD)
        assert watched.recorded == set()
        watched = Watched(OTHER, record=self.RECORD)
        assert watched.recorded == set()

    def test_not_seen_yet(self) -> None:
        """It is not, as long as a GPU that may have it does not answer."""
        watched = Watched(OTHER, record=self.RECORD, problems=("GPU 0 is left out",))
        assert watched.recorded == {"MIG-b"}
        watched.report(OTHER, self.SILENT)
        assert watched.down == "b"
