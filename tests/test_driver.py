"""The driver's process, supervised: with processes made up, on trio's virtual clock, and with real ones."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from node import Node
from stub_driver import StubGpu

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

from sgpu import driver, probing
from sgpu.driver import FIRST_RESTART, LAST_RESTART, MOST_LEFT_BEHIND, MOST_TRIALS, watch_driver
from sgpu.inventory import Inventory
from sgpu.monitor import Memory, Monitor
from sgpu.probing import EXIT_TIMEOUT, START_TIMEOUT
from sgpu.report import (
    Asking,
    DriverEvent,
    EventKind,
    Failure,
    GpuReport,
    Message,
    NotReady,
    Orders,
    Report,
    decode_orders,
    encode,
    encode_orders,
)
from sgpu.xids import XidPolicy

#: Seconds between polls, and that a call may take.
INTERVAL = 5.0
DEADLINE = 20.0
ORDERS = Orders("/host", "/dev", "/sys", INTERVAL)
#: More starts than any test needs.
TOO_MANY = 100
TIMEOUT = 10.0


def gpu(uuid: str) -> GpuReport:
    return GpuReport(uuid=uuid, name="Tesla T4", pci_bus_id="", device_nodes=())


def report(*uuids: str, unasked: Sequence[str] = (), problems: Sequence[str] = ()) -> Report:
    order = (*uuids, *unasked)
    return Report(tuple(map(gpu, uuids)), tuple(problems), tuple(unasked), "550.1", "/l/nvml.so", order=order)


class Heard(Monitor):
    """A monitor that only writes down what it is told, and when."""

    def __init__(self) -> None:
        super().__init__(Inventory(), 1, XidPolicy(), Memory(), failed=self._hear)
        self.times: list[float] = []
        self.heard: list[object] = []
        self.error: Exception | None = None
        self._more = trio.Event()

    async def wait(self, until: Callable[[Heard], object]) -> None:
        """Until that is so."""
        while not until(self):
            await self._more.wait()

    def _hear(self, what: object) -> None:
        self.times.append(trio.current_time())
        self.heard.append(what)
        self._more.set()
        self._more = trio.Event()
        if self.error:
            raise self.error

    def report(self, report: Report) -> None:
        self._hear(report)

    def not_ready(self, trouble: NotReady) -> None:
        self._hear(trouble)

    def event(self, event: DriverEvent) -> None:
        self._hear(event)

    def unanswered(self, uuid: str, reason: str) -> None:
        self._hear((uuid, reason))

    @property
    def unanswered_calls(self) -> list[tuple[str, str]]:
        """GPU and reason, of each time that there was no answer."""
        return [what for what in self.heard if isinstance(what, tuple)]


class FakeProcess:
    """As much of a trio.Process as is used. A `stuck` one does not die when it is killed."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.began = trio.current_time()
        self.returncode: int | None = None
        self.killed = False
        self.stuck = False
        self.scope = trio.CancelScope()
        self._output, self.stdout = trio.testing.memory_stream_one_way_pair()
        self._died = trio.Event()

    async def say(self, *messages: Message | bytes) -> None:
        """Write them to standard output, each in a piece of its own."""
        for message in messages:
            await self._output.send_all(message if isinstance(message, bytes) else encode(message))

    async def close(self) -> None:
        """Close standard output."""
        await self._output.aclose()

    async def exit(self, code: int) -> None:
        """Come to an end by itself."""
        self.die(code)
        await self.close()

    def die(self, code: int) -> None:
        """Be gone."""
        self.returncode = code
        self._died.set()

    def kill(self) -> None:
        """As trio.Process has it: a process that is gone can be killed too."""
        self.killed = True
        if self.returncode is None and not self.stuck:
            self.scope.cancel()
            self.die(-9)

    async def wait(self) -> int | None:
        """Until it is gone."""
        await self._died.wait()
        return self.returncode


Behaviour = Callable[[FakeProcess], Awaitable[object]]


