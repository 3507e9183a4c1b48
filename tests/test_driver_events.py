"""NVML's events and the thread that emits them, with the stub library loaded into this process."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import pytest
from node import Node
from stub_driver import StubGpu, mig_gpu

from sgpu.driver import events
from sgpu.driver.events import EVENTS, EventListener, NoEvents, event_listener
from sgpu.driver.messages import DriverEvent, EventKind, Message, Report, WorkerConfig, decode, encode_config
from sgpu.driver.nvml import Code, Event, EventSet, EventType, Library, open_library

#: Seconds after which something that is due is taken not to come.
TIMEOUT = 30.0
ALL_EVENTS = sum(EVENTS)


@attrs.frozen
class Listening:
    """A listener, its library, and what comes of it."""

    library: Library
    listener: EventListener | NoEvents
    emitted: queue.Queue[Message]
    wake: threading.Event

    def register(self) -> None:
        """Register every GPU, as each poll does."""
        for handle in map(self.library.handle, range(self.library.count())):
            self.listener.register(self.library.uuid(handle), handle)

    def next(self) -> Message:
        return self.emitted.get(timeout=TIMEOUT)


@contextmanager
def listening(node: Node, emit: Callable[[Message], None] | None = None, *, listen: bool = True) -> Iterator[Listening]:
    """Listen to all GPUs of the node's driver."""
    emitted, wake = queue.Queue[Message](), threading.Event()
    wake.set()  # as an earlier listener may have left it
    with open_library(node.host) as library, event_listener(library, emit or emitted.put, wake) as listener:
        made = Listening(library, listener, emitted, wake)
        made.register()
        if listen:
            listener.listen()
        yield made


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each wait for events end at once, and with it the tests."""
    monkeypatch.setattr(events, "EVENT_WAIT", 0.02)
    monkeypatch.setattr(events, "EVENT_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the wait for events did not end"))


ASK_FOR_POLL = (EventKind.RECOVERY_ACTION, EventKind.MIG_CONFIG_CHANGE)


@pytest.mark.parametrize(
    ("bit", "data", "message", "wakes"),
    [
        pytest.param(bit, 7, DriverEvent(StubGpu(1).uuid, kind, 7), kind in ASK_FOR_POLL, id=kind.name)
        for bit, kind in EVENTS.items()
    ]
    + [pytest.param(EventType.XID_CRITICAL, 154, DriverEvent(StubGpu(1).uuid, EventKind.XID, 154), True, id="XID 154")],
)
def test_event(node: Node, bit: int, data: int, message: DriverEvent, wakes: bool) -> None:
    """Emit an event of each kind with its GPU and data, and ask for a poll if another state has to be seen."""
    _, gpu = node.driver.gpus(2)
    node.driver.change(gpu, event_types=ALL_EVENTS)
    with listening(node) as made:
        assert not made.wake.is_set()
        node.driver.event(gpu, bit, data)
        node.driver.xid(gpu, 13)  # once it is emitted, nothing is left to do about the one before
        assert [made.next(), made.next()] == [message, DriverEvent(gpu.uuid, EventKind.XID, 13)]
        assert made.wake.is_set() == wakes


def test_kinds() -> None:
    """Listen to events of all kinds."""
    assert set(EVENTS.values()) == set(EventKind)


def test_unknown_event(node: Node) -> None:
    """Ignore events of other types."""

    class Others(EventSet):
        types = iter([1 << 40, EventType.XID_CRITICAL])

        def wait(self, milliseconds: int) -> Event | None:
            event_type = next(self.types, None)
            return Event("GPU-a", event_type, 79) if event_type else super().wait(milliseconds)

    emitted = queue.Queue[Message]()
    with open_library(node.host) as library, library.event_set() as event_set:
        listener = EventListener(Others(library, event_set.pointer), emitted.put, threading.Event())
        listener.listen()
        assert emitted.get(timeout=TIMEOUT) == DriverEvent("GPU-a", EventKind.XID, 79)
        listener.end()


def test_events_before_listening(node: Node) -> None:
    """Emit first, and in order, what happened since the registration; register and listen only once."""
    with listening(node, listen=False) as made:
        for number in (79, 48, 94):
            node.driver.xid(StubGpu(), number)
        made.register()
        made.listener.listen()
        made.listener.listen()
        messages = [made.next() for _ in range(3)]
        assert messages == [DriverEvent(StubGpu().uuid, EventKind.XID, number) for number in (79, 48, 94)]
    assert node.driver.calls("nvmlDeviceRegisterEvents") == 1


@pytest.mark.parametrize("function", ["nvmlDeviceGetSupportedEventTypes", "nvmlDeviceRegisterEvents"])
@pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, 999])
def test_gpu_without_events(node: Node, function: str, code: int) -> None:
    """Listen to the others if a GPU can't be registered, and to it as soon as it can."""
    first, second = node.driver.gpus(2)
    node.driver.fail(function, code, first)
    with listening(node) as made:
        node.driver.xid(second, 79)
        assert made.next() == DriverEvent(second.uuid, EventKind.XID, 79)
        supports = code != Code.NOT_SUPPORTED  # any other error says nothing
        assert [made.listener.supports(gpu.uuid) for gpu in (first, second)] == [supports, True]
        node.driver.works(function, first)
        made.register()
        assert made.listener.supports(first.uuid)
        node.driver.xid(first, 79)
        assert made.next() == DriverEvent(first.uuid, EventKind.XID, 79)


@pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, 999])
def test_driver_without_events(node: Node, code: int) -> None:
    """Do without where the driver knows no events: that is no failure."""
    node.driver.fail("nvmlEventSetCreate", code)
    with listening(node) as made:
        assert isinstance(made.listener, NoEvents)
        assert made.listener.supports(StubGpu().uuid) is (code == 999)
        assert not made.listener.failed
        assert not made.wake.is_set()


def test_wait_fails(node: Node) -> None:
    """Ask for a poll when the driver can't wait for events any more."""
    with listening(node) as made:
        assert not made.listener.failed
        node.driver.fail("nvmlEventSetWait", Code.GPU_IS_LOST)
        assert made.wake.wait(TIMEOUT)
        assert made.listener.failed


def test_no_thread(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without, with a problem that names the limit, where the kernel refuses a thread; try again later."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with listening(node, listen=False) as made:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            made.listener.listen()
        assert "pids.max" in made.listener.problem
        assert not made.listener.failed
        made.listener.listen()
        assert made.listener.problem == ""


def test_parent_gone(node: Node) -> None:
    """Stop listening, and wake the worker, when nobody reads the events."""

    def emit(message: Message) -> None:
        raise BrokenPipeError

    with listening(node, emit) as made:
        node.driver.xid(StubGpu(), 79)
        assert made.wake.wait(TIMEOUT)
        assert made.listener.failed


def test_wait_hangs(node: Node) -> None:
    """Go on polling while the wait for events hangs; when the library has to be closed, end the process."""
    node.driver.hang("nvmlEventSetWait")
    config = encode_config(WorkerConfig(str(node.host), str(node.dev), str(node.sys), 0.1))
    command = [sys.executable, "-m", "sgpu.driver", config]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        reports = 0
        while reports < 3:
            reports += isinstance(decode(process.stdout.readline()), Report)
        node.make_nodes("nvidia9")  # so that the library is opened again
        assert process.wait(TIMEOUT) == 0


def test_instance(node: Node) -> None:
    """Emit the ids of the MIG instance that an event is about."""
    gpu = mig_gpu()
    node.driver.set(gpus=(gpu,))
    instance = node.driver.create(gpu, "1g.5gb", compute_instance=2)
    with listening(node) as made:
        node.driver.xid(gpu, 94, instance)
        assert made.next() == DriverEvent(gpu.uuid, EventKind.XID, 94, gpu_instance=1, compute_instance=2)
