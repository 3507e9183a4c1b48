"""The process that owns libnvidia-ml: it asks the driver and writes messages to its parent, a line each.

It is a process because a call of the driver can block forever where no thread can be stopped, because only a new
process loads a library that was replaced at the same path, and because the library may crash whoever loaded it. To stay
small it imports little: neither trio nor gRPC. `supervisor` is its parent.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from sgpu.driver import calls, nvml
from sgpu.driver.calls import Calls, Part
from sgpu.driver.events import EventListener, NoEvents, event_listener
from sgpu.driver.limits import LimitSetter, limit_setter
from sgpu.driver.messages import (
    Failure,
    Message,
    NotReady,
    Report,
    WorkerConfig,
    decode_config,
    decode_limits,
    encode,
)
from sgpu.driver.nvml import Code, Handle, Library, NvmlError
from sgpu.driver.nvml.search import candidates
from sgpu.driver.poll import Identity, NotReadyError, Places, poll
from sgpu.driver.released import KERNEL_GPUS, Released
from sgpu.driver.uvm import CapabilityNodes, UvmNodes
from sgpu.driver.wsl import UNSUPPORTED, is_wsl
from sgpu.lib.files import content_identity
from sgpu.lib.retry import growing_delays
from sgpu.node.cgroup_limit import Target, WantedLimit

#: Seconds between attempts to reach a driver that is not there, growing.
FIRST_RETRY: Final = 0.02
LAST_RETRY: Final = 5.0
#: Bytes of input that are read at a time.
INPUT_BYTES: Final = 64 * 1024
#: What `nvmlInit` answers while the kernel's driver is being unloaded or loaded.
NOT_LOADED: Final = frozenset({Code.DRIVER_NOT_LOADED, Code.LIB_RM_VERSION_MISMATCH})


class NoGpuError(NotReadyError):
    """The driver is there, and none of its GPUs."""


class Worker:
    """The loop of the process: open the library, poll, emit what the driver says."""

    def __init__(self, config: WorkerConfig, calls: Calls) -> None:
        self._config = config
        self._calls = calls
        places = (config.host_path, config.dev_directory, config.sysfs_directory, config.proc_directory)
        self._places = Places(*map(Path, places))
        self._uvm = UvmNodes(self._places.host_path, self._places.dev_directory)
        self._capabilities = CapabilityNodes(self._places.host_path, self._places.dev_directory)
        self._candidates = tuple(candidates(self._places.host_path))
        self._known = config.known
        self._released = Released(config.released, self._places)
        self._in_call: str | None = None  # as was written down last
        # Standard output is the parent's alone: what the library prints goes where the log goes.
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._emitting = threading.Lock()
        self._wake = threading.Event()
        self._events_reopened_at = float("-inf")
        self._limits: Mapping[Target, WantedLimit] = {}
        self._setter: LimitSetter | None = None

    def read_limits(self, lines: Iterable[bytes]) -> None:
        """Take the limits that the parent writes, a change a line. When it hangs up, it is gone: end the process."""
        for line in lines:
            new, gone = decode_limits(line)
            table = {**self._limits, **{wanted.target: wanted for wanted in new}}
            for target in gone:
                table.pop(target, None)
            self._limits = table
            if setter := self._setter:
                setter.want(self._limits)
        os._exit(0)  # whatever call of the driver does not return

    def run(self) -> None:
        """Poll and emit until the library was replaced or another GPU is hidden; then the parent starts a new process.

        What is loaded stays loaded, be it only because the loader knows its path.
        """
        delays = self._growing_delays()
        files, loaded = self._files(), False
        while not self._released.hides_another():
            try:
                self._call_started("")
                self._released.hide()
                with nvml.open_library(self._places.host_path, self._call_failed) as library:
                    for _ in self._polls(library):
                        delays = self._growing_delays()
                loaded, delay = True, 0.0
            except nvml.LibraryNotFoundError as error:
                self._emit(NotReady(self._no_library(error)))
                delay = next(delays)
            except NotReadyError as error:
                self._emit(NotReady(str(error), gone=isinstance(error, NoGpuError)))
                loaded, delay = True, next(delays)
            except NvmlError as error:
                reason = f"the NVIDIA driver is not ready: {error}"
                self._emit(NotReady(reason, gone=error.code in NOT_LOADED, code=error.code))
                loaded, delay = True, next(delays)
            if self._config.once:
                return
            time.sleep(delay)
            before, files = files, self._files()
            if loaded and files != before:
                return

    def _no_library(self, error: nvml.LibraryNotFoundError) -> str:
        if is_wsl(self._places.dev_directory):
            return UNSUPPORTED
        return f"{error}; install the driver, or set -host-path to where its libraries are"

    def _call_started(self, uuid: str) -> None:
        """Write down that a call begins that may not return: it goes on until the next report."""
        if uuid != self._in_call:
            self._calls.begin(Part.POLL, uuid)
            self._in_call = uuid

    def _calls_returned(self) -> None:
        self._in_call = None
        self._calls.end(Part.POLL)

    def _call_failed(self, function: str, code: int) -> None:
        self._emit(Failure(function, code))

    def _emit(self, message: Message) -> None:
        """Write a message. Raises OSError, which ends the process."""
        if isinstance(message, NotReady):
            self._calls_returned()
        with self._emitting:
            self._output.write(encode(message))
            self._output.flush()

    def _polls(self, library: Library) -> Iterator[None]:
        """Poll and listen to events until the library has to be opened again. Yields after each poll."""
        surroundings = self._surroundings()
        identities: dict[str, Identity] = {}
        with event_listener(library, self._emit, self._wake) as listener, self._open_setter(library) as setter:

            def found(uuid: str, handle: Handle) -> None:
                listener.register(uuid, handle)
                setter.register(uuid, handle)

            while True:
                report = self._released.checked(self._poll(library, identities, found))
                self._known = report.order
                if not (report.gpus or report.skipped or report.released):
                    raise NoGpuError("; ".join(("the NVIDIA driver has no GPU to offer", *report.problems)))
                if not self._config.once:
                    listener.listen()
                silent = tuple(gpu.uuid for gpu in report.gpus if not listener.supports(gpu.uuid))
                problems = (*report.problems, *filter(None, (listener.problem,)))
                self._emit(attrs.evolve(report, eventless=silent, problems=problems))
                setter.check()
                yield
                if self._config.once or not self._wait(listener):
                    return
                if self._surroundings() != surroundings or self._released.missed_one():
                    return

    def _poll(self, library: Library, identities: dict[str, Identity], found: Callable[[str, Handle], None]) -> Report:
        """Poll once. Raises NvmlError."""
        try:
            return poll(
                library,
                self._places,
                interval=self._config.interval,
                known=self._known,
                some_hidden=bool(self._released),
                identities=identities,
                skip=self._config.suspects,
                call_started=self._call_started,
                found=found,
                ask_for_uvm=(lambda: "") if self._config.look_only else self._uvm.ask,
                make_nodes=(lambda files: "") if self._config.look_only else self._capabilities.make,
            )
        finally:
            self._calls_returned()  # before anything ends the process, which is no fault of the driver's then

    @contextmanager
    def _open_setter(self, library: Library) -> Iterator[LimitSetter]:
        with limit_setter(library, self._emit, self._calls) as setter:
            self._setter = setter
            setter.want(self._limits)
            try:
                yield setter
            finally:
                self._setter = None

    def _wait(self, listener: EventListener | NoEvents) -> bool:
        """Wait until the next poll is due. Returns False where listening needs a new event set."""
        end = time.monotonic() + self._config.interval
        while (left := end - time.monotonic()) > 0:
            if not self._wake.wait(left):
                break
            self._wake.clear()
            if not listener.failed:
                return True  # an event asks for a poll
            if time.monotonic() - self._events_reopened_at >= self._config.interval:
                self._events_reopened_at = time.monotonic()
                return False  # as when a GPU is lost: the poll will show which one
        return not listener.failed

    def _growing_delays(self) -> Iterator[float]:
        return growing_delays(FIRST_RETRY, min(LAST_RETRY, self._config.interval))

    def _surroundings(self) -> tuple[object, ...]:
        """Return what NVML looks at only when it is loaded, or only when it is initialized."""
        nodes = sorted(name for name in _names(self._places.dev_directory) if name.startswith("nvidia"))
        return (self._files(), nodes, sorted(_names(Path("/proc") / KERNEL_GPUS)))

    def _files(self) -> tuple[object, ...]:
        """Return which libraries there are to load."""
        return tuple(map(content_identity, self._candidates))


def _lines(descriptor: int) -> Iterator[bytes]:
    """Yield lines until the other end hangs up. No file of Python's: its lock would be held while the process ends."""
    buffer = b""
    while data := os.read(descriptor, INPUT_BYTES):
        *lines, buffer = (buffer + data).split(b"\n")
        yield from lines


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def main() -> None:
    """Run with the configuration on the command line until the parent is gone.

    What follows it is the descriptor of `calls`; without one, nobody looks.
    """
    try:
        config = decode_config(sys.argv[1])
        worker = Worker(config, Calls(int(sys.argv[2])) if len(sys.argv) > 2 else calls.create())
        if not config.once:  # else it sets no limits, and ends by itself
            threading.Thread(target=worker.read_limits, args=(_lines(0),), name="input", daemon=True).start()
        worker.run()
    except BrokenPipeError:
        os._exit(0)  # the parent is gone; nobody is left to flush for