class Processes:
    """Stands in for `trio.lowlevel.open_process`: the n-th process has the n-th behaviour, later ones the last.

    Trials are counted by themselves, and have behaviours of their own.
    """

    def __init__(self, *behaviours: Behaviour, trials: Sequence[Behaviour] = ()) -> None:
        self.behaviours = behaviours
        self.trial_behaviours = trials or (mute,)
        self.all: list[FakeProcess] = []
        self.trials: list[FakeProcess] = []
        self.commands: list[tuple[list[str], dict[str, Any]]] = []

    async def open(self, nursery: trio.Nursery, command: list[str], **options: Any) -> FakeProcess:  # noqa: ANN401
        await trio.lowlevel.checkpoint()
        assert len(self.all) < TOO_MANY, "processes are started without end"
        self.commands.append((command, options))
        process = FakeProcess(decode_orders(command[-1]))
        behaviours = self.trial_behaviours if process.orders.once else self.behaviours
        others = self.trials if process.orders.once else self.all
        behaviour = behaviours[min(len(others), len(behaviours) - 1)]
        others.append(process)
        nursery.start_soon(self._run, behaviour, process)
        return process

    async def _run(self, behaviour: Behaviour, process: FakeProcess) -> None:
        with process.scope:
            await behaviour(process)
            await trio.sleep_forever()

    def gaps(self) -> list[float]:
        """Seconds between the starts."""
        return [after.began - before.began for before, after in itertools.pairwise(self.all)]


def watch(
    monkeypatch: pytest.MonkeyPatch,
    *behaviours: Behaviour,
    seconds: float,
    heard: Heard | None = None,
    meanwhile: Callable[[Processes], Awaitable[object]] | None = None,
    trials: Sequence[Behaviour] = (),
) -> tuple[Heard, Processes]:
    """Watch processes that behave so, for so long, and see that all are killed in the end, and their pipes closed."""
    heard, processes = heard or Heard(), Processes(*behaviours, trials=trials)
    until = [float("inf")]

    def expect(seconds: float) -> None:
        assert trio.current_time() <= until[0], "it was silent for longer than it had said"
        until[0] = trio.current_time() + seconds

    async def main() -> None:
        async with trio.open_nursery() as outside, trio.open_nursery() as nursery:
            monkeypatch.setattr(trio.lowlevel, "open_process", partial(processes.open, outside))
            nursery.start_soon(watch_driver, ORDERS, heard, DEADLINE, expect)
            if meanwhile:
                nursery.start_soon(meanwhile, processes)
            await trio.sleep(seconds)
            assert trio.current_time() <= until[0] < float("inf")
            nursery.cancel_scope.cancel()
            outside.cancel_scope.deadline = trio.current_time() + 1  # a stuck one does not end by itself
        for process in (*processes.all, *processes.trials):
            assert process.killed
            with pytest.raises(trio.ClosedResourceError):
                await process.stdout.receive_some(1)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return heard, processes


async def fine(process: FakeProcess) -> None:
    """Answers for one GPU, and all is well."""
    await process.say(Asking(""), Asking("GPU-a"), report("GPU-a"))
    while True:
        await trio.sleep(INTERVAL)
        await process.say(report("GPU-a"))


async def mute(process: FakeProcess) -> None:
    """Starts and says nothing."""


async def closes(process: FakeProcess) -> None:
    """Closes its pipe, and stays."""
    await process.close()


def says(*messages: Message | bytes) -> Behaviour:
    """Says that, and nothing more."""

    async def behaviour(process: FakeProcess) -> None:
        await process.say(*messages)

    return behaviour


def ends(code: int, *messages: Message | bytes) -> Behaviour:
    """Says that, and ends."""

    async def behaviour(process: FakeProcess) -> None:
        await process.say(*messages)
        await process.exit(code)

    return behaviour


def stuck(*messages: Message | bytes) -> Behaviour:
    """Says that, and is then stuck in the kernel for good."""

    async def behaviour(process: FakeProcess) -> None:
        process.stuck = True
        await process.say(*messages)

    return behaviour


