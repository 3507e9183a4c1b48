"""The worker's loop, with the stub library loaded into this process and the messages caught."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from node import Node
from stub_driver import StubDriver, StubGpu
from watching import wait_until

from sgpu.driver import events, uvm, worker
from sgpu.driver.calls import Calls, Part, create
from sgpu.driver.messages import (
    DriverEvent,
    EventKind,
    Failure,
    Message,
    NotReady,
    Report,
    WorkerConfig,
    decode,
    encode_config,
)
from sgpu.driver.nvml import Code
from sgpu.driver.worker import Worker

#: Seconds between polls: short, and longer than a poll takes.
INTERVAL = 0.05
#: Seconds between polls that no test waits for.
SELDOM = 3600.0
#: Seconds after which something that is due is taken not to come.
TIMEOUT = 30.0
XID = DriverEvent(StubGpu().uuid, EventKind.XID, 79)


class Output:
    """Standard output as the parent has it: messages, each when it is flushed, until the parent hangs up."""

    def __init__(self) -> None:
        self.messages = queue.Queue[Message]()
        self.hung_up = threading.Event()
        self._buffer = b""

    def write(self, data: bytes) -> None:
        if self.hung_up.is_set():
            raise BrokenPipeError
        self._buffer += data

    def flush(self) -> None:
        line, self._buffer = self._buffer, b""
        self.messages.put(decode(line))


@attrs.frozen
class Recorded(Calls):
    """Keeps what is written down of polls: the UUID, None for the end."""

    all: list[str | None] = attrs.field(factory=list)

    def begin(self, part: Part, uuid: str) -> None:
        super().begin(part, uuid)
        self.all.append(uuid)

    def end(self, part: Part) -> None:
        super().end(part)
        self.all.append(None)


class Running:
    """A worker in a thread. `all` are the messages so far."""

    def __init__(self, config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output = Output()
        self.all: list[Message] = []
        self._error: BaseException | None = None
        with monkeypatch.context() as patched:  # a worker takes descriptor 1 for itself, which is pytest's
            patched.setattr(os, "dup", lambda descriptor: descriptor)
            patched.setattr(os, "dup2", lambda source, target: target)
            patched.setattr(os, "fdopen", lambda descriptor, mode: self.output)
            self.calls = Recorded(create().descriptor)
            self._worker = Worker(config, self.calls)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._worker.run()
        except BaseException as error:
            self._error = error

    def next(self, timeout: float = TIMEOUT) -> Report | NotReady | DriverEvent:
        """The next message, without those about single calls. Raises queue.Empty."""
        while True:
            self.all.append(self.output.messages.get(timeout=timeout))
            if isinstance(message := self.all[-1], Report | NotReady | DriverEvent):
                return message

    def report(self) -> Report:
        """The next message, which is a report."""
        message = self.next()
        assert isinstance(message, Report), message
        return message

    def wait_for(self, condition: Callable[[Message], object]) -> None:
        """Wait for such a message, whatever comes before it."""
        deadline = time.monotonic() + TIMEOUT
        while not condition(self.next()):
            assert time.monotonic() < deadline, self.all[-5:]

    def hang_up(self) -> None:
        """Read no more messages: it ends with the next one, which is made to come."""
        self.output.hung_up.set()
        self._worker._events_reopened_at = float("-inf")
        self._worker._wake.set()

    def wait_end(self) -> BaseException | None:
        """Wait until it returned or raised; returns the error."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "it goes on"
        return self._error


Start = Callable[..., Running]


