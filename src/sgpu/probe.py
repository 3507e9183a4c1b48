"""The process that owns libnvidia-ml: it asks the driver and tells its parent, line by line, on standard output.

A process, because a call of the driver can block for ever where no thread can be stopped, because only a new process
loads a library that was replaced at the same path, and because the library may take down whoever loaded it. It knows
as little as possible, to stay small: neither trio nor gRPC nor what becomes of its reports (`driver`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from sgpu import nvml
from sgpu.discovery import NotReadyError, Places, read
from sgpu.files import content_identity
from sgpu.nvml import Code, EventSet, EventType, Handle, Library, NvmlError
from sgpu.nvml.search import candidates
from sgpu.report import (
    Asking,
    DriverEvent,
    EventKind,
    Failure,
    Message,
    NotReady,
    Orders,
    Report,
    decode_orders,
    encode,
)
from sgpu.retry import growing_delays
from sgpu.uvm import UvmNodes

#: Seconds between attempts to reach a driver that is not there, growing.
FIRST_RETRY: Final = 0.02
LAST_RETRY: Final = 5.0
#: Seconds at a time to wait for the next poll: so long it may take to notice that the parent was killed.
LONGEST_WAIT: Final = 1.0
#: Seconds at a time to wait for events: so long the library can't be closed.
EVENT_WAIT: Final = 0.5
#: Seconds after which that wait is one that does not return.
EVENT_TIMEOUT: Final = 5.0
#: The events that may mean that a GPU can't be used.
EVENTS: Final = {
    EventType.XID_CRITICAL: EventKind.XID,
    EventType.DOUBLE_BIT_ECC: EventKind.DOUBLE_BIT_ECC,
    EventType.NON_FATAL_POISON: EventKind.NON_FATAL_POISON,
    EventType.FATAL_POISON: EventKind.FATAL_POISON,
    EventType.GPU_UNAVAILABLE: EventKind.GPU_UNAVAILABLE,
    EventType.RECOVERY_ACTION: EventKind.RECOVERY_ACTION,
}
#: What `nvmlInit` answers while the kernel's driver is being taken out or put in.
NOT_LOADED: Final = frozenset({Code.DRIVER_NOT_LOADED, Code.LIB_RM_VERSION_MISMATCH})
#: Where the kernel's driver lists its GPUs, which NVML does only when it is initialised.
KERNEL_GPUS: Final = Path("/proc/driver/nvidia/gpus")


class NoGpuError(NotReadyError):
    """The driver is there, and none of its GPUs."""


class Probe:
    """The loops of the process. `tell` gets each message; it ends the process by raising OSError."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._places = Places(Path(orders.host_path), Path(orders.dev_directory), Path(orders.sysfs_directory))
        self._uvm = UvmNodes(self._places.host_path, self._places.dev_directory)
        self._known = orders.known
        self._asked: str | None = None
        # Standard output is the parent's alone: what the library prints goes where the log goes.
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._telling = threading.Lock()
        self._parent = os.getppid()
        self._wake = threading.Event()
        self._deaf_since = float("-inf")

    def run(self) -> None:
        """Ask and tell, until the library was replaced: then the parent starts another process.

        What is loaded stays loaded, be it only because the loader knows its path.
        """
        delays = self._growing_delays()
        files, loaded = self._files(), False
        while True:
            try:
                self._ask("")
                with nvml.open_library(self._places.host_path, self._failed) as library:
                    for _ in self._polls(library):
                        delays = self._growing_delays()
                loaded, delay = True, 0.0
            except nvml.LibraryNotFoundError as error:
                self._tell(NotReady(f"{error}; install the driver, or set -host-path to where its libraries are"))
                delay = next(delays)
            except NotReadyError as error:
                self._tell(NotReady(str(error), gone=isinstance(error, NoGpuError)))
                loaded, delay = True, next(delays)
            except NvmlError as error:
                self._tell(NotReady(f"the NVIDIA driver is not ready: {error}", gone=error.code in NOT_LOADED))
                loaded, delay = True, next(delays)
            if self._orders.once:
                return
            time.sleep(delay)
            before, files = files, self._files()
            if loaded and files != before:
                return

    def _ask(self, uuid: str) -> None:
        """A call begins that may not return. The parent takes it to go on until it is told something else."""
        if uuid != self._asked:
            self._tell(Asking(uuid))
            self._asked = uuid

    def _failed(self, function: str, code: int) -> None:
        self._tell(Failure(function, code))

    def _tell(self, message: Message) -> None:
        if isinstance(message, (Report, NotReady)):
            self._asked = None
        with self._telling:
            self._output.write(encode(message))
            self._output.flush()

    def _polls(self, library: Library) -> Iterator[None]:
        """Poll, and hear events all the while, until the library has to be opened anew. Yields after each poll."""
        surroundings = self._surroundings()
        with _listening(library, self._tell, self._wake) as listener:
            while True:
                report = read(
                    library,
                    self._places,
                    interval=self._orders.interval,
                    known=self._known,
                    skip=self._orders.suspects,
                    asking=self._ask,
                    found=listener.register,
                    ask_for_uvm=(lambda: "") if self._orders.look_only else self._uvm.ask,
                )
                self._known = report.order
                if not (report.gpus or report.unasked):
                    raise NoGpuError("; ".join(("the NVIDIA driver has no GPU to offer", *report.problems)))
                listener.listen()
                self._tell(report)
                yield
                if self._orders.once or not self._wait(listener) or self._surroundings() != surroundings:
                    return

    def _wait(self, listener: Listener | NoListener) -> bool:
        """Until it is time for the next poll. Returns False where it takes another event set to hear more."""
        end = time.monotonic() + self._orders.interval
        while (left := end - time.monotonic()) > 0:
            if os.getppid() != self._parent:
                raise BrokenPipeError("the parent is gone")
            if not self._wake.wait(min(left, LONGEST_WAIT)):
                continue
            self._wake.clear()
            if not listener.deaf:
                return True  # an event asks for a poll
            if time.monotonic() - self._deaf_since >= self._orders.interval:
                self._deaf_since = time.monotonic()
                return False  # as when a GPU is lost: which one, the poll will show
        return not listener.deaf

    def _growing_delays(self) -> Iterator[float]:
        return growing_delays(FIRST_RETRY, min(LAST_RETRY, self._orders.interval))

    def _surroundings(self) -> tuple[object, ...]:
        """What NVML looks at only when it is loaded, or only when it is initialised."""
        nodes = sorted(name for name in _names(self._places.dev_directory) if name.startswith("nvidia"))
        return (self._files(), nodes, sorted(_names(KERNEL_GPUS)))

    def _files(self) -> tuple[object, ...]:
        """Which libraries there are to load."""
        return tuple(map(content_identity, candidates(self._places.host_path)))


