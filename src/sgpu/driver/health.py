"""Is a GPU fit to be used, and on what evidence is it again? Pure: facts and times in, verdicts out.

Knows neither trio, nor NVML's functions, nor Kubernetes. Times are seconds since the node was started: they outlive the
process (`fault_file`), and nobody sets that clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import attrs

from sgpu.driver.messages import GpuReport

#: Seconds that a transient fault keeps a GPU out, with clean polls all along: long enough for a fault that comes
#: again to come again.
QUARANTINE: Final = 60.0

#: What NVML's field 230 says should be done (`nvmlDeviceGpuRecoveryAction_t`); 0 is nothing.
RECOVERY_ACTIONS: Final = {
    1: "reset the GPU",
    2: "reboot the node",
    3: "drain the GPU of peer-to-peer traffic",
    4: "drain the GPU and reset it",
    6: "reset the bus",
    7: "reboot the system",
}
#: Nothing, and to recover the IMEX domain, which is about memory shared between nodes and not about this GPU.
NO_RECOVERY: Final = frozenset({0, 5})
#: `nvmlGpuFabricState_t` of an NVSwitch machine whose fabric is not up: CUDA fails there with error 802.
FABRIC_NOT_READY: Final = {1: "has not started", 2: "is still coming up"}
FABRIC_COMPLETE: Final = 3
_ASKS: Final = "the driver asks to"


class Clearance(enum.Enum):
    """The condition that clears an event-reported fault."""

    QUARANTINE = "quarantine"
    RESET = "reset"


@attrs.frozen
class Fault:
    """A fault that an event reported, and that no poll shows."""

    reason: str
    since: float
    clearance: Clearance


@attrs.frozen
class Condition:
    """The problems of one GPU or MIG instance. `polled` are those that the last poll showed, `unanswered` is why there
    was none.

    `unclean`: when a poll last showed something, in seconds since the node was started.
    `gone`: the driver answered without this GPU, or was reloaded since it last answered for it.
    """

    faults: tuple[Fault, ...] = ()
    polled: tuple[str, ...] = ()
    unanswered: str = ""
    gone: bool = False
    unclean: float = 0.0

    @property
    def reasons(self) -> tuple[str, ...]:
        """Return why the GPU is unhealthy; empty when it is healthy."""
        unanswered = (self.unanswered,) if self.unanswered else ()
        return (*unanswered, *(fault.reason for fault in self.faults), *self.polled)


@attrs.frozen
class FaultRecord:
    """State that outlives the daemon: faults that only evidence clears, by UUID, and the driver version of then."""

    driver_version: str = ""
    faults: Mapping[str, tuple[Fault, ...]] = attrs.Factory(dict)


def struck(condition: Condition, fault: Fault) -> Condition:
    """Return the condition after an event. When the same fault occurs again, its quarantine starts again."""
    others = tuple(known for known in condition.faults if known.reason != fault.reason)
    return attrs.evolve(condition, faults=(*others, fault))


def silent(condition: Condition, reason: str, *, gone: bool) -> Condition:
    """Return the condition after the driver failed to answer for this GPU, or no longer lists it (`gone`)."""
    return attrs.evolve(condition, unanswered=reason, gone=condition.gone or gone)


def reloaded(condition: Condition) -> Condition:
    """Return the condition after the driver was reloaded, whether or not it answers for this GPU yet."""
    return attrs.evolve(condition, gone=True)


def polled(condition: Condition, report: GpuReport, now: float) -> Condition:
    """Return the condition after a poll that answered.

    A GPU that was gone and is there again has been reset. One that only did not answer has not.
    """
    problems = polled_problems(report)
    return _after_poll(condition, problems, problems, report.recovery_action, now, asked=asks(condition))


def instance_polled(condition: Condition, problem: str, gpu: GpuReport, now: float, *, asked: bool) -> Condition:
    """Return the condition of a MIG instance after a poll of its GPU that answered. `problem` is the instance's own.

    What the driver asks for, now and before (`asked`), it asks of the GPU.
    """
    problems = (problem,) if problem else ()
    return _after_poll(condition, problems, polled_problems(gpu), gpu.recovery_action, now, asked=asked)


def asks(condition: Condition) -> bool:
    """Return whether the last poll showed that the driver asks for something."""
    return any(problem.startswith(_ASKS) for problem in condition.polled)


def _after_poll(
    condition: Condition,
    problems: tuple[str, ...],
    of_gpu: tuple[str, ...],
    recovery_action: int | None,
    now: float,
    *,
    asked: bool,
) -> Condition:
    clean = not problems and not of_gpu
    unclean = condition.unclean if clean else now
    kept = tuple(
        fault
        for fault in condition.faults
        if not _over(
            fault,
            recovery_action,
            clean=clean,
            quiet=now - max(fault.since, unclean) >= QUARANTINE,
            fresh=condition.gone,
            asked=asked,
        )
    )
    return Condition(faults=kept, polled=problems, unclean=unclean)


def polled_problems(report: GpuReport) -> tuple[str, ...]:
    """Return the problems that a poll shows. They are over when the next one no longer shows them."""
    problems = []
    if report.error:
        problems.append(f"the driver fails to answer: {report.error}")
    if report.recovery_action is not None and report.recovery_action not in NO_RECOVERY:
        action = RECOVERY_ACTIONS.get(report.recovery_action, f"take action {report.recovery_action}")
        problems.append(f"{_ASKS} {action}")
    if report.rows_failed:
        problems.append("remapping a bad row of its memory failed; replace the GPU")
    if report.rows_pending:
        problems.append("a bad row of its memory waits to be remapped; reset the GPU")
    if report.pages_pending:
        problems.append("a bad page of its memory waits to be retired; reset the GPU")
    if report.fabric_state in FABRIC_NOT_READY:
        problems.append(f"the NVSwitch fabric {FABRIC_NOT_READY[report.fabric_state]}; check nvidia-fabricmanager")
    if report.fabric_state == FABRIC_COMPLETE and report.fabric_status:
        problems.append(f"the NVSwitch fabric failed (NVML error {report.fabric_status}); check nvidia-fabricmanager")
    return tuple(problems)


def _over(fault: Fault, recovery_action: int | None, *, clean: bool, quiet: bool, fresh: bool, asked: bool) -> bool:
    """`quiet`: neither the fault nor an unclean poll for as long as a quarantine."""
    if fault.clearance is Clearance.QUARANTINE:
        return quiet
    # That the driver asks for nothing any more is evidence at once; that it asked for nothing all along is some only
    # after a while, because it makes up its mind late. Drivers that never say need a reset.
    return fresh or (recovery_action == 0 and clean and (asked or quiet))