@pytest.fixture
def start(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a worker on the node, and stops it at the end. Takes fields of WorkerConfig."""
    running: list[Running] = []
    monkeypatch.setattr(events, "EVENT_WAIT", 0.02)  # so that each ends at once
    monkeypatch.setattr(events, "EVENT_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the wait for events did not end"))

    def start(**changes: Any) -> Running:  # noqa: ANN401  # as WorkerConfig has them
        config = WorkerConfig(str(node.host), str(node.dev), str(node.sys), INTERVAL)
        running.append(Running(attrs.evolve(config, **changes), monkeypatch))
        return running[-1]

    yield start
    for each in running:
        each.hang_up()
        assert isinstance(each.wait_end(), BrokenPipeError | None)


class TestPolls:
    def test_reports(self, node: Node, start: Start) -> None:
        """Report all GPUs at once and then each interval, with what changed, and keep the library open."""
        first, second = node.driver.gpus(2)
        began = time.monotonic()
        running = start()
        reports = [running.report() for _ in range(3)]
        assert time.monotonic() - began >= 2 * INTERVAL
        assert [gpu.uuid for gpu in reports[0].gpus] == [first.uuid, second.uuid]
        assert reports == reports[:1] * 3
        node.driver.change(first, recovery_action=2)
        running.wait_for(lambda message: isinstance(message, Report) and message.gpus[0].recovery_action == 2)
        assert node.driver.calls("nvmlInit") == node.driver.calls("nvmlEventSetCreate") == 1

    def test_calls(self, node: Node, start: Start) -> None:
        """Say in each poll, and only once in a row, whether calls are about the driver or about which GPU."""
        first, second = node.driver.gpus(2)
        running = start()
        running.report()
        running.report()
        calls = running.calls.all
        second_poll = calls.index(None) + 1
        assert calls[0] == ""
        assert calls[second_poll : calls.index(None, second_poll)] == ["", first.uuid, second.uuid, ""]

    def test_failures(self, node: Node, start: Start) -> None:
        """Emit each call that fails, each time."""
        node.driver.fail("nvmlDeviceGetName", 999)
        running = start()
        running.next()
        running.next()
        failures = [message for message in running.all if isinstance(message, Failure)]
        assert failures == [Failure("nvmlDeviceGetName", 999)] * 2


class TestEvents:
    def test_at_once(self, node: Node, start: Start) -> None:
        """Emit an event before the next poll; poll at once, and once, if it says that the recovery action changed."""
        running = start(interval=SELDOM)
        running.report()
        gpu = node.driver.change(StubGpu(), recovery_action=2)
        node.driver.xid(gpu, 79)
        node.driver.xid(gpu, 154)
        assert running.next() == XID
        assert running.next() == DriverEvent(gpu.uuid, EventKind.XID, 154)
        assert running.report().gpus[0].recovery_action == 2
        with pytest.raises(queue.Empty):
            running.next(timeout=0.3)
        assert node.driver.calls("nvmlInit") == 1

    def test_during_a_call(self, node: Node, start: Start) -> None:
        """Emit events of other GPUs while a call about one of them does not return."""
        stuck, other = node.driver.gpus(2)
        running = start(known=(stuck.uuid, other.uuid))
        running.report()
        node.driver.hang("nvmlDeviceGetMemoryInfo", stuck)
        while True:  # until nothing more comes than the call that hangs
            try:
                running.next(timeout=10 * INTERVAL)
            except queue.Empty:
                break
        call = running.calls.current(Part.POLL)
        assert call
        assert call.uuid == stuck.uuid
        node.driver.xid(other, 79)
        assert running.next() == DriverEvent(other.uuid, EventKind.XID, 79)
        node.driver.works("nvmlDeviceGetMemoryInfo", stuck)
        running.report()

    def test_wait_fails(self, node: Node, start: Start) -> None:
        """Poll at once when the wait for events fails, as it does for a lost GPU; not again before the interval."""
        first, second = node.driver.gpus(2)
        running = start(interval=SELDOM)
        running.report()
        node.driver.change(second, lost=True)
        node.driver.fail("nvmlEventSetWait", Code.GPU_IS_LOST)
        assert [gpu.uuid for gpu in running.report().gpus] == [first.uuid]
        with pytest.raises(queue.Empty):
            running.next(timeout=0.5)

    def test_wait_works_again(self, node: Node, start: Start) -> None:
        """Go on polling while the wait for events fails, and listen again once it works."""
        node.driver.fail("nvmlEventSetWait", 999)
        running = start()
        for _ in range(4):
            running.report()
        node.driver.works("nvmlEventSetWait")
        calls = node.driver.calls("nvmlEventSetWait")
        running.wait_for(lambda message: node.driver.calls("nvmlEventSetWait") >= calls + 2)
        node.driver.xid(StubGpu(), 79)
        running.wait_for(lambda message: message == XID)


class TestConfig:
    def test_suspects(self, node: Node, start: Start) -> None:
        """Make no call about a suspect but for the UUID, and name it in each report."""
        first, second = node.driver.gpus(2)
        running = start(suspects=(second.uuid,))
        reports = [running.report() for _ in range(3)]
        assert [gpu.uuid for report in reports for gpu in report.gpus] == [first.uuid] * 3
        assert {report.skipped for report in reports} == {(second.uuid,)}
        calls = [call.split()[0] for call in node.driver.call_log() if call.endswith(second.uuid)]
        assert calls == ["nvmlDeviceGetUUID"]  # from the first poll on, its index is known

    def test_all_are_suspects(self, node: Node, start: Start) -> None:
        """Report a driver whose GPUs are all suspects."""
        assert start(suspects=tuple(gpu.uuid for gpu in node.driver.gpus(2))).report().gpus == ()

    @pytest.mark.parametrize("failing", ["", "nvmlInit", "nvmlDeviceGetCount"])
    def test_once(self, node: Node, start: Start, failing: str) -> None:
        """End after one answer, be it that there is no driver."""
        if failing:
            node.driver.fail(failing, Code.DRIVER_NOT_LOADED)
        running = start(once=True, interval=SELDOM)
        assert isinstance(running.next(), NotReady if failing else Report)
        assert running.wait_end() is None

    @pytest.mark.parametrize("look_only", [True, False])
    def test_look_only(self, node: Node, start: Start, monkeypatch: pytest.MonkeyPatch, look_only: bool) -> None:
        """Have the node nvidia-uvm made where it is missing, unless it is only to look."""
        monkeypatch.setattr(uvm, "DEV_DIRECTORY", node.dev)
        (node.dev / "nvidia-uvm").unlink()
        program = node.host / "bin" / uvm.NAME
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ntouch {node.dev}/nvidia-uvm\n")
        program.chmod(0o755)
        assert isinstance(start(look_only=look_only, once=True).next(), NotReady if look_only else Report)


class TestReopened:
    @pytest.mark.parametrize(
        ("change", "reopened"),
        [
            pytest.param(lambda node: node.make_nodes("nvidia8"), True, id="device node made"),
            pytest.param(lambda node: (node.dev / "nvidia7").unlink(), True, id="device node removed"),
            pytest.param(lambda node: (node.sys / "0000:3b:00.0").mkdir(), True, id="listed by the kernel"),
            pytest.param(lambda node: node.make_nodes("sda", "ttyUSB0"), False, id="another device node"),
            pytest.param(lambda node: node.driver.change(StubGpu(1), lost=True), False, id="lost"),
            pytest.param(
                lambda node: node.driver.fail("nvmlDeviceGetRemappedRows", 999, StubGpu(1)), False, id="failing"
            ),
        ],
    )
    def test_library(
        self,
        node: Node,
        start: Start,
        monkeypatch: pytest.MonkeyPatch,
        change: Callable[[Node], object],
        reopened: bool,
    ) -> None:
        """Reopen the library after what it looks at only then; else don't, because that misses events."""
        monkeypatch.setattr(worker, "KERNEL_GPUS", node.sys)
        node.driver.gpus(2)
        running = start()
        running.report()
        change(node)
        if reopened:
            running.wait_for(lambda message: node.driver.calls("nvmlInit") == 2)
        for _ in range(4):
            running.report()
        assert node.driver.calls("nvmlInit") == 1 + reopened


def replace(node: Node) -> None:
    StubDriver(node.host).gpus(1)


def rewrite(node: Node) -> None:
    """The same inode with another content."""
    now = time.time_ns()
    os.utime(node.driver.path, ns=(now, now))


def relink(node: Node) -> None:
    """As installers switch versions."""
    elsewhere = StubDriver(node.host.parent / "elsewhere")
    elsewhere.gpus(1)
    link = node.driver.path.with_name("new")
    link.symlink_to(elsewhere.path)
    link.replace(node.driver.path)


class TestReplaced:
    @pytest.mark.parametrize(
        ("change", "missing"),
        [
            *((replace, ""), (rewrite, ""), (relink, ""), (lambda node: node.driver.path.unlink(), "")),
            *((rewrite, "nvmlInit"), (rewrite, "GPU")),
        ],
    )
    def test_library(self, node: Node, start: Start, change: Callable[[Node], object], missing: str) -> None:
        """End when the library that was loaded is another, or gone: only a new process loads what is there now."""
        real = node.driver.path.rename(node.driver.path.with_name("libnvidia-ml.so.550.1"))
        node.driver.path.symlink_to(real)
        if missing == "GPU":
            node.driver.set(gpus=())
        elif missing:
            node.driver.fail(missing, Code.LIB_RM_VERSION_MISMATCH)
        running = start()
        assert isinstance(running.next(), NotReady if missing else Report)
        change(node)
        assert running.wait_end() is None


class TestNotReady:
    @contextmanager
    def missing(self, node: Node, what: str, code: int) -> Iterator[None]:
        """Without it, or with a call that fails, inside the block."""
        state = node.driver.state
        path = node.driver.path if what == "library" else node.dev / what
        if code:
            node.driver.fail(what, code)
        elif what == "GPU":
            node.driver.set(gpus=())
        elif what == "lost":
            node.driver.change(StubGpu(), lost=True)
        else:
            path.rename(path.with_name("aside"))
        yield
        if path.with_name("aside").exists():
            path.with_name("aside").rename(path)
        node.driver.set(gpus=state.gpus, calls=state.calls)

    @pytest.mark.parametrize(
        ("what", "code", "fact", "gone"),
        [
            pytest.param("library", 0, "-host-path", False, id="library"),
            pytest.param("nvmlInit", Code.DRIVER_NOT_LOADED, "nvmlInit_v2", True, id="driver"),
            pytest.param("nvmlInit", Code.LIB_RM_VERSION_MISMATCH, "nvmlInit_v2", True, id="driver of another version"),
            pytest.param("nvmlInit", 999, "nvmlInit_v2", False, id="unknown error"),
            pytest.param("nvmlDeviceGetCount", Code.DRIVER_NOT_LOADED, "nvmlDeviceGetCount_v2", True, id="count"),
            pytest.param("nvidiactl", 0, "nvidiactl", False, id="nvidiactl"),
            pytest.param("nvidia-uvm", 0, "nvidia-uvm", False, id="nvidia-uvm"),
            pytest.param("nvidia0", 0, "nvidia0", True, id="device node of the GPU"),
            pytest.param("GPU", 0, "", True, id="no GPU"),
            pytest.param("lost", 0, "nvmlDeviceGetHandleByIndex_v2", True, id="GPU is lost"),
        ],
    )
    def test_missing(self, node: Node, start: Start, what: str, code: int, fact: str, gone: bool) -> None:
        """Say again and again what is missing and whether a reset follows; report once it is there."""
        with self.missing(node, what, code):
            running = start()
            for _ in range(3):
                message = running.next()
                assert isinstance(message, NotReady)
                assert fact in message.reason
                assert message.gone == gone
        running.wait_for(lambda message: isinstance(message, Report) and message.gpus[0].uuid == StubGpu().uuid)

    @pytest.mark.parametrize(
        ("interval", "delays"),
        [
            pytest.param(60.0, [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 5.0], id="up to the longest"),
            pytest.param(0.1, [0.02, 0.04, 0.08, 0.1, 0.1], id="up to the interval"),
        ],
    )
    @pytest.mark.parametrize("what", ["library", "GPU", "nvmlInit"])
    def test_delays(
        self, node: Node, start: Start, monkeypatch: pytest.MonkeyPatch, what: str, interval: float, delays: list[float]
    ) -> None:
        """Wait longer after each attempt, up to a limit."""
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == len(delays):
                raise BrokenPipeError

        monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        with self.missing(node, what, Code.DRIVER_NOT_LOADED if what == "nvmlInit" else 0):
            start(interval=interval).wait_end()
        assert slept == pytest.approx(delays)

    def test_delays_start_anew(self, node: Node, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wait briefly again after a report."""
        gpus = node.driver.state.gpus
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                node.driver.set(gpus=gpus)
            elif len(slept) == 5:
                raise BrokenPipeError

        monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        node.driver.set(gpus=())
        running = start()
        running.wait_for(lambda message: isinstance(message, Report))
        node.driver.set(gpus=())
        running.wait_end()
        assert slept == [0.02, 0.04, 0.05, 0.02, 0.04]


def popen(node: Node, interval: float) -> subprocess.Popen[bytes]:
    """Start it as its parent does."""
    config = encode_config(WorkerConfig(str(node.host), str(node.dev), str(node.sys), interval))
    command = [sys.executable, "-m", "sgpu.driver", config]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class TestEnd:
    @pytest.mark.parametrize("hanging", ["", "nvmlDeviceGetName"], ids=["between polls", "in a call"])
    def test_parent_gone(self, node: Node, hanging: str) -> None:
        """End quietly when the other end of the input is closed, however far apart polls are, and in any call."""
        if hanging:
            node.driver.hang(hanging)
        with popen(node, SELDOM) as process:
            assert process.stdin
            assert process.stderr
            wait_until(lambda: node.driver.calls(hanging or "nvmlEventSetWait"), "it is called")
            process.stdin.close()
            assert (process.wait(TIMEOUT), process.stderr.read()) == (0, b"")

    @pytest.mark.parametrize("ready", [True, False], ids=["ready", "not ready"])
    def test_nobody_reads(self, node: Node, ready: bool) -> None:
        """Follow the configuration on the command line, and exit quietly with the next message that nobody reads."""
        node.driver.gpus(ready)
        with popen(node, INTERVAL) as process:
            assert process.stdout
            assert process.stderr
            while not isinstance(decode(process.stdout.readline()), Report if ready else NotReady):
                pass
            process.stdout.close()
            assert (process.wait(TIMEOUT), process.stderr.read()) == (0, b"")

    def test_output(self, node: Node) -> None:
        """Keep what the library prints out of the messages."""
        code = (
            "import os; from sgpu.driver import worker; open_library = worker.nvml.open_library;"
            "worker.nvml.open_library = lambda *a, **k:"
            " (os.write(1, b'noise'), print('noise'), open_library(*a, **k))[-1];"
            "worker.main()"
        )
        config = encode_config(WorkerConfig(str(node.host), str(node.dev), str(node.sys), 1.0, once=True))
        ran = subprocess.run([sys.executable, "-c", code, config], capture_output=True, check=True, timeout=TIMEOUT)
        assert isinstance([decode(line) for line in ran.stdout.splitlines()][-1], Report)
        assert ran.stderr.count(b"noise") == 2