class TestMessages:
    SAID = (
        NotReady("no driver"),
        report("GPU-a", "GPU-b", unasked=["GPU-c"]),
        DriverEvent("GPU-a", EventKind.XID, 79),
        Failure("nvmlInit_v2", 9),
        NotReady("gone", gone=True),
    )

    def test_each_is_handed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In order; but for whom it asks, which is nobody else's business."""
        heard, _ = watch(monkeypatch, says(Asking(""), *self.SAID, Asking("GPU-a")), seconds=1)
        assert heard.heard == list(self.SAID)

    @pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
    def test_however_they_arrive(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        """In pieces, or more than one at a time."""
        stream = b"".join(encode(message) for message in self.SAID)
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        heard, _ = watch(monkeypatch, says(*pieces), seconds=1)
        assert heard.heard == list(self.SAID)

    def test_what_is_cut_short_is_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process may end in the middle of a word."""
        heard, _ = watch(monkeypatch, ends(-6, report("GPU-a"), encode(report("GPU-b"))[:-9]), seconds=0.01)
        assert heard.heard[0] == report("GPU-a")
        assert report("GPU-b") not in heard.heard

    def test_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """This Python, its orders, nothing to read, and a session of its own."""
        _, processes = watch(monkeypatch, fine, seconds=1)
        ((command, options),) = processes.commands
        assert command[:-1] == [sys.executable, "-m", "sgpu.probe"]
        assert decode_orders(command[-1]) == ORDERS
        assert options == {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "start_new_session": True}

    def test_all_is_well(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """One process for ever, and nothing to log."""
        caplog.set_level(logging.INFO)
        heard, processes = watch(monkeypatch, fine, seconds=3600)
        assert len(processes.all) == 1
        assert set(heard.heard) == {report("GPU-a")}
        assert caplog.messages == []

    def test_what_the_monitor_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is the caller's; the process goes with it."""
        heard = Heard()
        heard.error = RuntimeError("too many")
        with pytest.raises(ExceptionGroup) as raised:
            watch(monkeypatch, fine, seconds=1, heard=heard)
        assert raised.group_contains(RuntimeError, match=r"^too many$")


class TestDeadline:
    @pytest.mark.parametrize(
        ("said", "after", "about"),
        [
            pytest.param([], START_TIMEOUT, None, id="before the first word"),
            pytest.param([Asking("")], DEADLINE, "", id="asking the driver"),
            pytest.param([Asking(""), Asking("GPU-a")], DEADLINE, "GPU-a", id="asking a GPU"),
            pytest.param([Asking("GPU-a"), Failure("f", 999)], DEADLINE, "GPU-a", id="asking a GPU, after a failure"),
            pytest.param([Asking("GPU-a"), Asking("")], DEADLINE, "", id="asking the driver again"),
            pytest.param([Asking("GPU-a"), NotReady("x")], INTERVAL + DEADLINE, "", id="between attempts"),
            pytest.param(
                [DriverEvent("GPU-a", EventKind.RECOVERY_ACTION)], INTERVAL + DEADLINE, "", id="after an event"
            ),
        ],
    )
    def test_silence(
        self, monkeypatch: pytest.MonkeyPatch, said: list[Message], after: float, about: str | None
    ) -> None:
        """Past the deadline is told, with whom it is about, and what time it took; and not a moment before."""
        if about is None:
            after, about = max(START_TIMEOUT, INTERVAL + DEADLINE), ""
        early, _ = watch(monkeypatch, says(*said), fine, seconds=after - 0.01)
        assert early.unanswered_calls == []
        late, processes = watch(monkeypatch, says(*said), fine, seconds=after + 0.01)
        assert late.unanswered_calls == [(about, "the driver has not answered for 20 s")]
        assert processes.all[0].killed

    def test_every_word_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The deadline is for one call, not for all of them."""

        async def slow(process: FakeProcess) -> None:
            for number in range(100):
                await process.say(Asking(f"GPU-{number}"))
                await trio.sleep(DEADLINE - 1)

        heard, processes = watch(monkeypatch, slow, seconds=100 * (DEADLINE - 1))
        assert heard.heard == []
        assert len(processes.all) == 1

    def test_half_a_word_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may be the last of a process that is stuck in the middle."""

        async def drip(process: FakeProcess) -> None:
            await process.say(Asking("GPU-a"))
            while True:
                await trio.sleep(1)
                await process.say(b"{")

        heard, _ = watch(monkeypatch, drip, fine, seconds=DEADLINE + 0.01)
        assert [uuid for uuid, _ in heard.unanswered_calls] == ["GPU-a"]

    def test_another_takes_its_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shortly after; and when that one answers, all is as it was."""
        heard, processes = watch(monkeypatch, says(Asking("GPU-a")), fine, seconds=DEADLINE + 1)
        (gap,) = processes.gaps()
        assert DEADLINE < gap <= DEADLINE + 2 * FIRST_RESTART
        assert heard.heard[1:] == [report("GPU-a")]

    def test_it_is_logged(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """With what is done about it."""
        watch(monkeypatch, says(Asking("GPU-a")), fine, seconds=DEADLINE + 1)
        assert caplog.messages == ["the driver has not answered for 20 s; starting it again"]

    def test_between_polls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that says nothing more, and was asking nobody, is replaced; what it last said may well hold."""
        heard, processes = watch(monkeypatch, says(report("GPU-a")), fine, seconds=INTERVAL + DEADLINE + 1)
        assert processes.gaps()[0] == pytest.approx(INTERVAL + DEADLINE + FIRST_RESTART)
        assert heard.heard == [report("GPU-a")] * 2

    def test_events_do_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They come while a call hangs, too, and are handed on; whom it is about is not forgotten."""

        async def hangs(process: FakeProcess) -> None:
            await process.say(Asking("GPU-a"))
            while True:
                await trio.sleep(1)
                await process.say(DriverEvent("GPU-b", EventKind.XID, 79))

        heard, _ = watch(monkeypatch, hangs, fine, seconds=DEADLINE + 0.01)
        assert heard.heard.count(DriverEvent("GPU-b", EventKind.XID, 79)) >= DEADLINE - 1
        assert [uuid for uuid, _ in heard.unanswered_calls] == ["GPU-a"]


class TestKnown:
    def test_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The order of the last report, so that the next process can say which GPU a call by its place is about."""
        behaviours = [ends(0, report("GPU-b", "GPU-a")), fine]
        _, processes = watch(monkeypatch, *behaviours, seconds=1)
        assert [process.orders.known for process in processes.all] == [(), ("GPU-b", "GPU-a")]


def all_asked(uuid: str) -> Behaviour:
    """Asks about that GPU, which answers, and ends."""
    return ends(0, Asking(""), Asking(uuid), report(uuid))


async def others(process: FakeProcess) -> None:
    """Leaves one GPU alone, and the other is well."""
    while True:
        await process.say(Asking(""), report("GPU-b", unasked=["GPU-a"]))
        await trio.sleep(INTERVAL)


class TestSuspects:
    BEHAVIOURS = (says(Asking(""), report("GPU-a", "GPU-b"), Asking("GPU-a")), others)

    def test_none_at_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Everyone is trusted, and nobody is tried."""
        _, processes = watch(monkeypatch, fine, seconds=3600)
        assert processes.all[0].orders.suspects == ()
        assert processes.trials == []

    def test_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the process that watches the others, for as long as it takes."""
        _, processes = watch(monkeypatch, *self.BEHAVIOURS, seconds=3600)
        assert [process.orders.suspects for process in processes.all] == [(), ("GPU-a",)]

    def test_tried_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a process that asks once, and nobody else, soon after and then again and again."""
        _, processes = watch(monkeypatch, *self.BEHAVIOURS, seconds=DEADLINE + 10 * (INTERVAL + DEADLINE))
        assert {process.orders.suspects for process in processes.trials} == {("GPU-b",)}
        assert {process.orders.known for process in processes.trials} == {("GPU-b", "GPU-a")}
        assert processes.trials[0].began == pytest.approx(DEADLINE + INTERVAL)
        assert 9 <= len(processes.trials) <= 11

    @pytest.mark.parametrize(
        "answer",
        [
            pytest.param(all_asked("GPU-a"), id="it answers"),
            pytest.param(ends(0, Asking(""), NotReady("no driver")), id="there is no driver any more"),
        ],
    )
    def test_trusted_again(self, monkeypatch: pytest.MonkeyPatch, answer: Behaviour) -> None:
        """As soon as no call hangs any more: a process that watches all takes over at once, without a word."""
        heard, processes = watch(monkeypatch, *self.BEHAVIOURS, trials=[answer], seconds=DEADLINE + 3 * INTERVAL)
        assert [process.orders.suspects for process in processes.all] == [(), ("GPU-a",), ()]
        assert processes.all[2].began == processes.trials[0].began
        assert len(processes.trials) == 1
        assert len(heard.unanswered_calls) == 1

    @pytest.mark.parametrize(
        "trial",
        [
            pytest.param(says(Asking("GPU-a")), id="hangs"),
            pytest.param(ends(-6, Asking("GPU-a")), id="crashes"),
            pytest.param(says(Asking("")), id="the driver hangs"),
        ],
    )
    def test_a_trial_is_nobody_s_business(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trial: Behaviour
    ) -> None:
        """If it goes wrong, nothing is new."""
        heard, processes = watch(monkeypatch, *self.BEHAVIOURS, trials=[trial], seconds=3600)
        assert len(processes.trials) > 10
        assert len(heard.unanswered_calls) == len(caplog.messages) == 1
        assert len(processes.all) == 2

    def test_a_trial_that_is_stuck(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the kernel: there is no other about this GPU until it is gone."""

        async def let_go(processes: Processes) -> None:
            await trio.sleep(3600)
            assert len(processes.trials) == 1
            processes.trials[0].die(-9)

        trials = [stuck(Asking("GPU-a")), all_asked("GPU-a")]
        _, processes = watch(
            monkeypatch, *self.BEHAVIOURS, trials=trials, seconds=3600 + 2 * INTERVAL, meanwhile=let_go
        )
        assert len(processes.trials) == 2
        assert processes.all[-1].orders.suspects == ()

    def test_errors_of_a_trial_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of the library, as the process that watches tells of them."""
        heard = Heard()
        failed: list[Failure] = []
        heard.failed = failed.append
        trial = ends(1, Asking("GPU-a"), Failure("nvmlDeviceGetName", 999))
        watch(monkeypatch, *self.BEHAVIOURS, trials=[trial], seconds=DEADLINE + 2 * INTERVAL, heard=heard)
        assert set(failed) == {Failure("nvmlDeviceGetName", 999)}

    def test_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each has trials of its own, though never too many at a time: they take memory."""
        uuids = [f"GPU-{number}" for number in range(2 * MOST_TRIALS)]
        behaviours = [says(report(*uuids), Asking(uuid)) for uuid in uuids]
        trials: list[tuple[float, float]] = []

        async def trial(process: FakeProcess) -> None:
            await process.say(Asking("GPU-0"))
            await trio.sleep(DEADLINE / 2)
            trials.append((process.began, trio.current_time()))
            await process.exit(1)

        _, processes = watch(monkeypatch, *behaviours, fine, trials=[trial], seconds=3600)
        assert processes.all[-1].orders.suspects == tuple(uuids)
        tried = [set(uuids) - set(process.orders.suspects) for process in processes.trials]
        assert set.union(*tried) == set(uuids)
        for began, _ in trials:
            assert sum(start <= began < end for start, end in trials) <= MOST_TRIALS

    def test_the_driver_is_no_suspect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has to be asked."""
        _, processes = watch(monkeypatch, says(Asking("")), fine, seconds=DEADLINE + 1)
        assert processes.all[1].orders.suspects == ()

    def test_kept_over_a_planned_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new library does not make them answer."""
        behaviours = [says(Asking("GPU-a")), ends(0, report("GPU-b", unasked=["GPU-a"])), fine]
        _, processes = watch(monkeypatch, *behaviours, seconds=DEADLINE + 1)
        assert processes.all[2].orders.suspects == ("GPU-a",)

    def test_a_crash_makes_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Like a hang."""
        heard, processes = watch(monkeypatch, ends(-11, Asking("GPU-a")), fine, seconds=1)
        assert processes.all[1].orders.suspects == ("GPU-a",)
        assert [uuid for uuid, _ in heard.unanswered_calls] == ["GPU-a"]


BAD = report("GPU-b", problems=["GPU 0 is left out: it is lost"])


async def bad(process: FakeProcess) -> None:
    """Answers for one GPU, and has a problem with another for as long as the library is open."""
    while True:
        await process.say(Asking(""), BAD)
        await trio.sleep(INTERVAL)


class TestLookingAgain:
    def test_another_process_sees_it_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then one that watches takes over at once: a GPU that was reset answers to whoever opens the library anew."""
        well = ends(0, Asking(""), report("GPU-a", "GPU-b"))
        heard, processes = watch(monkeypatch, bad, fine, trials=[well], seconds=10 * INTERVAL)
        assert len(processes.all) == 2
        assert processes.all[1].began == processes.trials[0].began
        assert len(processes.trials) == 1
        assert heard.unanswered_calls == []

    def test_a_question_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is trouble too."""
        failing = attrs.evolve(report("GPU-a"), gpus=(attrs.evolve(gpu("GPU-a"), error="Unknown Error"),))
        well = ends(0, Asking(""), report("GPU-a"))
        behaviours = [says(failing), fine]
        _, processes = watch(monkeypatch, *behaviours, trials=[well], seconds=3 * INTERVAL)
        assert len(processes.all) == 2

    @pytest.mark.parametrize(
        "trial",
        [
            pytest.param(ends(0, Asking(""), BAD), id="sees the same"),
            pytest.param(says(Asking("")), id="hangs"),
            pytest.param(ends(-6, Asking("")), id="crashes"),
            pytest.param(ends(0, Asking(""), NotReady("x")), id="finds no driver"),
        ],
    )
    def test_nothing_is_new(self, monkeypatch: pytest.MonkeyPatch, trial: Behaviour) -> None:
        """The process that watches goes on, so that no event is missed; it is looked again and again."""
        heard, processes = watch(monkeypatch, bad, trials=[trial], seconds=20 * (INTERVAL + DEADLINE))
        assert len(processes.all) == 1
        assert len(processes.trials) >= 19
        assert set(heard.heard) == {BAD}

    def test_suspects_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By these trials too: they have their own, which leave the others alone."""
        behaviours = [says(report("GPU-a", "GPU-b"), Asking("GPU-a")), bad]
        _, processes = watch(monkeypatch, *behaviours, seconds=DEADLINE + 3 * INTERVAL)
        assert {process.orders.suspects for process in processes.trials} == {("GPU-a",), ("GPU-b",)}


class TestEnd:
    def test_a_planned_one(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Another process at once, and nobody hears of it."""
        heard, processes = watch(monkeypatch, ends(0, report("GPU-a")), fine, seconds=1)
        assert processes.gaps() == [0.0]
        assert heard.heard == [report("GPU-a")] * 2
        assert caplog.messages == []

    @pytest.mark.parametrize("said", [[], [Asking("")], [Asking("GPU-a")]], ids=["mute", "driver", "GPU"])
    def test_success_that_was_not_planned(self, monkeypatch: pytest.MonkeyPatch, said: list[Message]) -> None:
        """A library that calls `exit` is one that takes its process down, whatever the code, and is not asked without
        end: the process ends by itself only when it asks nobody.
        """
        about = said[-1].uuid if said and isinstance(said[-1], Asking) else ""
        heard, processes = watch(monkeypatch, ends(0, *said), seconds=10)
        assert set(heard.unanswered_calls) == {(about, "the driver's library took its process down (exit code 0)")}
        assert all(gap >= FIRST_RESTART for gap in processes.gaps())

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            pytest.param(-signal.SIGABRT, "SIGABRT", id="abort"),
            pytest.param(-signal.SIGSEGV, "SIGSEGV", id="segmentation fault"),
            pytest.param(-signal.SIGKILL, "SIGKILL", id="killed, for want of memory say"),
            pytest.param(-200, "exit code -200", id="a signal without a name"),
            pytest.param(1, "exit code 1", id="a traceback"),
            pytest.param(127, "exit code 127", id="another code"),
        ],
    )
    def test_a_crash(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, words: str
    ) -> None:
        """Is told at once, with how it ended; another process follows."""
        heard, processes = watch(monkeypatch, ends(code, Asking("")), fine, seconds=0.5)
        reason = f"the driver's library took its process down ({words})"
        assert heard.heard[0] == ("", reason)
        assert heard.times[0] == processes.all[0].began
        assert len(processes.all) == 2
        assert caplog.messages == [f"{reason}; starting it again"]

    def test_delays_grow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As long as nothing answers, up to the longest."""
        _, processes = watch(monkeypatch, ends(1), seconds=60)
        gaps = processes.gaps()
        assert gaps == pytest.approx([min(2 * FIRST_RESTART * 2**count, LAST_RESTART) for count in range(len(gaps))])
        assert gaps[-1] == LAST_RESTART

    def test_delays_start_anew_after_an_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that works for a while is worth another try."""
        _, processes = watch(monkeypatch, *[ends(1)] * 5, ends(1, report("GPU-a")), ends(1), seconds=10)
        assert processes.gaps()[5] == pytest.approx(FIRST_RESTART)
        assert processes.gaps()[6] == pytest.approx(2 * FIRST_RESTART)

    def test_it_closes_the_pipe_and_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody can hear it any more: it is taken for one that crashed, and killed."""

        heard, processes = watch(monkeypatch, closes, fine, seconds=EXIT_TIMEOUT + 1)
        assert heard.times[0] == EXIT_TIMEOUT + processes.all[0].began
        assert len(heard.unanswered_calls) == 1
        assert len(processes.all) == 2

    def test_it_takes_its_time_to_exit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that unloads a library after it closed the pipe has not crashed."""

        async def slow(process: FakeProcess) -> None:
            await process.say(report("GPU-a"))
            await process.close()
            await trio.sleep(EXIT_TIMEOUT / 2)
            process.die(0)

        heard, _ = watch(monkeypatch, slow, fine, seconds=1)
        assert heard.unanswered_calls == []

    @pytest.mark.parametrize(
        "garbage",
        [b"Segmentation fault\n", b"\n", b"{}\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"],
        ids=["words", "empty line", "no message", "not UTF-8", "nested"],
    )
    def test_what_is_no_message(self, monkeypatch: pytest.MonkeyPatch, garbage: bytes) -> None:
        """Whoever says it has lost its mind, and is replaced like one that crashed. The daemon goes on."""
        heard, processes = watch(monkeypatch, says(Asking("GPU-a"), garbage), fine, seconds=2)
        assert [uuid for uuid, _ in heard.unanswered_calls] == ["GPU-a"]
        assert len(processes.all) == 2
        assert heard.heard[-1] == report("GPU-a")

    def test_it_can_t_be_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For want of processes or memory: tried again, with growing delays; the daemon goes on."""
        heard = Heard()
        tried: list[float] = []

        async def refuse(*arguments: object, **options: object) -> None:
            tried.append(trio.current_time())
            assert len(tried) < TOO_MANY
            raise BlockingIOError(11, "Resource temporarily unavailable")

        async def main() -> None:
            monkeypatch.setattr(trio.lowlevel, "open_process", refuse)
            with trio.move_on_after(60):
                await watch_driver(ORDERS, heard, DEADLINE)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert len(tried) > 5
        assert "Resource temporarily unavailable" in heard.unanswered_calls[0][1]


class TestStuck:
    def test_never_many_for_the_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If it hangs as a whole, one more would only be stuck too."""
        heard, processes = watch(monkeypatch, stuck(Asking("")), seconds=3600)
        assert 1 < len(processes.all) <= MOST_LEFT_BEHIND
        assert {uuid for uuid, _ in heard.unanswered_calls} == {""}

    def test_when_one_of_them_is_gone_there_is_another_try(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a word from outside, within seconds."""

        async def let_go(processes: Processes) -> None:
            await trio.sleep(3600)
            for process in processes.all:
                process.die(-9)

        behaviours = [stuck(Asking(""))] * MOST_LEFT_BEHIND + [fine]
        heard, processes = watch(monkeypatch, *behaviours, seconds=3600 + 2 * LAST_RESTART, meanwhile=let_go)
        assert heard.heard[-1] == report("GPU-a")
        assert len(processes.all) <= MOST_LEFT_BEHIND + 1

    def test_ordinary_ends_do_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However often."""
        behaviours = [ends(0, report("GPU-a")), ends(-6, report("GPU-a"))] * 20
        _, processes = watch(monkeypatch, *behaviours, fine, seconds=20)
        assert len(processes.all) == 41

    def test_shutdown_waits_for_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stuck or not."""

        async def main() -> float:
            processes = Processes(stuck(Asking("")))
            async with trio.open_nursery() as outside:
                monkeypatch.setattr(trio.lowlevel, "open_process", partial(processes.open, outside))
                with trio.move_on_after(1) as scope:
                    await watch_driver(ORDERS, Heard(), DEADLINE)
                assert scope.cancelled_caught
                outside.cancel_scope.cancel()
            return trio.current_time() - scope.deadline

        assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)) <= EXIT_TIMEOUT


