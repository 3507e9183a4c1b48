"""The loops of the driver's process, with the stub library loaded into this one and its output caught."""

from __future__ import annotations

import io
import itertools
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from node import Node
from stub_driver import StubDriver, StubGpu

from sgpu import probe
from sgpu.nvml import Code, EventType
from sgpu.probe import Probe
from sgpu.report import (
    Asking,
    DriverEvent,
    EventKind,
    Failure,
    Message,
    NotReady,
    Orders,
    Report,
    decode,
    encode_orders,
)

#: Seconds between polls: short, and longer than a poll takes.
INTERVAL = 0.05
#: Seconds after which something that is due is taken not to come.
TIMEOUT = 10.0
ALL_EVENTS = sum(probe.EVENTS)


class Told(io.RawIOBase):
    """Standard output as the parent has it: messages, each as soon as it is flushed, until the parent hangs up."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: queue.Queue[tuple[float, Message]] = queue.Queue()
        self.hung_up = threading.Event()
        self._buffer = b""

    def write(self, data: Any) -> int:  # noqa: ANN401  # any buffer
        """Held until the flush, as a pipe's buffer would be."""
        if self.hung_up.is_set():
            raise BrokenPipeError
        self._buffer += data
        return len(data)

    def flush(self) -> None:
        """What was written is one message."""
        if self._buffer:
            line, self._buffer = self._buffer, b""
            self.messages.put((time.monotonic(), decode(line)))


