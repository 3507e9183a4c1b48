"""The process that owns libnvidia-ml: it asks the driver and tells its parent, line by line, on standard output.

A process, because a call of the driver can block for ever where no thread can be stopped, because only a new process
loads a library that was replaced at the same path, and because the library may take down whoever loaded it. It knows
as little as possible, to stay small: neither trio nor gRPC nor what becomes of its reports (`driver`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from sgpu import nvml
from sgpu.discovery import NotReadyError, Places, read
from sgpu.files import content_identity
from sgpu.nvml import Code, EventSet, EventType, Library, NvmlError
from sgpu.nvml.search import candidates
from sgpu.report import Asking, DriverEvent, EventKind, Message, NotReady, Orders, Report, decode_orders, encode
from sgpu.retry import growing_delays

#: Seconds between attempts to reach a driver that is not there, growing.
FIRST_RETRY: Final = 0.02
LAST_RETRY: Final = 5.0
#: Seconds at a time to wait for events: so long it may take to notice that the parent was killed.
LONGEST_WAIT: Final = 1.0
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
        self._trusting_at = time.monotonic() + orders.suspect_delay
        # Standard output is the parent's alone: what the library prints goes where the log goes.
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._parent = os.getppid()
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
                with nvml.open_library(self._places.host_path) as library:
                    for report in self._reports(library):
                        self._tell(report)
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
            time.sleep(delay)
            before, files = files, self._files()
            if loaded and files != before:
                return

    def _ask(self, uuid: str) -> None:
        self._tell(Asking(uuid))

    def _tell(self, message: Message) -> None:
        self._output.write(encode(message))
        self._output.flush()

    def _reports(self, library: Library) -> Iterator[Report]:
        """Poll, and pass on events in between, until the library has to be opened anew."""
        surroundings = self._surroundings()
        with _event_set(library) as events:
            while True:
                skip = self._orders.suspects if time.monotonic() < self._trusting_at else ()
                report = read(library, self._places, skip=skip, asking=self._ask)
                if not (report.gpus or report.unasked):
                    raise NoGpuError("; ".join(("the NVIDIA driver has no GPU to offer", *report.problems)))
                if events:
                    self._register(library, events, skip)
                yield report
                if not self._wait(events):
                    return
                if report.problems or any(gpu.error for gpu in report.gpus):
                    return  # a GPU that was reset answers only to handles that are made afterwards
                if self._surroundings() != surroundings:
                    return

    def _wait(self, events: EventSet | None) -> bool:
        """Pass on events until it is time for the next poll. Returns False where it takes another set to hear more."""
        end = time.monotonic() + self._orders.interval
        while (left := end - time.monotonic()) > 0:
            if os.getppid() != self._parent:
                raise BrokenPipeError("the parent is gone")
            turn = min(left, LONGEST_WAIT)
            try:
                event = events.wait(max(1, int(turn * 1000))) if events else None
            except NvmlError:  # as when a GPU is lost: which one, the poll will show
                if time.monotonic() - self._deaf_since >= self._orders.interval:
                    self._deaf_since = time.monotonic()
                    return False
                events = None  # another set did no better
                continue
            if event:
                told = DriverEvent(event.uuid, EVENTS[event.type], event.data)
                self._tell(told)
                if told.asks_for_poll:
                    break
            elif not events:
                time.sleep(turn)
        return True

    def _growing_delays(self) -> Iterator[float]:
        return growing_delays(FIRST_RETRY, min(LAST_RETRY, self._orders.interval))

    def _register(self, library: Library, events: EventSet, skip: Collection[str]) -> None:
        """Register whatever can be: to be registered twice does no harm, and not to be able to is no fault."""
        for index in range(library.count()):
            with suppress(NvmlError):
                handle = library.handle(index)
                uuid = library.uuid(handle)
                if uuid not in skip:
                    self._ask(uuid)
                    events.register(handle, sum(EVENTS))
            self._ask("")

    def _surroundings(self) -> tuple[object, ...]:
        """What NVML looks at only when it is loaded, or only when it is initialised."""
        nodes = sorted(name for name in _names(self._places.dev_directory) if name.startswith("nvidia"))
        return (self._files(), nodes, sorted(_names(KERNEL_GPUS)))

    def _files(self) -> tuple[object, ...]:
        """Which libraries there are to load."""
        return tuple(map(content_identity, candidates(self._places.host_path)))


@contextmanager
def _event_set(library: Library) -> Iterator[EventSet | None]:
    """An event set, or None where the driver knows no events: that is no fault, polls do without."""
    with ExitStack() as stack:
        try:
            events = stack.enter_context(library.event_set())
        except NvmlError:
            events = None
        yield events


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