class TestCancelled:
    """Wherever it is: the process is killed, and its pipe closed, as `watch` sees to in every test."""

    @pytest.mark.parametrize(
        ("behaviour", "seconds", "started"),
        [
            pytest.param(mute, 0.01, 1, id="before the first word"),
            pytest.param(fine, 0.5, 1, id="between polls"),
            pytest.param(says(Asking("GPU-a")), 1, 1, id="while it asks"),
            pytest.param(closes, EXIT_TIMEOUT / 2, 1, id="while it ends"),
            pytest.param(ends(1), 1.5 * FIRST_RESTART, 1, id="before it is started again"),
            pytest.param(stuck(Asking("")), 3600, MOST_LEFT_BEHIND, id="while too many are stuck"),
        ],
    )
    def test_anywhere(
        self, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, seconds: float, started: int
    ) -> None:
        """Nothing is left running."""
        _, processes = watch(monkeypatch, behaviour, seconds=seconds)
        assert len(processes.all) >= started

    def test_while_it_is_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is no process then, or it is killed."""

        async def never(*arguments: object, **options: object) -> None:
            await trio.sleep_forever()

        async def main() -> bool:
            monkeypatch.setattr(trio.lowlevel, "open_process", never)
            with trio.move_on_after(1) as scope:
                await watch_driver(ORDERS, Heard(), DEADLINE)
            return scope.cancelled_caught

        assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


#: The same as the behaviours above, for a Python without our package in it.
ASK = 'import time; print(\'{"message": "Asking", "uuid": "GPU-a"}\', flush=True);'


def ended(pid: str) -> bool:
    """Whether there is no such process any more, but for what its parent may still want to know."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