@contextmanager
def standard_output(output: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a Probe made here have `output`: it takes descriptor 1 for itself, which is pytest's."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "dup", lambda descriptor: descriptor)
        patched.setattr(os, "dup2", lambda source, target: target)
        patched.setattr(os, "fdopen", lambda descriptor, mode: output)
        yield


class EndedError(AssertionError):
    """It ended, and will not say any more."""


class Running:
    """A probe at work in a thread. `error` and `ended` say how it ended."""

    def __init__(self, orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output = Told()
        self.all: list[Message] = []
        self.times: list[float] = []
        self.error: BaseException | None = None
        with standard_output(self.output, monkeypatch):
            self._probe = Probe(orders)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._probe.run()
        except BaseException as error:
            self.error = error

    def next(self) -> Message:
        """The next message, without those that a GPU or the driver is about to be asked, or that a function failed."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            try:
                when, message = self.output.messages.get(timeout=0.05)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise EndedError(self.error) from None
            self.all.append(message)
            self.times.append(when)
            if not isinstance(message, Asking | Failure):
                return message
        raise AssertionError(f"nothing came any more; the last were {self.all[-5:]}")

    def until(self, wanted: Callable[[Message], object]) -> Message:
        """The next message of that kind."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            message = self.next()
            if wanted(message):
                return message
        raise AssertionError(f"it did not come; the last were {self.all[-5:]}")

    def report(self) -> Report:
        """The next message, which is a report."""
        message = self.next()
        assert isinstance(message, Report), message
        return message

    def count(self, kind: type[Message], seconds: float) -> int:
        """How many of that kind come in that time."""
        end = time.monotonic() + seconds
        time.sleep(seconds)
        counted = 0
        while not self.output.messages.empty():
            when, message = self.output.messages.get()
            counted += isinstance(message, kind) and when <= end
        return counted

    def wait_end(self) -> None:
        """Until it returned or raised."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "it goes on"

    def stop(self) -> None:
        """As when the parent is gone."""
        self.output.hung_up.set()
        self.wait_end()


Start = Callable[..., Running]


@pytest.fixture
def start(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a probe on the node, and stops it at the end. Takes fields of Orders."""
    running: list[Running] = []
    monkeypatch.setattr(probe, "EVENT_WAIT", 0.02)  # so that each ends at once

    def start(**changes: Any) -> Running:  # noqa: ANN401  # as Orders has them
        orders = Orders(str(node.host), str(node.dev), str(node.sys), INTERVAL)
        running.append(Running(attrs.evolve(orders, **changes), monkeypatch))
        return running[-1]

    yield start
    monkeypatch.setattr(os, "getppid", lambda: -1)
    for each in running:
        each.stop()


def is_report(message: Message) -> bool:
    return isinstance(message, Report)


def not_ready(message: Message) -> str:
    """The reason."""
    assert isinstance(message, NotReady), message
    return message.reason


class TestReports:
    def test_first_of_all_a_report(self, node: Node, start: Start) -> None:
        """Of everything, at once, and then one each interval."""
        gpus = node.driver.gpus(2)
        running = start()
        begin = time.monotonic()
        reports = [running.report() for _ in range(4)]
        assert [gpu.uuid for gpu in reports[0].gpus] == [gpu.uuid for gpu in gpus]
        assert reports[1:] == [reports[0]] * 3
        assert 3 * INTERVAL <= time.monotonic() - begin < TIMEOUT

    def test_it_says_whom_it_asks(self, node: Node, start: Start) -> None:
        """First that it opens the library; then GPU by GPU; a report ends the asking."""
        first, second = node.driver.gpus(2)
        running = start()
        running.report()
        *asked, report = running.all
        assert isinstance(report, Report)
        uuids = [message.uuid for message in asked if isinstance(message, Asking)]
        assert uuids[0] == uuids[-1] == ""
        assert list(dict.fromkeys(uuids)) == ["", first.uuid, second.uuid]

    def test_a_change_is_in_the_next(self, node: Node, start: Start) -> None:
        """Without an event: polls are for what tells of none."""
        running = start()
        running.report()
        node.driver.change(StubGpu(), recovery_action=2)
        message = running.until(lambda message: isinstance(message, Report) and message.gpus[0].recovery_action)
        assert isinstance(message, Report)
        assert message.gpus[0].recovery_action == 2

    def test_the_library_stays_open(self, node: Node, start: Start) -> None:
        """While all is well: to open it anew is to miss events."""
        running = start()
        for _ in range(5):
            running.report()
        assert node.driver.calls("nvmlInit") == 1
        assert node.driver.calls("nvmlEventSetCreate") == 1


class TestFailures:
    def test_told(self, node: Node, start: Start) -> None:
        """Each function that answers what it should not, by its code, each time."""
        node.driver.fail("nvmlDeviceGetName", 999)
        running = start()
        for _ in range(3):
            running.next()
        failures = [message for message in running.all if isinstance(message, Failure)]
        assert set(failures) == {Failure("nvmlDeviceGetName", 999)}
        assert len(failures) == 3

    def test_all_is_well(self, node: Node, start: Start) -> None:
        """Then there is none, though a T4 does not know all questions."""
        running = start()
        for _ in range(3):
            running.next()
        assert not any(isinstance(message, Failure) for message in running.all)


class TestEvents:
    @pytest.mark.parametrize(
        ("bit", "kind"),
        [pytest.param(bit, kind, id=kind.name) for bit, kind in probe.EVENTS.items()],
    )
    def test_each_kind_is_passed_on(self, node: Node, start: Start, bit: int, kind: EventKind) -> None:
        """With its GPU, and its data."""
        _, second = node.driver.gpus(2)
        node.driver.change(second, event_types=ALL_EVENTS)
        running = start(interval=60.0)
        running.report()
        node.driver.event(second, bit, 7)
        assert running.next() == DriverEvent(second.uuid, kind, 7)

    def test_every_kind_has_its_bit(self) -> None:
        """None is left out."""
        assert set(probe.EVENTS.values()) == set(EventKind)

    def test_at_once_and_in_order(self, node: Node, start: Start) -> None:
        """Not with the next poll."""
        running = start(interval=60.0)
        running.report()
        begin = time.monotonic()
        for number in (79, 48, 13):
            node.driver.xid(StubGpu(), number)
        told = [running.next() for _ in range(3)]
        assert told == [DriverEvent(StubGpu().uuid, EventKind.XID, number) for number in (79, 48, 13)]
        assert running.times[-1] - begin < 1.0

    @pytest.mark.parametrize(
        ("bit", "data"),
        [
            pytest.param(EventType.XID_CRITICAL, 154, id="XID 154"),
            pytest.param(EventType.RECOVERY_ACTION, 0, id="recovery action"),
        ],
    )
    def test_a_changed_recovery_action_is_polled_at_once(self, node: Node, start: Start, bit: int, data: int) -> None:
        """The event does not carry the action."""
        gpu = node.driver.change(StubGpu(), event_types=ALL_EVENTS)
        running = start(interval=60.0)
        running.report()
        node.driver.change(gpu, recovery_action=2)
        node.driver.event(gpu, bit, data)
        running.next()
        assert running.report().gpus[0].recovery_action == 2

    @pytest.mark.parametrize(
        "function", ["nvmlEventSetCreate", "nvmlDeviceGetSupportedEventTypes", "nvmlDeviceRegisterEvents"]
    )
    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, 999])
    def test_no_events_are_no_fault(self, node: Node, start: Start, function: str, code: int) -> None:
        """Polls do without."""
        node.driver.fail(function, code)
        running = start()
        reports = [running.report() for _ in range(3)]
        assert reports[0].gpus[0].error == ""
        assert node.driver.calls("nvmlInit") == 1

    def test_one_gpu_without_events(self, node: Node, start: Start) -> None:
        """Does not take them from the others."""
        first, second = node.driver.gpus(2)
        node.driver.fail("nvmlDeviceRegisterEvents", Code.NOT_SUPPORTED, first)
        running = start(interval=60.0)
        running.report()
        node.driver.xid(second, 79)
        assert running.next() == DriverEvent(second.uuid, EventKind.XID, 79)

    def test_a_gpu_that_comes_later(self, node: Node, start: Start) -> None:
        """Is registered with the poll that finds it."""
        running = start(interval=0.2)
        running.report()
        _, second = node.driver.gpus(2)
        running.until(lambda message: isinstance(message, Report) and len(message.gpus) == 2)
        node.driver.xid(second, 79)
        assert running.until(lambda message: isinstance(message, DriverEvent)) == DriverEvent(
            second.uuid, EventKind.XID, 79
        )

    def test_lost_while_waiting(self, node: Node, start: Start) -> None:
        """The poll comes at once, and shows which."""
        first, second = node.driver.gpus(2)
        running = start(interval=60.0)
        running.report()
        node.driver.change(second, lost=True)
        node.driver.fail("nvmlEventSetWait", Code.GPU_IS_LOST)
        report = running.report()
        assert [gpu.uuid for gpu in report.gpus] == [first.uuid]
        assert len(report.problems) == 1

    @pytest.mark.parametrize("lost", [True, False], ids=["and one is", "and none is"])
    def test_waiting_always_says_lost(self, node: Node, start: Start, lost: bool) -> None:
        """As long as one of the node's GPUs is. Still there are few polls each interval, not one after the other."""
        _, second = node.driver.gpus(2)
        node.driver.change(second, lost=lost)
        node.driver.fail("nvmlEventSetWait", Code.GPU_IS_LOST)
        running = start(interval=0.2)
        running.report()
        assert 1 <= running.count(Report, seconds=1.0) <= 15

    def test_waiting_fails(self, node: Node, start: Start) -> None:
        """Polls do without here too: it is no sign that the driver is not there."""
        node.driver.fail("nvmlEventSetWait", 999)
        running = start()
        messages = [running.next() for _ in range(4)]
        assert [type(message) for message in messages] == [Report] * 4


