"""NVML's events, from a thread of their own: they arrive also while a call about some GPU does not return.

Runs in the driver's process. Knows neither trio nor what becomes of the events.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from sgpu.driver.messages import DriverEvent, EventKind, Message
from sgpu.driver.nvml import NO_ANSWER, EventSet, EventType, Handle, Library, NvmlError
from sgpu.lib.limits import PROCESSES

#: Longest wait for events, in seconds, as in NVIDIA's own plugin. With 0.5 it was the most frequent of all wake-ups.
EVENT_WAIT: Final = 5.0
#: Seconds that the wait gets to end when the library is to be closed, which is seldom: another process costs less than
#: to wait often.
EVENT_TIMEOUT: Final = 0.1
#: The events that may mean that a GPU can't be used, or that its MIG instances are others.
EVENTS: Final = {
    EventType.XID_CRITICAL: EventKind.XID,
    EventType.DOUBLE_BIT_ECC: EventKind.DOUBLE_BIT_ECC,
    EventType.NON_FATAL_POISON: EventKind.NON_FATAL_POISON,
    EventType.FATAL_POISON: EventKind.FATAL_POISON,
    EventType.GPU_UNAVAILABLE: EventKind.GPU_UNAVAILABLE,
    EventType.RECOVERY_ACTION: EventKind.RECOVERY_ACTION,
    EventType.MIG_CONFIG_CHANGE: EventKind.MIG_CONFIG_CHANGE,
}


class EventListener(threading.Thread):
    """Emits events as they come. `wake` is set when an event asks for a poll, and when listening has failed.

    `problem`: why nothing is listened to; empty if it is.
    """

    def __init__(self, events: EventSet, emit: Callable[[Message], None], wake: threading.Event) -> None:
        super().__init__(name="events", daemon=True)
        self.failed = False
        self.problem = ""
        self._events = events
        self._emit = emit
        self._wake = wake
        self._registered: set[str] = set()
        self._eventless: set[str] = set()
        self._started_once = False
        self._ending = threading.Event()

    def register(self, uuid: str, handle: Handle) -> None:
        """Listen to this GPU from now on, if it has events: that it has none, or refuses, is no fault."""
        if uuid not in self._registered:
            try:
                supported = bool(self._events.register(handle, sum(EVENTS)))
                self._registered.add(uuid)
            except NvmlError as error:  # the next poll tries again
                supported = error.code not in NO_ANSWER
            if not supported:
                self._eventless.add(uuid)
            else:
                self._eventless.discard(uuid)

    def supports(self, uuid: str) -> bool:
        """Return False for a GPU that has no events, by the driver's answer."""
        return uuid not in self._eventless

    def listen(self) -> None:
        """Start emitting, if that was not done: what happened since the registration comes first."""
        if self._started_once:
            return
        try:
            self.start()
            self._started_once, self.problem = True, ""
        except RuntimeError:  # the kernel refuses a thread
            self.problem = f"cannot listen to events, so that only polls find faults: {PROCESSES}"

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                event = self._events.wait(int(EVENT_WAIT * 1000))
                if event and event.type in EVENTS:
                    message = DriverEvent(
                        event.uuid, EVENTS[event.type], event.data, event.gpu_instance, event.compute_instance
                    )
                    self._emit(message)
                    if message.asks_for_poll:
                        self._wake.set()
        except (NvmlError, OSError):
            self.failed = True
            self._wake.set()

    def end(self) -> None:
        """Stop listening. While the wait for events goes on, the library can't be closed: then the process ends."""
        self._ending.set()
        if self._started_once:
            self.join(EVENT_TIMEOUT)
        if self.is_alive():
            os._exit(0)


class NoEvents:
    """Stands in where the driver gives no event set: that is no fault, polls do without."""

    failed = False
    problem = ""

    def __init__(self, supported: bool) -> None:
        self._supported = supported

    def supports(self, uuid: str) -> bool:
        return self._supported

    def register(self, uuid: str, handle: Handle) -> None:
        pass

    def listen(self) -> None:
        pass


@contextmanager
def event_listener(
    library: Library, emit: Callable[[Message], None], wake: threading.Event
) -> Iterator[EventListener | NoEvents]:
    """Open a listener for this library; it is stopped at the end."""
    wake.clear()
    with ExitStack() as stack:
        try:
            events = stack.enter_context(library.event_set())
        except NvmlError as error:
            yield NoEvents(supported=error.code not in NO_ANSWER)
            return
        listener = EventListener(events, emit, wake)
        stack.callback(listener.end)
        yield listener