class TestReal:
    """Real processes, with a program of the test's in place of the probe."""

    @pytest.fixture
    def processes(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[trio.Process]]:
        """Those that were started."""
        started: list[trio.Process] = []
        open_process = trio.lowlevel.open_process

        async def keep(command: Sequence[str], **options: Any) -> trio.Process:  # noqa: ANN401
            process = await open_process([*self.command, *command[3:]] if self.command else command, **options)
            started.append(process)
            return process

        with monkeypatch.context() as patched:
            patched.setattr(trio.lowlevel, "open_process", keep)
            yield started

    orders = attrs.evolve(ORDERS, interval=0.2)
    command: Sequence[str] = ()

    def run(
        self,
        processes: list[trio.Process],
        code: str,
        until: Callable[[Heard], object] = lambda heard: heard.heard,
        deadline: float = TIMEOUT,
    ) -> Heard:
        """Watch a program until something was heard of it, cancel, and see that no process and no pipe is left."""
        self.command = [sys.executable, "-I", "-S", "-c", code] if code else ()
        heard = Heard()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_driver, self.orders, heard, deadline)
                with trio.fail_after(TIMEOUT):
                    await heard.wait(until)
                nursery.cancel_scope.cancel()
            for process in processes:
                with trio.fail_after(1):
                    await process.wait()
                assert process.stdout is not None
                with pytest.raises(trio.ClosedResourceError):
                    await process.stdout.receive_some(1)

        trio.run(main)
        return heard

    def test_a_crash(self, processes: list[trio.Process]) -> None:
        """With the signal's name."""
        heard = self.run(processes, f"{ASK} import os; os.abort()", lambda heard: len(heard.heard) >= 2)
        assert heard.heard[0] == ("GPU-a", "the driver's library took its process down (SIGABRT)")
        assert len(processes) >= 2

    def test_a_hang(self, processes: list[trio.Process], monkeypatch: pytest.MonkeyPatch) -> None:
        """However deaf it is to signals."""
        monkeypatch.setattr(probing, "START_TIMEOUT", 0.0)
        code = f"{ASK} import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        heard = self.run(processes, code, deadline=0.5)
        assert heard.heard == [("GPU-a", "the driver has not answered for 0.5 s")]
        assert processes[0].returncode == -signal.SIGKILL

    def test_an_uncaught_error(self, processes: list[trio.Process], capfd: pytest.CaptureFixture[str]) -> None:
        """Its traceback goes where the log goes."""
        heard = self.run(processes, "raise RuntimeError('broken')")
        assert heard.heard[0] == ("", "the driver's library took its process down (exit code 1)")
        assert "RuntimeError: broken" in capfd.readouterr().err

    def test_its_session_is_its_own(self, processes: list[trio.Process]) -> None:
        """A terminal's Ctrl-C is the daemon's alone to answer."""
        code = f'{ASK} print(\'{{"message": "NotReady", "reason": "x"}}\', flush=True); time.sleep(60)'
        sessions: list[int] = []

        def until(heard: Heard) -> bool:
            if heard.heard:
                sessions.append(os.getsid(processes[0].pid))
            return bool(heard.heard)

        self.run(processes, code, until)
        assert sessions == [processes[0].pid]

    def test_no_descriptor_is_left(self, processes: list[trio.Process], monkeypatch: pytest.MonkeyPatch) -> None:
        """After many processes and a cancellation."""
        monkeypatch.setattr(driver, "FIRST_RESTART", 0.001)
        monkeypatch.setattr(driver, "LAST_RESTART", 0.001)
        before = sorted(os.listdir("/proc/self/fd"))
        self.run(processes, f"{ASK} exit(1)", lambda heard: len(heard.heard) >= 10)
        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_the_real_one(self, node: Node, processes: list[trio.Process]) -> None:
        """The probe itself, asking the stub driver."""
        node.driver.gpus(2)
        self.orders = Orders(str(node.host), str(node.dev), str(node.sys), 0.2)
        heard = self.run(processes, "")
        (told,) = heard.heard
        assert isinstance(told, Report)
        assert [gpu.uuid for gpu in told.gpus] == [StubGpu(0).uuid, StubGpu(1).uuid]

    def test_the_real_one_ends_with_us(self, node: Node) -> None:
        """A daemon that is killed leaves no process that holds the driver."""
        orders = Orders(str(node.host), str(node.dev), str(node.sys), 60.0)
        code = (
            "import sys, trio; from sgpu import driver; from sgpu.report import decode_orders;"
            "orders = decode_orders(sys.argv[1]);"
            "report = lambda report: print('here', flush=True);"
            "monitor = type('M', (), {'report': staticmethod(report)});"
            "trio.run(driver.watch_driver, orders, monitor, 10.0)"
        )
        with subprocess.Popen([sys.executable, "-c", code, encode_orders(orders)], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"here\n"
            try:
                tasks = Path(f"/proc/{parent.pid}/task")
                (child,) = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
                assert not ended(child)
            finally:
                parent.kill()
        deadline = time.monotonic() + TIMEOUT
        while not ended(child):
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.02)
