"""One worker from its start to its end: played on a virtual clock, and as a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    Said,
    closes,
    emits,
    exits,
    gets_stuck,
    healthy,
    report,
    silent,
)
from node import Node
from virtual_clock import real

from sgpu.driver.calls import Part
from sgpu.driver.messages import (
    DriverEvent,
    EventKind,
    Failure,
    LimitReport,
    Message,
    NotReady,
    WorkerConfig,
    decode_config,
    encode,
)
from sgpu.driver.process import EXIT_TIMEOUT, LONGEST_LINE, START_TIMEOUT, Feed, Outcome, no_input, run_worker

GPU_CALL, LIMIT_CALL = CallStarted("GPU-a"), CallStarted("GPU-b", Part.LIMITS)
EVENT = DriverEvent("GPU-b", EventKind.XID, 79)
#: Seconds after which a real process that should have said something is taken to hang.
TIMEOUT = 30.0


@attrs.define
class Run:
    """The result of one run of a fake worker. `outcome` is None if it was canceled."""

    worker: FakeWorker
    outcome: Outcome | None
    seconds: float
    messages: list[Message]


def run(
    monkeypatch: pytest.MonkeyPatch,
    behavior: Behavior,
    *,
    deadline: float = DEADLINE,
    cancel_after: float = 3600,
    feed: Feed = no_input,
) -> Run:
    """Run a worker that behaves so, and see that it is killed in the end, its pipe closed, and the caller has it."""

    async def main() -> Run:
        workers = FakeWorkers(behavior)
        left_behind: list[Any] = []
        messages: list[Message] = []
        outcome = None
        async with trio.open_nursery() as nursery:
            workers.install(nursery, monkeypatch)
            began = trio.current_time()
            with trio.move_on_after(cancel_after):
                outcome = await run_worker(CONFIG, deadline, left_behind, messages.append, feed)
            seconds = trio.current_time() - began
            nursery.cancel_scope.cancel()
        assert left_behind == workers.all
        (worker,) = workers.all
        await worker.check_released()
        return Run(worker, outcome, seconds, messages)

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class TestInput:
    def test_fed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is fed reaches the process until it is gone, which is no error; then feeding ends."""
        received: list[bytes] = []

        async def reads(worker: FakeWorker) -> None:
            received.append(bytes(await worker.input.receive_some(100)))
            await worker.input.aclose()
            await worker.emit(report("GPU-a"))
            worker.die(0)
            await worker.close()

        async def feed(stream: trio.abc.SendStream) -> None:
            await stream.send_all(b"table")
            while True:
                await stream.send_all(b"another")
                await trio.sleep(1)

        ran = run(monkeypatch, reads, feed=feed)
        assert (ran.outcome, received) == (Outcome(), [b"table"])

    @pytest.mark.parametrize(
        ("messages", "in_call", "seconds"),
        [
            pytest.param([LIMIT_CALL], "GPU-b", DEADLINE, id="hangs"),
            pytest.param([LIMIT_CALL, report("GPU-a")], "GPU-b", DEADLINE, id="hangs beside a poll"),
            pytest.param([LIMIT_CALL, LimitReport(())], None, INTERVAL + DEADLINE, id="returned"),
        ],
    )
    def test_limits_hang(
        self, monkeypatch: pytest.MonkeyPatch, messages: list[Said], in_call: str | None, seconds: float
    ) -> None:
        """A call about limits has a deadline of its own, whatever else the process says."""
        ran = run(monkeypatch, emits(report("GPU-a"), *messages))
        assert ran.outcome
        assert (ran.outcome.in_call, ran.seconds) == (in_call, seconds)