class TestSuspects:
    def test_they_are_left_alone(self, node: Node, start: Start) -> None:
        """No call about them but for the UUID, and they are named, in each report."""
        first, second = node.driver.gpus(2)
        running = start(suspects=(second.uuid,))
        reports = [running.report() for _ in range(3)]
        assert [gpu.uuid for report in reports for gpu in report.gpus] == [first.uuid] * 3
        assert {report.unasked for report in reports} == {(second.uuid,)}
        calls = {call.split()[0] for call in node.driver.call_log() if call.endswith(second.uuid)}
        assert calls == {"nvmlDeviceGetUUID"}

    def test_by_their_place(self, node: Node, start: Start) -> None:
        """Not even that, where it is known which place they have; and after the first poll it is."""
        first, second = node.driver.gpus(2)
        running = start(suspects=(second.uuid,), known=(first.uuid, second.uuid))
        running.report()
        running.report()
        assert not any(call.endswith(second.uuid) for call in node.driver.call_log())
        assert node.driver.calls("nvmlDeviceGetHandleByIndex") == 2

    def test_all_are_suspect(self, node: Node, start: Start) -> None:
        """Then there is a report all the same: the driver is there."""
        running = start(suspects=tuple(gpu.uuid for gpu in node.driver.gpus(2)))
        assert running.report().gpus == ()


