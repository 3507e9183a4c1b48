"""What is known against a GPU, and on what evidence it is over. Times are explicit: seconds after the fault."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu import health
from sgpu.health import QUARANTINE, Condition, Cure, Fault
from sgpu.report import GpuReport

pytestmark = pytest.mark.pure

#: An old one, of which the driver says nothing.
GPU = GpuReport(uuid="GPU-a", name="Tesla T4", pci_bus_id="00000000:3B:00.0", device_nodes=("nvidia0",))
#: From a driver that knows of recovery actions, and has none to ask for.
QUIET = attrs.evolve(GPU, recovery_action=0)
ASKING = attrs.evolve(GPU, recovery_action=1)
ROWS = attrs.evolve(QUIET, rows_pending=True)
#: When faults happen here: as good a time as any.
T = 1_700_000_000.0
TRANSIENT = Fault("XID 94", T, Cure.QUARANTINE)
RESET = Fault("XID 79", T, Cure.RESET)


def struck(*faults: Fault) -> Condition:
    """After these, one by one."""
    condition = Condition()
    for fault in faults:
        condition = health.struck(condition, fault)
    return condition


def polled(condition: Condition, after: float = 0.0, report: GpuReport = GPU, *, restarted: bool = False) -> Condition:
    """After a poll that many seconds after the fault. `restarted`: the driver was loaded anew before it."""
    return health.polled(health.reloaded(condition) if restarted else condition, report, T + after)


def silent(condition: Condition, reason: str = "it hangs") -> Condition:
    return health.silent(condition, reason, gone=False)


def gone(condition: Condition) -> Condition:
    return health.silent(condition, "it is gone", gone=True)


class TestPolledTroubles:
    @pytest.mark.parametrize(
        ("facts", "words"),
        [
            pytest.param({"error": "it is lost"}, "the driver fails to answer for it: it is lost", id="no answer"),
            pytest.param({"recovery_action": 1}, "the driver asks to reset the GPU", id="action 1"),
            pytest.param({"recovery_action": 2}, "the driver asks to reboot the node", id="action 2"),
            pytest.param(
                {"recovery_action": 3}, "the driver asks to drain the GPU of peer-to-peer traffic", id="action 3"
            ),
            pytest.param({"recovery_action": 4}, "the driver asks to drain the GPU and reset it", id="action 4"),
            pytest.param({"recovery_action": 6}, "the driver asks to reset the bus", id="action 6"),
            pytest.param({"recovery_action": 7}, "the driver asks to reboot the system", id="action 7"),
            pytest.param({"recovery_action": 99}, "the driver asks to take action 99", id="unknown action"),
            pytest.param(
                {"rows_failed": True}, "remapping a bad row of its memory failed; replace the GPU", id="rows failed"
            ),
            pytest.param(
                {"rows_pending": True},
                "a bad row of its memory waits to be remapped; reset the GPU",
                id="rows pending",
            ),
            pytest.param(
                {"pages_pending": True},
                "a bad page of its memory waits to be retired; reset the GPU",
                id="pages pending",
            ),
            pytest.param(
                {"fabric_state": 1},
                "the NVSwitch fabric has not started; check nvidia-fabricmanager",
                id="fabric not started",
            ),
            pytest.param(
                {"fabric_state": 2, "fabric_status": 0},
                "the NVSwitch fabric is still coming up; check nvidia-fabricmanager",
                id="fabric in progress",
            ),
            pytest.param(
                {"fabric_state": 3, "fabric_status": 999},
                "the NVSwitch fabric failed (NVML error 999); check nvidia-fabricmanager",
                id="fabric failed",
            ),
        ],
    )
    def test_a_fault(self, facts: dict[str, Any], words: str) -> None:
        """Each fact is a fault by itself, in these words."""
        assert health.polled_troubles(attrs.evolve(GPU, **facts)) == (words,)

    @pytest.mark.parametrize(
        "facts",
        [
            pytest.param({}, id="nothing is told"),
            pytest.param({"recovery_action": 0}, id="no action"),
            pytest.param({"recovery_action": 5}, id="action 5 is about memory between nodes"),
            pytest.param({"rows_failed": False, "rows_pending": False, "pages_pending": False}, id="good memory"),
            pytest.param({"fabric_state": 0}, id="no fabric"),
            pytest.param({"fabric_state": 0, "fabric_status": 999}, id="no fabric, whatever its status"),
            pytest.param({"fabric_state": 3}, id="fabric complete, status not told"),
            pytest.param({"fabric_state": 3, "fabric_status": 0}, id="fabric complete"),
            pytest.param({"fabric_state": 4, "fabric_status": 1}, id="a state that is not known"),
            pytest.param({"memory_used": 10, "memory_total": 10, "memory_free": 0, "utilisation": 100}, id="busy"),
        ],
    )
    def test_no_fault(self, facts: dict[str, Any]) -> None:
        """What a GPU is not asked, or does not know, is none."""
        assert health.polled_troubles(attrs.evolve(GPU, **facts)) == ()

    @pytest.mark.parametrize("status", [None, 0, 999])
    @pytest.mark.parametrize("state", [1, 2])
    def test_the_status_counts_only_when_complete(self, state: int, status: int | None) -> None:
        """Before, it is said to be not ready, once."""
        (trouble,) = health.polled_troubles(attrs.evolve(GPU, fabric_state=state, fabric_status=status))
        assert "failed" not in trouble

    def test_all_at_once(self) -> None:
        """Each is told, the worst first."""
        report = attrs.evolve(
            GPU,
            error="it is lost",
            recovery_action=2,
            rows_failed=True,
            rows_pending=True,
            pages_pending=True,
            fabric_state=3,
            fabric_status=1,
        )
        starts = ["the driver fails", "the driver asks", "remapping", "a bad row", "a bad page", "the NVSwitch fabric"]
        troubles = health.polled_troubles(report)
        assert [trouble[: len(start)] for trouble, start in zip(troubles, starts, strict=True)] == starts


class TestReasons:
    def test_nothing_known(self) -> None:
        """A GPU is fit until proven otherwise."""
        assert Condition().reasons == ()

    def test_order(self) -> None:
        """No answer first: it is why the rest is old."""
        condition = silent(polled(struck(RESET), report=ASKING))
        assert condition.reasons == ("it hangs", "XID 79", "the driver asks to reset the GPU")

    @given(
        faults=st.lists(st.sampled_from([TRANSIENT, RESET]), max_size=2),
        reason=st.sampled_from(["", "it hangs"]),
        action=st.sampled_from([None, 0, 1]),
    )
    def test_empty_iff_nothing_is_known(self, faults: list[Fault], reason: str, action: int | None) -> None:
        """Each of the three kinds of evidence is enough, and there is no other."""
        condition = polled(struck(*faults), report=attrs.evolve(GPU, recovery_action=action))
        condition = silent(condition, reason)
        assert (not condition.reasons) is (not faults and not reason and action != 1)


class TestPolls:
    def test_a_polled_trouble_lasts_as_long_as_it_is_polled(self) -> None:
        """No quarantine: the next clean poll ends it."""
        down = polled(Condition(), report=ASKING)
        assert down.reasons == ("the driver asks to reset the GPU",)
        assert polled(down, 0.1, QUIET).reasons == ()

    @pytest.mark.parametrize("was_gone", [True, False], ids=["gone", "silent"])
    def test_an_answer_ends_silence(self, was_gone: bool) -> None:
        """The GPU is as well as the answer says."""
        before = health.silent(Condition(), "x", gone=was_gone)
        assert before.reasons == ("x",)
        assert polled(before).reasons == ()
        assert polled(before, report=ASKING).reasons == ("the driver asks to reset the GPU",)

    def test_the_last_silence_is_the_reason(self) -> None:
        """It hung, and then it was gone: what it is now."""
        assert gone(silent(Condition())).reasons == ("it is gone",)
        assert silent(gone(Condition())).reasons == ("it hangs",)

    def test_silence_keeps_the_rest(self) -> None:
        """What was known before is still true for all that is known."""
        before = polled(struck(TRANSIENT), report=ASKING)
        assert silent(before).reasons == ("it hangs", *before.reasons)


class TestQuarantine:
    @pytest.mark.parametrize("report", [GPU, QUIET, attrs.evolve(GPU, recovery_action=5)])
    @pytest.mark.parametrize(
        ("after", "healthy"),
        [
            pytest.param(0.0, False, id="at once"),
            pytest.param(5.0, False, id="the next poll"),
            pytest.param(QUARANTINE - 0.001, False, id="just before its end"),
            pytest.param(QUARANTINE, True, id="at its end"),
            pytest.param(10 * QUARANTINE, True, id="long after"),
            pytest.param(-3600.0, False, id="the clock was set back"),
        ],
    )
    def test_it_ends_after_a_minute(self, after: float, healthy: bool, report: GpuReport) -> None:
        """By the first clean poll from then on, whether or not the driver knows of recovery actions."""
        assert (not polled(struck(TRANSIENT), after, report).reasons) is healthy

    def test_a_minute(self) -> None:
        """What the issue and docs/xids.md say."""
        assert QUARANTINE == 60.0

    def test_polls_meanwhile(self) -> None:
        """Clean ones change nothing before the end."""
        condition = struck(TRANSIENT)
        for after in range(5, 60, 5):
            condition = polled(condition, after)
            assert condition.reasons == ("XID 94",)
        assert polled(condition, 60).reasons == ()

    @pytest.mark.parametrize("after", [60, 3600])
    def test_an_unclean_poll_at_the_end_keeps_it(self, after: float) -> None:
        """However late; both are told."""
        condition = polled(struck(TRANSIENT), after, ASKING)
        assert condition.reasons == ("XID 94", "the driver asks to reset the GPU")

    def test_an_unclean_poll_in_between_starts_it_anew(self) -> None:
        """The quarantine is one in which nothing else was found wrong, as docs/xids.md says."""
        condition = polled(struck(TRANSIENT), 30, ASKING)
        for after in (35, 60, 65, 85):
            condition = polled(condition, after, QUIET)
            assert condition.reasons == ("XID 94",), after
        assert polled(condition, 95, QUIET).reasons == ()

    @pytest.mark.parametrize(("after", "healthy"), [(60.0, False), (89.0, False), (90.0, True)])
    def test_the_same_fault_again_starts_it_anew(self, after: float, healthy: bool) -> None:
        """A minute from the last time, and it is told once."""
        condition = struck(TRANSIENT, attrs.evolve(TRANSIENT, since=T + 30))
        assert condition.reasons == ("XID 94",)
        assert (not polled(condition, after).reasons) is healthy

    def test_each_fault_has_its_own(self) -> None:
        """The first to come is the first to go."""
        condition = struck(TRANSIENT, Fault("XID 63", T + 30, Cure.QUARANTINE))
        assert condition.reasons == ("XID 94", "XID 63")
        condition = polled(condition, 60)
        assert condition.reasons == ("XID 63",)
        assert polled(condition, 90).reasons == ()

    def test_a_reset_does_not_shorten_it(self) -> None:
        """A transient fault says nothing that a reset would undo."""
        assert polled(gone(struck(TRANSIENT)), 5).reasons == ("XID 94",)
        assert polled(struck(TRANSIENT), 5, restarted=True).reasons == ("XID 94",)


class TestReset:
    def test_never_without_evidence(self) -> None:
        """Clean polls are none, from a driver that does not know the question."""
        condition = struck(RESET)
        for after in (0.0, 60.0, 3600.0, 1e9):
            condition = polled(condition, after)
            assert condition.reasons == ("XID 79",)

    @pytest.mark.parametrize("action", [None, 0, 5, 1])
    def test_it_was_gone(self, action: int | None) -> None:
        """One that is there again was reset; what the poll shows counts by itself."""
        assert polled(gone(struck(RESET)), 0.1, attrs.evolve(GPU, recovery_action=action)).faults == ()

    def test_it_was_gone_and_then_did_not_answer(self) -> None:
        """What came first is not forgotten."""
        assert polled(silent(gone(struck(RESET))), 0.1).reasons == ()

    def test_it_did_not_answer_and_then_was_gone(self) -> None:
        """Nor what came last."""
        assert polled(gone(silent(struck(RESET))), 0.1).reasons == ()

    @pytest.mark.parametrize("report", [GPU, QUIET])
    def test_it_only_did_not_answer(self, report: GpuReport) -> None:
        """A call that hung, or a library that crashed, resets nothing."""
        assert polled(silent(struck(RESET)), 0.1, report).reasons == ("XID 79",)

    def test_it_was_gone_before(self) -> None:
        """A fault that comes after the answer is a new one."""
        condition = polled(gone(struck(RESET)), 1)
        condition = health.struck(condition, attrs.evolve(RESET, since=T + 2))
        assert polled(condition, 3600).reasons == ("XID 79",)

    def test_the_driver_was_restarted(self) -> None:
        """At once: and not by itself, but with the answer."""
        assert health.reloaded(struck(RESET)).reasons == ("XID 79",)
        assert polled(struck(RESET), 0.1, restarted=True).reasons == ()

    def test_the_driver_was_restarted_and_does_not_answer_yet(self) -> None:
        """What came first is not forgotten here, either."""
        condition = silent(health.reloaded(struck(RESET)))
        assert polled(condition, 0.1).reasons == ()

    @pytest.mark.parametrize("action", [1, 2, 3, 4, 6, 7, 99])
    def test_the_recovery_action_was_set_and_cleared(self, action: int) -> None:
        """At once: the driver saw to it that it was done."""
        condition = polled(struck(RESET), 0.1, attrs.evolve(GPU, recovery_action=action))
        assert len(condition.reasons) == 2
        assert polled(condition, 0.2, QUIET).reasons == ()

    def test_the_recovery_action_was_set_before(self) -> None:
        """The poll may be faster than the event."""
        condition = health.struck(polled(Condition(), -1, ASKING), RESET)
        assert polled(condition, 0.2, QUIET).reasons == ()

    @pytest.mark.parametrize(("after", "healthy"), [(0.1, False), (59.9, False), (60.0, True)])
    def test_no_action_all_along(self, after: float, healthy: bool) -> None:
        """That it never asked for one is evidence only after a minute: it makes up its mind late."""
        condition = polled(struck(RESET), 0.05, QUIET)
        assert (not polled(condition, after, QUIET).reasons) is healthy

    def test_another_action(self) -> None:
        """One that is no fault is not none, either."""
        condition = polled(struck(RESET), 1, ASKING)
        condition = polled(condition, 3600, attrs.evolve(GPU, recovery_action=5))
        assert condition.reasons == ("XID 79",)

    def test_the_question_is_no_longer_known(self) -> None:
        """Not to be told is not to be told that it is over."""
        condition = polled(struck(RESET), 1, ASKING)
        assert polled(condition, 3600, GPU).reasons == ("XID 79",)

    def test_the_action_is_cleared_but_not_all_is_well(self) -> None:
        """Rows that wait to be remapped take a reset too."""
        condition = polled(polled(struck(RESET), 1, ASKING), 2, ROWS)
        assert condition.reasons == ("XID 79", "a bad row of its memory waits to be remapped; reset the GPU")


class TestBoth:
    def test_each_has_its_own_cure(self) -> None:
        """A reset is no quarantine, and a quarantine is no reset."""
        condition = struck(RESET, TRANSIENT)
        assert polled(condition, 5, restarted=True).reasons == ("XID 94",)
        assert polled(condition, 60).reasons == ("XID 79",)
        assert polled(condition, 60, restarted=True).reasons == ()

    def test_the_same_words_with_another_cure(self) -> None:
        """The last one counts: the operator may have changed what it means."""
        critical = attrs.evolve(TRANSIENT, cure=Cure.RESET)
        assert struck(TRANSIENT, critical).faults == (critical,)

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("struck"), st.sampled_from([TRANSIENT, RESET])),
                st.tuples(st.sampled_from(["silent", "gone"]), st.none()),
                st.tuples(st.sampled_from(["polled", "restarted"]), st.sampled_from([GPU, QUIET, ASKING])),
            ),
            max_size=12,
        )
    )
    def test_there_is_always_a_way_back(self, steps: list[tuple[str, Any]]) -> None:
        """Whatever happened, no fault is told twice, and a restarted driver and clean polls end it."""
        condition, now = Condition(), 0.0
        for step, argument in steps:
            now += 5
            if step == "struck":
                condition = health.struck(condition, attrs.evolve(argument, since=T + now))
            elif step in ("silent", "gone"):
                condition = silent(condition) if step == "silent" else gone(condition)
            else:
                condition = polled(condition, now, argument, restarted=step == "restarted")
            assert len({fault.reason for fault in condition.faults}) == len(condition.faults)
        condition = polled(condition, now, restarted=True)
        condition = polled(condition, now + 2 * QUARANTINE)
        assert condition.reasons == ()