class TestMessages:
    ALL: tuple[Message, ...] = (
        NotReady("no driver"),
        report("GPU-a", "GPU-b", skipped=["GPU-c"]),
        EVENT,
        Failure("nvmlInit_v2", 9),
        NotReady("gone", gone=True),
    )

    @pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
    def test_each_is_handled_in_order(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        """Handle every message in order, whether it arrives in pieces or with others."""
        stream = b"".join(map(encode, self.ALL))
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        ran = run(monkeypatch, exits(0, *pieces))
        assert (ran.messages, ran.outcome) == (list(self.ALL), Outcome())

    def test_incomplete(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Drop a message that the process did not finish."""
        ran = run(monkeypatch, exits(-6, report("GPU-a"), encode(report("GPU-b"))[:-9]))
        assert ran.messages == [report("GPU-a")]

    @pytest.mark.parametrize(
        "garbage",
        [b"Segmentation fault\n", b"\n", b"\xff\xfe\n", b"x" * (LONGEST_LINE + 1)],
        ids=["text", "empty", "bytes", "a line without an end"],
    )
    def test_garbage(self, monkeypatch: pytest.MonkeyPatch, garbage: bytes) -> None:
        """End a process at once that writes something else, and blame the call it was in."""
        ran = run(monkeypatch, emits(GPU_CALL, garbage))
        assert ran.outcome
        assert ran.outcome.problem
        assert (ran.outcome.in_call, ran.seconds) == ("GPU-a", 0.0)

    def test_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start the worker module with this Python, its configuration, pipes, and a session of its own."""
        worker = run(monkeypatch, exits(0)).worker
        assert worker.command[:-2] == [sys.executable, "-P", "-m", "sgpu.driver"]
        assert decode_config(worker.command[-2]) == CONFIG
        inherited = [int(worker.command[-1])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        assert worker.options == {**pipes, "start_new_session": True, "pass_fds": inherited}


class TestHang:
    @pytest.mark.parametrize(
        ("messages", "deadline", "seconds", "in_call"),
        [
            pytest.param([], DEADLINE, INTERVAL + DEADLINE, None, id="no message"),
            pytest.param([], 1.0, START_TIMEOUT, None, id="no message, short deadline"),
            pytest.param([NotReady("")], 1.0, INTERVAL + 1, None, id="between polls, short deadline"),
            pytest.param([CallStarted("")], DEADLINE, DEADLINE, "", id="call of the driver"),
            pytest.param([CallStarted(""), GPU_CALL], DEADLINE, DEADLINE, "GPU-a", id="call of a GPU"),
            pytest.param([GPU_CALL, CallStarted("")], DEADLINE, DEADLINE, "", id="call of the driver after a GPU"),
            pytest.param([GPU_CALL, NotReady("")], DEADLINE, INTERVAL + DEADLINE, None, id="between attempts"),
            pytest.param([GPU_CALL, report("GPU-a")], DEADLINE, INTERVAL + DEADLINE, None, id="between polls"),
        ],
    )
    def test_silence(
        self,
        monkeypatch: pytest.MonkeyPatch,
        messages: list[Said],
        deadline: float,
        seconds: float,
        in_call: str | None,
    ) -> None:
        """Give up a silent process at its deadline, with the call it was in and how long that may take."""
        ran = run(monkeypatch, emits(*messages), deadline=deadline)
        assert ran.outcome
        assert f"{deadline:g} s" in ran.outcome.problem
        assert (ran.outcome.in_call, ran.seconds) == (in_call, seconds)

    def test_deadline_of_each_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give each call the whole deadline."""

        async def slow(worker: FakeWorker) -> None:
            for number in range(10):
                await worker.emit(CallStarted(f"GPU-{number}"))
                await trio.sleep(DEADLINE - 1)
            await exits(0, report())(worker)

        assert run(monkeypatch, slow).outcome == Outcome()

    @pytest.mark.parametrize("message", [EVENT, Failure("f", 999), b"{"], ids=["event", "failure", "half a message"])
    def test_messages_during_a_call(self, monkeypatch: pytest.MonkeyPatch, message: Message | bytes) -> None:
        """Extend no deadline for what comes while a call hangs."""
        ran = run(monkeypatch, emits(GPU_CALL, message, every=1.0))
        assert ran.outcome
        assert (ran.outcome.in_call, ran.seconds) == ("GPU-a", DEADLINE)


class TestExit:
    @pytest.mark.parametrize("messages", [[report("GPU-a")], [NotReady("")], [EVENT]], ids=["poll", "wait", "event"])
    def test_planned(self, monkeypatch: pytest.MonkeyPatch, messages: list[Message]) -> None:
        """Report no problem when a process succeeds between calls."""
        assert run(monkeypatch, exits(0, *messages)).outcome == Outcome()

    @pytest.mark.parametrize(
        ("code", "messages", "status", "in_call"),
        [
            pytest.param(0, [], "0", None, id="success before the first message"),
            pytest.param(0, [CallStarted("")], "0", "", id="success in a call of the driver"),
            pytest.param(0, [GPU_CALL], "0", "GPU-a", id="success in a call of a GPU"),
            pytest.param(0, [GPU_CALL, EVENT, Failure("f", 9)], "0", "GPU-a", id="success in a call, after an event"),
            pytest.param(1, [report("GPU-a")], "1", None, id="failure between polls"),
            pytest.param(127, [GPU_CALL], "127", "GPU-a", id="failure in a call"),
            pytest.param(-signal.SIGABRT, [GPU_CALL], "SIGABRT", "GPU-a", id="abort"),
            pytest.param(-signal.SIGKILL, [report("GPU-a")], "SIGKILL", None, id="killed"),
            pytest.param(-200, [], "-200", None, id="a signal without a name"),
        ],
    )
    def test_crash(
        self, monkeypatch: pytest.MonkeyPatch, code: int, messages: list[Said], status: str, in_call: str | None
    ) -> None:
        """Report how a process crashed and in which call, at once."""
        ran = run(monkeypatch, exits(code, *messages))
        assert ran.outcome
        assert status in ran.outcome.problem
        assert ("before it asked" in ran.outcome.problem) is not bool(messages)
        assert (ran.outcome.in_call, ran.seconds) == (in_call, 0.0)

    def test_closed_pipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give up a process that closes its pipe and stays."""
        ran = run(monkeypatch, closes(report("GPU-a")))
        assert ran.outcome
        assert ran.outcome.problem
        assert ran.seconds == EXIT_TIMEOUT

    def test_slow_exit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wait for a process that unloads its library after it closed the pipe."""
        assert run(monkeypatch, closes(report("GPU-a"), code=0, after=EXIT_TIMEOUT / 2)).outcome == Outcome()


def test_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report a process that can't be started as a problem of the whole driver."""

    async def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(trio.lowlevel, "open_process", refuse)
    outcome = trio.run(run_worker, CONFIG, DEADLINE, [], print)
    assert "Resource temporarily unavailable; no more processes" in outcome.problem
    assert outcome.in_call == ""


@pytest.mark.parametrize(
    "behavior",
    [
        pytest.param(silent, id="before the first message"),
        pytest.param(healthy, id="between polls"),
        pytest.param(emits(GPU_CALL), id="in a call"),
        pytest.param(closes(), id="while it exits"),
        pytest.param(gets_stuck(GPU_CALL), id="stuck in the kernel"),
    ],
)
def test_canceled(monkeypatch: pytest.MonkeyPatch, behavior: Behavior) -> None:
    """Kill the process when canceled, wherever it is, and don't wait for it."""
    ran = run(monkeypatch, behavior, cancel_after=EXIT_TIMEOUT / 2)
    assert (ran.outcome, ran.seconds) == (None, EXIT_TIMEOUT / 2)


@pytest.mark.process
@real
async def test_the_working_directory_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be anybody's: a module there that is named like one of ours changes nothing."""
    (tmp_path / "attrs.py").write_text("open('imported', 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    config = WorkerConfig(str(tmp_path), str(tmp_path), str(tmp_path), interval=1, once=True)
    messages: list[Message] = []
    await run_worker(config, 30, [], messages.append)
    assert any(isinstance(message, NotReady) for message in messages)
    assert not (tmp_path / "imported").exists()


@pytest.mark.process
@pytest.mark.parametrize("change", [{"calls": {"nvmlDeviceGetCount": 999}}, {"gpus": []}], ids=["error", "no GPU"])
@real
async def test_a_poll_fails_while_events_are_waited_for(node: Node, change: dict[str, Any]) -> None:
    """The process ends, because the library can't be closed; but no call took it down."""
    config = WorkerConfig(str(node.host), str(node.dev), str(node.sys), interval=0.05)
    assert await run_worker(config, TIMEOUT, [], lambda _: node.driver.set(**change)) == Outcome()
