"""Faults of a GPU, and the evidence that clears them. Times are seconds after the first fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.driver import health
from sgpu.driver.health import QUARANTINE, RECOVERY_ACTIONS, Clearance, Condition, Fault
from sgpu.driver.messages import GpuReport

pytestmark = pytest.mark.pure

#: From a driver that says nothing of the GPU's health.
GPU = GpuReport(uuid="GPU-a", name="Tesla T4", pci_bus_id="00000000:3B:00.0", device_nodes=("nvidia0",))
#: From one that knows recovery actions: it asks for none, for one that is no fault, and for a reset.
QUIET = attrs.evolve(GPU, recovery_action=0)
OTHER = attrs.evolve(GPU, recovery_action=5)
ASKING = attrs.evolve(GPU, recovery_action=1)
ROWS = attrs.evolve(QUIET, rows_pending=True)
START = 1000.0

Step = Callable[[Condition], Condition]


def transient(at: float = 0, reason: str = "transient") -> Step:
    """A fault that a quarantine clears."""
    return lambda condition: health.struck(condition, Fault(reason, START + at, Clearance.QUARANTINE))


def critical(at: float = 0, reason: str = "critical") -> Step:
    """A fault that a reset clears."""
    return lambda condition: health.struck(condition, Fault(reason, START + at, Clearance.RESET))


def poll(at: float, report: GpuReport = GPU) -> Step:
    return lambda condition: health.polled(condition, report, START + at)


silent: Step = partial(health.silent, reason="it hangs", gone=False)
gone: Step = partial(health.silent, reason="it is gone", gone=True)
reloaded: Step = health.reloaded


def after(*steps: Step) -> Condition:
    return reduce(lambda condition, step: step(condition), steps, Condition())


class TestPolledProblems:
    @pytest.mark.parametrize(
        ("facts", "match"),
        [
            pytest.param({"error": "it is lost"}, "it is lost", id="no answer"),
            *(
                pytest.param({"recovery_action": action}, word, id=f"recovery action {action}")
                for action, word in {
                    1: "^(?!.*(drain|bus)).* reset",
                    2: "reboot.* node",
                    3: "drain.* peer",
                    4: "drain.* reset",
                    6: "reset.* bus",
                    7: "reboot.* system",
                    99: "99",
                }.items()
            ),
            pytest.param({"rows_failed": True}, "row.* replace", id="rows failed"),
            pytest.param({"rows_pending": True}, "row.* reset", id="rows pending"),
            pytest.param({"pages_pending": True}, "page.* reset", id="pages pending"),
            pytest.param({"fabric_state": 1}, "nvidia-fabricmanager", id="fabric not started"),
            pytest.param({"fabric_state": 1, "fabric_status": 999}, "^[^9]*$", id="not started, whatever its status"),
            pytest.param({"fabric_state": 2, "fabric_status": 0}, "nvidia-fabricmanager", id="fabric in progress"),
            pytest.param({"fabric_state": 2, "fabric_status": 999}, "^[^9]*$", id="in progress, whatever its status"),
            pytest.param({"fabric_state": 3, "fabric_status": 999}, "999.* nvidia-fabricmanager", id="fabric failed"),
        ],
    )
    def test_fault(self, facts: dict[str, Any], match: str) -> None:
        """Find one problem in each fact, and say what to do."""
        (problem,) = health.polled_problems(attrs.evolve(GPU, **facts))
        assert re.search(match, problem)

    @pytest.mark.parametrize(
        "facts",
        [
            pytest.param({}, id="nothing is known"),
            pytest.param({"recovery_action": 0}, id="no action"),
            pytest.param({"recovery_action": 5}, id="action 5 is about memory between nodes"),
            pytest.param({"rows_failed": False, "rows_pending": False, "pages_pending": False}, id="good memory"),
            pytest.param({"fabric_state": 0, "fabric_status": 999}, id="no fabric"),
            pytest.param({"fabric_state": 3}, id="fabric complete, status unknown"),
            pytest.param({"fabric_state": 3, "fabric_status": 0}, id="fabric complete"),
            pytest.param({"fabric_state": 4, "fabric_status": 1}, id="unknown fabric state"),
        ],
    )
    def test_no_fault(self, facts: dict[str, Any]) -> None:
        """Find nothing in what is well, or unknown."""
        assert health.polled_problems(attrs.evolve(GPU, **facts)) == ()

    def test_all_at_once(self) -> None:
        """Name each problem, the worst first."""
        facts: list[dict[str, Any]] = [
            {"error": "it is lost"},
            {"recovery_action": 2},
            {"rows_failed": True},
            {"rows_pending": True},
            {"pages_pending": True},
            {"fabric_state": 3, "fabric_status": 1},
        ]
        each = tuple(problem for fact in facts for problem in health.polled_problems(attrs.evolve(GPU, **fact)))
        together = {key: value for fact in facts for key, value in fact.items()}
        assert health.polled_problems(attrs.evolve(GPU, **together)) == each


def test_reasons() -> None:
    """Name a missing answer first, then the faults, then what the poll showed; name nothing for a healthy GPU."""
    asks = health.polled_problems(ASKING)
    assert Condition().reasons == ()
    assert after(silent).reasons == ("it hangs",)
    assert after(critical()).reasons == ("critical",)
    assert after(poll(0, ASKING)).reasons == asks
    assert after(critical(), transient(), poll(0, ASKING), silent).reasons == (
        "it hangs",
        "critical",
        "transient",
        *asks,
    )


@pytest.mark.parametrize(
    ("steps", "reasons"),
    [
        pytest.param([poll(0, ASKING), poll(0.1, QUIET)], (), id="a clean poll ends what a poll showed"),
        pytest.param([silent, poll(0)], (), id="an answer ends silence"),
        pytest.param([silent, poll(0, ASKING)], health.polled_problems(ASKING), id="the answer may be a fault"),
        pytest.param([silent, gone], ("it is gone",), id="hung, then gone"),
        pytest.param([gone, silent], ("it hangs",), id="gone, then hung"),
    ],
)
def test_poll(steps: Sequence[Step], reasons: tuple[str, ...]) -> None:
    """Hold against a GPU what the last poll showed, and no longer."""
    assert after(*steps).reasons == reasons


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        pytest.param([poll(0)], "transient", id="at once"),
        pytest.param([poll(59.999)], "transient", id="just before its end"),
        pytest.param([poll(60)], "", id="at its end"),
        pytest.param([poll(60, QUIET)], "", id="from a driver that asks for nothing"),
        pytest.param([poll(3600, ASKING)], "transient", id="the first poll in an hour is unclean"),
        pytest.param([poll(30, ROWS), poll(89.9, QUIET)], "transient", id="an unclean poll starts it anew"),
        pytest.param([poll(30, ROWS), poll(35), poll(90, QUIET)], "", id="and it ends a minute later"),
        pytest.param([poll(30, ROWS), silent, poll(60)], "transient", id="silence does not undo the unclean poll"),
        pytest.param([transient(30), poll(89)], "transient", id="the same fault starts it anew, and counts once"),
        pytest.param([transient(30), poll(90)], "", id="and it too ends a minute later"),
        pytest.param([transient(30, "other"), poll(60)], "other", id="each fault has its own"),
        pytest.param([reloaded, poll(5)], "transient", id="a reloaded driver does not shorten it"),
        pytest.param([critical(), poll(60)], "critical", id="it clears no critical fault"),
    ],
)
def test_quarantine(steps: Sequence[Step], left: str) -> None:
    """Clear a transient fault with a clean poll after a minute without the fault and without unclean polls."""
    assert QUARANTINE == 60.0, "as docs/health.md and docs/xids.md say"
    assert " ".join(fault.reason for fault in after(poll(-30, ROWS), transient(), *steps).faults) == left


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        pytest.param([poll(60), poll(1e9)], "critical", id="clean polls of a driver that knows no recovery action"),
        *(
            pytest.param([gone, poll(0.1, report)], "", id=f"gone and back, recovery action {report.recovery_action}")
            for report in (GPU, QUIET, OTHER, ASKING)
        ),
        pytest.param([gone, silent, poll(0.1)], "", id="gone, then silent, and back"),
        pytest.param([silent, gone, poll(0.1)], "", id="silent, then gone, and back"),
        pytest.param([silent, poll(0.1, QUIET)], "critical", id="only silent"),
        pytest.param([gone, poll(1), critical(2), poll(3600)], "critical", id="gone and back before the fault"),
        pytest.param([reloaded], "critical", id="the driver was reloaded and has not answered yet"),
        pytest.param([reloaded, poll(0.1)], "", id="the driver was reloaded"),
        *(
            pytest.param(
                [poll(0.1, attrs.evolve(GPU, recovery_action=action)), poll(0.2, QUIET)],
                "",
                id=f"the driver withdraws action {action}",
            )
            for action in (*RECOVERY_ACTIONS, 99)
        ),
        pytest.param([poll(1, ASKING), poll(2, OTHER), poll(3600, OTHER)], "critical", id="it asks for another action"),
        pytest.param([poll(1, ASKING), poll(3600, GPU)], "critical", id="it no longer says"),
        pytest.param([poll(1, ASKING), poll(2, ROWS)], "critical", id="it withdraws the action, and rows are pending"),
        pytest.param([poll(0, QUIET), poll(59.9, QUIET)], "critical", id="it asks for nothing, for too short a time"),
        pytest.param([poll(30, ROWS), poll(60, QUIET)], "critical", id="an unclean poll starts that minute anew"),
        pytest.param([poll(30, ROWS), poll(90, QUIET)], "", id="and it ends later"),
        pytest.param([transient(), reloaded, poll(60)], "", id="a reset and a quarantine clear both"),
        pytest.param([transient(0, "critical"), poll(60)], "", id="the last event decides what clears a fault"),
    ],
)
def test_reset(steps: Sequence[Step], left: str) -> None:
    """Clear a critical fault only with evidence: the GPU or driver was away, or the driver asks for nothing."""
    assert " ".join(fault.reason for fault in after(critical(), *steps).faults) == left


def test_recovery_action_before_the_event() -> None:
    """Count the driver's request although a poll showed it before the event arrived."""
    assert after(poll(-1, ASKING), critical(), poll(0.2, QUIET)).faults == ()


@given(
    st.lists(
        st.sampled_from(
            [
                lambda now: transient(now),
                lambda now: critical(now),
                lambda now: silent,
                lambda now: gone,
                lambda now: reloaded,
                *(partial(poll, report=report) for report in (GPU, QUIET, ASKING)),
            ]
        ),
        max_size=12,
    )
)
def test_way_back(steps: list[Callable[[float], Step]]) -> None:
    """Whatever happened: name no fault twice, and let a reloaded driver and clean polls clear all."""
    condition, now = Condition(), 0.0
    for step in steps:
        now += 5
        condition = step(now)(condition)
        assert len(set(condition.reasons)) == len(condition.reasons)
    assert reduce(lambda known, last: last(known), [reloaded, poll(now), poll(now + 60)], condition).reasons == ()
