"""Workers that are kept running, replaced and tried: played on a virtual clock."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import attrs
import pytest
import trio
import trio.testing
from fake_worker import (
    CONFIG,
    DEADLINE,
    INTERVAL,
    Behavior,
    CallStarted,
    FakeWorker,
    FakeWorkers,
    emits,
    exits,
    gets_stuck,
    healthy,
    report,
)

from sgpu.driver.messages import DriverEvent, EventKind, Failure, Message, NotReady, ReleasedGpu, Report
from sgpu.driver.monitor import Monitor
from sgpu.driver.process import EXIT_TIMEOUT, START_TIMEOUT, no_input
from sgpu.driver.supervisor import FIRST_RESTART, LAST_RESTART, MOST_LEFT_BEHIND, MOST_TRIALS, supervise
from sgpu.lib.concurrency import Broadcast

#: Seconds in which whatever goes wrong again and again does so many times.
LONG = 600.0
DRIVER_CALL, GPU_CALL = CallStarted(""), CallStarted("GPU-a")


class RecordingMonitor(Monitor):
    """Only notes what it gets; of an unanswered call, the UUID."""

    def __init__(self) -> None:
        self.received: list[Message] = []
        self.unanswered_uuids: list[str] = []
        self.error: Exception | None = None

    def _note(self, message: Message) -> None:
        self.received.append(message)
        if self.error:
            raise self.error

    def report(self, report: Report) -> None:
        self._note(report)

    def not_ready(self, message: NotReady) -> None:
        self._note(message)

    def event(self, event: DriverEvent) -> None:
        self._note(event)

    def call_failed(self, failure: Failure) -> None:
        self._note(failure)

    def replaced(self) -> None:
        """Nothing to note: the reports say what came of it."""

    def unanswered(self, uuid: str, reason: str) -> None:
        assert reason
        self.unanswered_uuids.append(uuid)


def run(
    monkeypatch: pytest.MonkeyPatch,
    *behaviors: Behavior,
    seconds: float,
    trials: Sequence[Behavior] = (),
    monitor: RecordingMonitor | None = None,
    meanwhile: Callable[[FakeWorkers], Awaitable[object]] | None = None,
    to_release: Callable[[], tuple[ReleasedGpu, ...]] = lambda: (),
    changed: Broadcast | None = None,
) -> tuple[RecordingMonitor, FakeWorkers]:
    """Supervise workers that behave so, for so long.

    Checks that the supervisor reports in as often as it promises, that it ends promptly, and leaves no worker running.
    """
    monitor, workers = monitor or RecordingMonitor(), FakeWorkers(*behaviors, trials=trials)
    due = [float("inf")]

    def expect(seconds: float) -> None:
        assert trio.current_time() <= due[0], "silent for longer than promised"
        assert seconds <= max(START_TIMEOUT, INTERVAL + DEADLINE) + EXIT_TIMEOUT + LAST_RESTART
        due[0] = trio.current_time() + seconds

    async def main() -> None:
        async with trio.open_nursery() as outside, trio.open_nursery() as nursery:
            workers.install(outside, monkeypatch)
            nursery.start_soon(supervise, CONFIG, monitor, DEADLINE, expect, no_input, to_release, changed)
            if meanwhile:
                nursery.start_soon(meanwhile, workers)
            await trio.sleep(seconds)
            assert trio.current_time() <= due[0] < float("inf")
            nursery.cancel_scope.cancel()
            outside.cancel_scope.deadline = trio.current_time() + EXIT_TIMEOUT  # a stuck one does not end by itself
        assert trio.current_time() <= seconds + EXIT_TIMEOUT
        for worker in (*workers.all, *workers.trials):
            await worker.check_released()
            assert (worker.config.once, worker.config.look_only) == (worker in workers.trials,) * 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return monitor, workers


def suspects(workers: Sequence[FakeWorker]) -> list[tuple[str, ...]]:
    return [worker.config.suspects for worker in workers]


class TestMessages:
    def test_each_kind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hand the monitor all messages in order, except that a call started."""
        messages: list[Message] = [
            NotReady("no driver"),
            report("GPU-a"),
            DriverEvent("GPU-a", EventKind.XID, 79),
            Failure("nvmlInit_v2", 9),
        ]
        monitor, _ = run(monkeypatch, emits(DRIVER_CALL, *messages, GPU_CALL), seconds=1)
        assert monitor.received == messages

    def test_healthy(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Keep one worker as long as it answers: no trials, no suspects, no log."""
        caplog.set_level(logging.INFO)
        monitor, workers = run(monkeypatch, healthy, seconds=LONG)
        assert set(monitor.received) == {report("GPU-a")}
        assert suspects(workers.all) == [()]
        assert workers.trials == []
        assert caplog.messages == []

    def test_failing_monitor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Raise what the monitor raises."""
        monitor = RecordingMonitor()
        monitor.error = RuntimeError("too many")
        with pytest.raises(ExceptionGroup) as raised:
            run(monkeypatch, healthy, seconds=1, monitor=monitor)
        assert raised.group_contains(RuntimeError, match=r"^too many$")


class TestReplaced:
    @pytest.mark.parametrize(
        ("behavior", "after", "unanswered"),
        [
            pytest.param(emits(report("GPU-a"), DRIVER_CALL), DEADLINE, [""], id="hang of the driver"),
            pytest.param(emits(report("GPU-a"), GPU_CALL), DEADLINE, ["GPU-a"], id="hang of a GPU"),
            pytest.param(emits(report("GPU-a")), INTERVAL + DEADLINE, [], id="silence between polls"),
            pytest.param(emits(NotReady("")), INTERVAL + DEADLINE, [""], id="silence between attempts"),
            pytest.param(exits(-6, GPU_CALL), 0, ["GPU-a"], id="crash in a call of a GPU"),
            pytest.param(exits(1), 0, [""], id="crash at the start"),
        ],
    )
    def test_hang_or_crash(
        self, monkeypatch: pytest.MonkeyPatch, behavior: Behavior, after: float, unanswered: list[str]
    ) -> None:
        """Replace the worker soon, report the call that did not return, and suspect its GPU."""
        monitor, workers = run(monkeypatch, behavior, healthy, seconds=after + 1)
        (gap,) = workers.gaps()
        assert after + FIRST_RESTART <= gap <= after + 2 * FIRST_RESTART
        assert monitor.unanswered_uuids == unanswered
        assert suspects(workers.all) == [(), tuple(filter(None, unanswered))]
        assert monitor.received[-1] == report("GPU-a")

    def test_planned_end(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Start another worker at once after one that ended by itself, with the same suspects and the GPUs in order."""
        behaviors = [exits(-6, GPU_CALL), exits(0, report("GPU-c", "GPU-b", skipped=["GPU-a"])), healthy]
        monitor, workers = run(monkeypatch, *behaviors, seconds=1)
        assert workers.gaps()[1] == 0.0
        assert suspects(workers.all) == [(), ("GPU-a",), ("GPU-a",)]
        assert [worker.config.known for worker in workers.all] == [(), (), ("GPU-c", "GPU-b", "GPU-a")]
        assert monitor.unanswered_uuids == ["GPU-a"]
        assert len(caplog.messages) == 1

    def test_delays_grow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wait longer after each worker that never answered, up to a limit."""
        _, workers = run(monkeypatch, exits(1), seconds=60)
        gaps = workers.gaps()
        assert gaps == pytest.approx([min(2 * FIRST_RESTART * 2**count, LAST_RESTART) for count in range(len(gaps))])
        assert gaps[-1] == LAST_RESTART

    def test_delays_start_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wait briefly again after a worker that answered."""
        _, workers = run(monkeypatch, *[exits(1)] * 5, exits(1, report("GPU-a")), exits(1), seconds=10)
        assert workers.gaps()[5:7] == pytest.approx([FIRST_RESTART, 2 * FIRST_RESTART])

    @pytest.mark.parametrize(
        ("behavior", "lines"),
        [pytest.param(exits(1), 1, id="never answered"), pytest.param(exits(1, report("GPU-a")), 9, id="answered")],
    )
    def test_log(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, behavior: Behavior, lines: int
    ) -> None:
        """Log a problem once, and again when workers answered in between."""
        run(monkeypatch, *[behavior] * 9, healthy, seconds=60)
        assert len(caplog.messages) == lines
        assert {record.levelname for record in caplog.records} == {"WARNING"}


RELEASED = ReleasedGpu("00000000:3B:00.0", "nvidia0")


async def leaves_alone(worker: FakeWorker) -> None:
    """Leaves the GPUs alone that it was told to, poll after poll."""
    while True:
        addresses = tuple(gpu.pci_bus_id for gpu in worker.config.released)
        await worker.emit(attrs.evolve(report("GPU-b"), released=addresses))
        await trio.sleep(INTERVAL)


class TestReleased:
    @staticmethod
    def run(
        monkeypatch: pytest.MonkeyPatch, first: Behavior, trials: Sequence[Behavior] = (), at: float = 1.0
    ) -> tuple[list[Report], FakeWorkers]:
        """Release a GPU at a time. Returns the reports since then, and the workers."""
        released: list[ReleasedGpu] = []
        changed = Broadcast()

        async def release(workers: FakeWorkers) -> None:
            changed.notify()  # nothing to do with releases
            await trio.sleep(at)
            released.append(RELEASED)
            changed.notify()

        monitor, workers = run(
            monkeypatch, first, leaves_alone, seconds=LONG, trials=trials, meanwhile=release,
            to_release=lambda: tuple(released), changed=changed,
        )  # fmt: skip
        return [each for each in monitor.received if isinstance(each, Report) and each.released], workers

    def test_another_worker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the worker at once by one that leaves the GPU alone, and only then."""
        reports, workers = self.run(monkeypatch, healthy)
        assert [worker.config.released for worker in workers.all] == [(), (RELEASED,)]
        assert workers.gaps() == [1.0]
        assert {each.held for each in reports} == {""}

    def test_a_worker_that_does_not_die(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """While one of before is stuck in a call, it may have the GPU open."""
        reports, _ = self.run(monkeypatch, gets_stuck(report("GPU-b"), DRIVER_CALL))
        assert all(each.held for each in reports)

    def test_a_single_poll(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """While one that began before goes on, it may have the GPU open; it is released when that has ended."""

        async def slow(worker: FakeWorker) -> None:
            await worker.emit(DRIVER_CALL)
            await trio.sleep(2 * INTERVAL)
            await exits(0, report("GPU-b", error="x"))(worker)

        trials = [slow]
        reports, _ = self.run(monkeypatch, emits(report("GPU-b", error="x")), trials, at=INTERVAL + 1)
        held = [bool(each.held) for each in reports]
        assert (held[0], held[-1]) == (True, False)


#: Trials that go well: of one GPU, and of all.
ANSWERS = exits(0, DRIVER_CALL, GPU_CALL, report("GPU-a"))
WELL = exits(0, DRIVER_CALL, report("GPU-a", "GPU-b"))


async def skips_one(worker: FakeWorker) -> None:
    """Leaves one GPU alone, and the other is healthy."""
    while True:
        await worker.emit(DRIVER_CALL, report("GPU-b", skipped=["GPU-a"]))
        await trio.sleep(INTERVAL)


class TestSuspects:
    BEHAVIORS = (emits(DRIVER_CALL, report("GPU-a", "GPU-b"), GPU_CALL), skips_one)

    def test_trials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Try a GPU that hangs again and again, alone, while the worker leaves it alone."""
        _, workers = run(monkeypatch, *self.BEHAVIORS, seconds=DEADLINE + 10 * (INTERVAL + DEADLINE))
        assert suspects(workers.all) == [(), ("GPU-a",)]
        assert set(suspects(workers.trials)) == {("GPU-b",)}
        assert {worker.config.known for worker in workers.trials} == {("GPU-b", "GPU-a")}
        assert workers.trials[0].started_at == pytest.approx(DEADLINE + INTERVAL)
        assert 9 <= len(workers.trials) <= 11

    @pytest.mark.parametrize(
        "trial", [pytest.param(ANSWERS, id="answer"), pytest.param(exits(0, DRIVER_CALL, NotReady("")), id="no driver")]
    )
    def test_no_more_hang(self, monkeypatch: pytest.MonkeyPatch, trial: Behavior) -> None:
        """Give the GPU back to a new worker as soon as no call about it hangs."""
        monitor, workers = run(monkeypatch, *self.BEHAVIORS, trials=[trial], seconds=DEADLINE + 3 * INTERVAL)
        assert suspects(workers.all) == [(), ("GPU-a",), ()]
        assert workers.all[2].started_at == workers.trials[0].started_at
        assert len(workers.trials) == 1
        assert monitor.unanswered_uuids == ["GPU-a"]

    @pytest.mark.parametrize(
        "trial",
        [
            pytest.param(emits(GPU_CALL), id="hangs"),
            pytest.param(exits(-6, GPU_CALL), id="crashes"),
            pytest.param(emits(DRIVER_CALL), id="the driver hangs"),
        ],
    )
    def test_failed_trials(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trial: Behavior
    ) -> None:
        """Neither report nor log a trial that fails, nor disturb the worker."""
        monitor, workers = run(monkeypatch, *self.BEHAVIORS, trials=[trial], seconds=LONG)
        assert len(workers.trials) > 10
        assert len(monitor.unanswered_uuids) == len(caplog.messages) == 1
        assert len(workers.all) == 2

    def test_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Try a GPU only once at a time, though another worker crashed in a call about it."""
        behaviors = [exits(-6, GPU_CALL), exits(-6, GPU_CALL), healthy]
        monitor, workers = run(monkeypatch, *behaviors, trials=[ANSWERS], seconds=3 * INTERVAL)
        assert monitor.unanswered_uuids == ["GPU-a"] * 2
        assert len(workers.trials) == 1

    def test_stuck_trial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start no other trial of a GPU while one is stuck in the kernel."""

        async def release(workers: FakeWorkers) -> None:
            await trio.sleep(LONG)
            assert len(workers.trials) == 1
            workers.trials[0].die(-9)

        trials = [gets_stuck(GPU_CALL), ANSWERS]
        _, workers = run(monkeypatch, *self.BEHAVIORS, trials=trials, seconds=LONG + 2 * INTERVAL, meanwhile=release)
        assert len(workers.trials) == 2
        assert workers.all[-1].config.suspects == ()

    def test_errors_of_a_trial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count the failed calls of a trial, and hand on nothing else of it."""
        failure = Failure("nvmlDeviceGetName", 999)
        trial = exits(1, GPU_CALL, failure, report("GPU-a", error="it fails"))
        monitor, _ = run(monkeypatch, *self.BEHAVIORS, trials=[trial], seconds=DEADLINE + 1.5 * INTERVAL)
        assert monitor.received.count(failure) == 1
        assert report("GPU-a", error="it fails") not in monitor.received

    def test_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Try each of many GPUs, only so many at a time, and replace workers that are stuck for each of them."""
        uuids = [f"GPU-{number}" for number in range(2 * max(MOST_TRIALS, MOST_LEFT_BEHIND))]
        behaviors = [gets_stuck(report(*uuids), CallStarted(uuid)) for uuid in uuids]
        running: list[int] = []
        active: set[FakeWorker] = set()

        async def trial(worker: FakeWorker) -> None:
            active.add(worker)
            running.append(len(active))
            await worker.emit(CallStarted("GPU-0"))
            await trio.sleep(DEADLINE / 2)
            active.discard(worker)
            await exits(1)(worker)

        _, workers = run(monkeypatch, *behaviors, healthy, trials=[trial], seconds=LONG)
        assert workers.all[-1].config.suspects == tuple(uuids)
        assert {*uuids} == set[str]().union(*({*uuids} - {*skipped} for skipped in suspects(workers.trials)))
        assert max(running) == MOST_TRIALS


FAULTY = report("GPU-b", problems=["GPU 0 is left out"])


async def faulty(worker: FakeWorker) -> None:
    """Answers for one GPU, and has a problem with another for as long as the library is open."""
    while True:
        await worker.emit(DRIVER_CALL, FAULTY)
        await trio.sleep(INTERVAL)


class TestFaulty:
    @pytest.mark.parametrize(
        "behavior",
        [pytest.param(faulty, id="left out"), pytest.param(emits(report("GPU-a", error="it fails")), id="failed call")],
    )
    def test_recovered(self, monkeypatch: pytest.MonkeyPatch, behavior: Behavior) -> None:
        """Replace a worker at once that has a problem with a GPU which answers a new process."""
        monitor, workers = run(monkeypatch, behavior, healthy, trials=[WELL], seconds=3 * INTERVAL)
        assert len(workers.all) == 2
        assert len(workers.trials) == 1
        assert workers.all[1].started_at == workers.trials[0].started_at
        assert monitor.unanswered_uuids == []

    @pytest.mark.parametrize(
        "trial",
        [
            pytest.param(exits(0, DRIVER_CALL, FAULTY), id="sees the same"),
            pytest.param(emits(DRIVER_CALL), id="hangs"),
            pytest.param(exits(-6, DRIVER_CALL), id="crashes"),
            pytest.param(exits(0, DRIVER_CALL, NotReady("")), id="no driver"),
        ],
    )
    def test_not_recovered(self, monkeypatch: pytest.MonkeyPatch, trial: Behavior) -> None:
        """Keep the worker, so that no event is missed, and go on trying."""
        monitor, workers = run(monkeypatch, faulty, trials=[trial], seconds=20 * (INTERVAL + DEADLINE))
        assert len(workers.all) == 1
        assert len(workers.trials) >= 19
        assert set(monitor.received) == {FAULTY}

    def test_replaced_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep a worker that was started after the trial."""

        async def crashes_later(worker: FakeWorker) -> None:
            await worker.emit(FAULTY)
            await trio.sleep(INTERVAL + 1)
            await exits(-6)(worker)

        async def slow(worker: FakeWorker) -> None:
            await trio.sleep(2)
            await WELL(worker)

        trials = [slow, exits(0, DRIVER_CALL, FAULTY)]
        _, workers = run(monkeypatch, crashes_later, faulty, trials=trials, seconds=10 * INTERVAL)
        assert len(workers.all) == 2

    def test_found_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep a worker that finds out by itself while the trial still sees how it was."""

        async def recovers(worker: FakeWorker) -> None:
            await worker.emit(FAULTY)
            await trio.sleep(INTERVAL + 1)
            await healthy(worker)

        async def slow(worker: FakeWorker) -> None:
            await trio.sleep(2)
            await exits(0, DRIVER_CALL, FAULTY)(worker)

        _, workers = run(monkeypatch, recovers, trials=[slow], seconds=10 * INTERVAL)
        assert (len(workers.all), len(workers.trials)) == (1, 1)

    def test_beside_a_suspect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leave suspects alone in these trials: they have their own, which leave the others alone."""
        behaviors = [emits(report("GPU-a", "GPU-b"), GPU_CALL), faulty]
        _, workers = run(monkeypatch, *behaviors, seconds=DEADLINE + 3 * INTERVAL)
        assert set(suspects(workers.trials)) == {("GPU-a",), ("GPU-b",)}


class TestStuck:
    def test_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start no more workers while several are stuck in calls of the driver; once those are gone, start one."""

        async def release(workers: FakeWorkers) -> None:
            await trio.sleep(LONG)
            assert len(workers.all) == MOST_LEFT_BEHIND
            for worker in workers.all:
                worker.die(-9)

        behaviors = [gets_stuck(DRIVER_CALL)] * MOST_LEFT_BEHIND + [healthy]
        monitor, workers = run(monkeypatch, *behaviors, seconds=LONG + 2 * LAST_RESTART, meanwhile=release)
        assert monitor.received[-1] == report("GPU-a")
        assert set(monitor.unanswered_uuids) == {""}
        assert len(workers.all) == MOST_LEFT_BEHIND + 1

    def test_ordinary_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Don't count workers that are gone as stuck."""
        behaviors = [exits(0, report("GPU-a")), exits(-6, report("GPU-a"))] * 20
        _, workers = run(monkeypatch, *behaviors, healthy, seconds=20)
        assert len(workers.all) == 41