class TestOnce:
    def test_one_report(self, node: Node, start: Start) -> None:
        """And the end, without having heard of events."""
        running = start(once=True, interval=60.0)
        running.report()
        running.wait_end()
        assert running.error is None
        assert node.driver.calls("nvmlInit") == node.driver.calls("nvmlShutdown") == 1

    @pytest.mark.parametrize("what", ["nvmlInit", "nvmlDeviceGetCount"])
    def test_no_driver(self, node: Node, start: Start, what: str) -> None:
        """Is an answer too."""
        node.driver.fail(what, Code.DRIVER_NOT_LOADED)
        running = start(once=True, interval=60.0)
        assert "Driver Not Loaded" in not_ready(running.next())
        running.wait_end()
        assert running.error is None


class TestHangs:
    def test_events_come_all_the_while(self, node: Node, start: Start) -> None:
        """Of other GPUs, while a call about one of them does not return."""
        stuck, other = node.driver.gpus(2)
        running = start(interval=0.2)
        running.report()
        node.driver.hang("nvmlDeviceGetMemoryInfo", stuck)
        calls = node.driver.calls("nvmlDeviceGetMemoryInfo_v2", stuck)
        deadline = time.monotonic() + TIMEOUT
        while node.driver.calls("nvmlDeviceGetMemoryInfo_v2", stuck) == calls and time.monotonic() < deadline:
            time.sleep(0.01)
        node.driver.xid(other, 79)
        assert running.until(lambda message: isinstance(message, DriverEvent)) == DriverEvent(
            other.uuid, EventKind.XID, 79
        )
        node.driver.works("nvmlDeviceGetMemoryInfo", stuck)
        running.until(is_report)

    def test_waiting_for_events_hangs(self, node: Node, start: Start) -> None:
        """Polls go on."""
        node.driver.hang("nvmlEventSetWait")
        running = start()
        for _ in range(5):
            running.report()
        assert node.driver.calls("nvmlInit") == 1
        node.driver.works("nvmlEventSetWait")

    def test_the_library_is_to_be_closed_and_it_hangs(self, node: Node) -> None:
        """The process ends instead, without an error: another takes its place."""
        node.driver.hang("nvmlEventSetWait")
        orders = encode_orders(Orders(str(node.host), str(node.dev), str(node.sys), INTERVAL))
        code = "from sgpu import probe; probe.EVENT_TIMEOUT = 0.3; probe.main()"
        with subprocess.Popen([sys.executable, "-c", code, orders], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            while not isinstance(decode(process.stdout.readline()), Report):
                pass
            node.make_nodes("nvidia9")
            assert process.wait(TIMEOUT) == 0


class TestOpenedAnew:
    @pytest.mark.parametrize("trouble", ["lost", "failing"])
    def test_not_for_a_gpu_in_trouble(self, node: Node, start: Start, trouble: str) -> None:
        """Events of the others would be missed; whether it is well again for others, the parent finds out."""
        first, second = node.driver.gpus(2)
        if trouble == "lost":
            node.driver.change(second, lost=True)
        else:
            node.driver.fail("nvmlDeviceGetUtilizationRates", 999, second)
        running = start()
        for _ in range(4):
            report = running.report()
            assert [gpu.uuid for gpu in report.gpus if not gpu.error] == [first.uuid]
        assert node.driver.calls("nvmlInit") == 1

    @pytest.mark.parametrize("change", ["made", "removed"])
    def test_after_a_device_node(self, node: Node, start: Start, change: str) -> None:
        """NVML looks at them only when it is initialised."""
        running = start()
        running.report()
        if change == "made":
            node.make_nodes("nvidia8")
        else:
            (node.dev / "nvidia7").unlink()
        deadline = time.monotonic() + TIMEOUT
        while node.driver.calls("nvmlInit") < 2 and time.monotonic() < deadline:
            assert isinstance(running.next(), Report)
        assert node.driver.calls("nvmlInit") == 2

    def test_not_after_another_file(self, node: Node, start: Start) -> None:
        """/dev has much that comes and goes."""
        running = start()
        running.report()
        node.make_nodes("sda", "ttyUSB0")
        for _ in range(4):
            running.report()
        assert node.driver.calls("nvmlInit") == 1

    def test_after_a_gpu_that_the_kernel_lists(
        self, node: Node, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NVML counts only those that were there when it was initialised."""
        monkeypatch.setattr(probe, "KERNEL_GPUS", tmp_path)
        running = start()
        running.report()
        (tmp_path / "0000:3b:00.0").mkdir()
        deadline = time.monotonic() + TIMEOUT
        while node.driver.calls("nvmlInit") < 2 and time.monotonic() < deadline:
            assert isinstance(running.next(), Report)
        assert node.driver.calls("nvmlInit") == 2


class TestReplaced:
    def test_another_file_ends_it(self, node: Node, start: Start) -> None:
        """Only a new process loads what is at the path now: returned, without an error, within two polls."""
        running = start()
        running.report()
        StubDriver(node.host).gpus(1)
        running.wait_end()
        assert running.error is None

    def test_rewritten_in_place(self, node: Node, start: Start) -> None:
        """The same inode with another content is another file."""
        running = start()
        running.report()
        now = time.time_ns()
        os.utime(node.driver.path, ns=(now, now))
        running.wait_end()
        assert running.error is None

    def test_a_link_that_leads_elsewhere(self, node: Node, start: Start) -> None:
        """As installers switch versions."""
        elsewhere = StubDriver(node.host.parent / "elsewhere")
        elsewhere.gpus(1)
        real = node.driver.path.rename(node.driver.path.with_name("libnvidia-ml.so.550.1"))
        node.driver.path.symlink_to(real)
        running = start()
        running.report()
        new = node.driver.path.with_name("new")
        new.symlink_to(elsewhere.path)
        new.replace(node.driver.path)
        running.wait_end()
        assert running.error is None

    def test_removed(self, node: Node, start: Start) -> None:
        """The process must not come across it again, whatever is put there later."""
        running = start()
        running.report()
        node.driver.path.unlink()
        running.wait_end()
        assert running.error is None

    def test_replaced_while_it_could_not_start(self, node: Node, start: Start) -> None:
        """`Driver/library version mismatch` until the other half of the upgrade is there; then the new one answers."""
        node.driver.fail("nvmlInit", Code.LIB_RM_VERSION_MISMATCH)
        running = start()
        assert "version mismatch" in not_ready(running.next())
        new = StubDriver(node.host, without=["nvmlDeviceGetUtilizationRates"])
        new.gpus(1)
        try:
            report = running.until(is_report)
        except EndedError:
            assert running.error is None  # it leaves that to a new process
        else:
            assert isinstance(report, Report)
            assert report.gpus[0].utilisation is None


class TestNotReady:
    @contextmanager
    def missing(self, node: Node, what: str) -> Iterator[None]:
        """Without it inside the block, with it afterwards."""
        if what == "library":
            aside = node.driver.path.rename(node.driver.path.with_name("aside"))
            yield
            aside.rename(node.driver.path)
        elif what == "gpu":
            gpus = node.driver.state.gpus
            node.driver.set(gpus=())
            yield
            node.driver.set(gpus=gpus)
        elif what == "lost":
            gpu = node.driver.change(StubGpu(), lost=True)
            yield
            node.driver.change(gpu, lost=False)
        elif what.startswith("nvml"):
            node.driver.fail(what, Code.DRIVER_NOT_LOADED)
            yield
            node.driver.works(what)
        else:
            (node.dev / what).unlink()
            yield
            node.make_nodes(what)

    @pytest.mark.parametrize(
        ("what", "words"),
        [
            pytest.param("library", "; install the driver, or set -host-path to where its libraries are", id="library"),
            pytest.param("nvmlInit", "the NVIDIA driver is not ready: nvmlInit_v2: Driver Not Loaded", id="driver"),
            pytest.param("nvmlDeviceGetCount", "not ready: nvmlDeviceGetCount_v2: Driver Not Loaded", id="count"),
            pytest.param("nvidiactl", "nvidiactl not there yet", id="nvidiactl"),
            pytest.param("nvidia-uvm", "nvidia-uvm not there yet; `nvidia-modprobe", id="nvidia-uvm"),
            pytest.param("nvidia0", "no GPU to offer; GPU 0 is left out: ", id="the GPU's node"),
            pytest.param("gpu", "the NVIDIA driver has no GPU to offer", id="no GPU"),
            pytest.param(
                "lost", "no GPU to offer; GPU 0 is left out: nvmlDeviceGetHandleByIndex_v2: GPU is", id="lost"
            ),
        ],
    )
    def test_what_is_missing(self, node: Node, start: Start, what: str, words: str) -> None:
        """Is named, again and again; and once it is there, there is a report without a word from outside."""
        with self.missing(node, what):
            running = start()
            for _ in range(3):
                assert words in not_ready(running.next())
        report = running.until(is_report)
        assert isinstance(report, Report)
        assert [gpu.uuid for gpu in report.gpus] == [StubGpu().uuid]

    @pytest.mark.parametrize(("what", "interval"), [("library", 60.0), ("gpu", 60.0)])
    def test_delays_grow(self, node: Node, start: Start, what: str, interval: float) -> None:
        """So that a driver that is about to come is not waited for, and one that is not costs little."""
        with self.missing(node, what):
            running = start(interval=interval)
            told = []
            for _ in range(5):
                running.next()
                told.append(running.times[-1])
        gaps = [after - before for before, after in itertools.pairwise(told)]
        assert all(gap >= probe.FIRST_RETRY * 2**number for number, gap in enumerate(gaps)), gaps
        assert sum(gaps) < TIMEOUT

    @pytest.mark.parametrize(
        ("interval", "delays"),
        [
            pytest.param(60.0, [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 5.0], id="up to the longest"),
            pytest.param(0.1, [0.02, 0.04, 0.08, 0.1, 0.1], id="never longer than between polls"),
        ],
    )
    def test_delays(
        self, node: Node, start: Start, monkeypatch: pytest.MonkeyPatch, interval: float, delays: list[float]
    ) -> None:
        """From the first to the longest, and no longer."""
        slept: list[float] = []
        running: list[Running] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == len(delays):
                raise BrokenPipeError

        with self.missing(node, "library"):
            monkeypatch.setattr(probe.time, "sleep", sleep)  # type: ignore[attr-defined]
            running.append(start(interval=interval))
            running[0].wait_end()
        assert slept == pytest.approx(delays)

    def test_delays_start_anew_after_a_report(self, node: Node, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was there is likely to be back soon."""
        with self.missing(node, "gpu"):
            running = start(interval=0.2)
            for _ in range(5):
                running.next()
        running.until(is_report)
        with self.missing(node, "gpu"):
            running.until(lambda message: isinstance(message, NotReady))
            first = running.times[-1]
            running.next()
            assert running.times[-1] - first < 0.15

    def test_going_away(self, node: Node, start: Start) -> None:
        """A driver that was there and is not, is told as one that never was."""
        running = start()
        running.report()
        node.driver.fail("nvmlInit", Code.DRIVER_NOT_LOADED)
        node.driver.fail("nvmlDeviceGetCount", Code.DRIVER_NOT_LOADED)
        assert "Driver Not Loaded" in not_ready(running.until(lambda message: isinstance(message, NotReady)))


class TestEnd:
    @pytest.mark.parametrize("state", ["ready", "not ready"])
    def test_nobody_listens(self, node: Node, start: Start, state: str) -> None:
        """The next thing it has to say ends it."""
        if state == "not ready":
            node.driver.set(gpus=())
        running = start()
        running.next()
        running.stop()
        assert isinstance(running.error, BrokenPipeError)

    def test_the_parent_is_gone(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """Noticed between polls however far apart they are, and whoever else may hold the pipe."""
        running = start(interval=3600.0)
        running.report()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        begin = time.monotonic()
        running.wait_end()
        assert isinstance(running.error, BrokenPipeError)
        assert time.monotonic() - begin < 2 * probe.LONGEST_WAIT

    def test_without_events_too(self, node: Node, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """It sleeps no longer than it would wait."""
        node.driver.fail("nvmlEventSetCreate", Code.NOT_SUPPORTED)
        running = start(interval=3600.0)
        running.report()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        running.wait_end()
        assert isinstance(running.error, BrokenPipeError)

    def test_main_ends_quietly(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        """With success, and without flushing what nobody reads."""

        class Ended(Exception):
            pass

        def exit_now(code: int) -> None:
            raise Ended(code)

        def run(self: Probe) -> None:
            raise BrokenPipeError

        monkeypatch.setattr(os, "_exit", exit_now)
        monkeypatch.setattr(Probe, "run", run)
        monkeypatch.setattr(sys, "argv", ["probe", encode_orders(Orders("/h", "/d", "/s", 1.0))])
        with standard_output(Told(), monkeypatch), pytest.raises(Ended, match=r"^0$"):
            probe.main()

    def test_main_follows_its_orders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those on the command line."""
        ran: list[Orders] = []
        monkeypatch.setattr(Probe, "run", lambda self: ran.append(self._orders))
        orders = Orders("/h", "/d", "/s", 1.0, ("GPU-a",), ("GPU-b", "GPU-a"), once=True)
        monkeypatch.setattr(sys, "argv", ["probe", encode_orders(orders)])
        with standard_output(Told(), monkeypatch):
            probe.main()
        assert ran == [orders]

    def test_what_the_library_prints(self) -> None:
        """Goes where the log goes, and does not come between the messages."""
        code = (
            "import os; from sgpu import probe; from sgpu.report import Asking;"
            "probe.Probe.run = lambda self: (os.write(1, b'noise'), print('noise'), self._tell(Asking('GPU-a')));"
            "probe.main()"
        )
        orders = encode_orders(Orders("/h", "/d", "/s", 1.0))
        ran = subprocess.run([sys.executable, "-c", code, orders], capture_output=True, check=True)
        assert decode(ran.stdout) == Asking("GPU-a")
        assert ran.stderr.count(b"noise") == 2