class Listener(threading.Thread):
    """Tells of events as they come, also while a call about some GPU does not return: a thread of its own.

    `wake` is set when an event asks for a poll, and when nothing more will be heard (`deaf`).
    """

    def __init__(self, events: EventSet, tell: Callable[[Message], None], wake: threading.Event) -> None:
        super().__init__(name="events", daemon=True)
        self.deaf = False
        self._events = events
        self._tell = tell
        self._wake = wake
        self._registered: set[str] = set()
        self._begun = False
        self._ending = threading.Event()

    def register(self, uuid: str, handle: Handle) -> None:
        """Hear of this GPU from now on, if it has events: that it has none, or refuses, is no fault."""
        if uuid not in self._registered:
            with suppress(NvmlError):
                self._events.register(handle, sum(EVENTS))
                self._registered.add(uuid)

    def listen(self) -> None:
        """Begin, if it has not begun: what happened since the registration is told first."""
        if not self._begun:
            self._begun = True
            self.start()

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                event = self._events.wait(int(EVENT_WAIT * 1000))
                if event and event.type in EVENTS:
                    told = DriverEvent(event.uuid, EVENTS[event.type], event.data)
                    self._tell(told)
                    if told.asks_for_poll:
                        self._wake.set()
        except (NvmlError, OSError):
            self.deaf = True
            self._wake.set()

    def end(self) -> None:
        """Stop listening. If the driver does not let go, the process ends: the library can't be closed then."""
        self._ending.set()
        if self._begun:
            self.join(EVENT_TIMEOUT)
        if self.is_alive():
            os._exit(0)


class NoListener:
    """Where the driver knows no events: that is no fault, polls do without."""

    deaf = False

    def register(self, uuid: str, handle: Handle) -> None:
        pass

    def listen(self) -> None:
        pass


@contextmanager
def _listening(
    library: Library, tell: Callable[[Message], None], wake: threading.Event
) -> Iterator[Listener | NoListener]:
    wake.clear()
    with ExitStack() as stack:
        try:
            events = stack.enter_context(library.event_set())
        except NvmlError:
            yield NoListener()
            return
        listener = Listener(events, tell, wake)
        stack.callback(listener.end)
        yield listener


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def main() -> None:
    """Follow the orders on the command line until the parent is gone."""
    try:
        Probe(decode_orders(sys.argv[1])).run()
    except BrokenPipeError:
        os._exit(0)  # the parent is gone; nobody is left to flush for


if __name__ == "__main__":
    main()
