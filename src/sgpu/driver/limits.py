"""Sets memory limits of cgroups and reads them back, on a thread of its own: also while a poll goes on.

Runs in the driver's process. Knows neither trio nor whose the cgroups are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import attrs

from sgpu.driver.calls import Calls, Part
from sgpu.driver.messages import LimitReport, Message
from sgpu.driver.nvml import Code, Handle, Library, MemoryLimit, NvmlError
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, Target, WantedLimit

#: Bytes by which what is read back may differ: a driver rounds to its pages.
ROUNDING: Final = 2 * 1024 * 1024
#: Seconds that a call may take while the library is to be closed.
END_TIMEOUT: Final = 5.0
#: What the library or the GPU answers where a driver has no limits at all.
UNSUPPORTED: Final = {
    Code.FUNCTION_NOT_FOUND: "this driver has no memory limits; they need driver R615 or later",
    Code.NOT_SUPPORTED: "the driver does not support memory limits of this GPU; they need cgroup v2, and no MIG",
    Code.NO_PERMISSION: "sgpu may not set memory limits; it has to be root, in a privileged container",
}


class LimitSetter(threading.Thread):
    """Works on the table that it was given last: on what is new in it at once, on all of it when `check` is called.

    A driver takes its time for hundreds of limits, and a container waits for one: what is new comes first.
    """

    def __init__(self, library: Library, emit: Callable[[Message], None], calls: Calls) -> None:
        super().__init__(name="limits", daemon=True)
        self._calls = calls
        self._library = library
        self._emit = emit
        self._handles: dict[str, Handle] = {}
        self._table: Mapping[Target, WantedLimit] = {}
        self._set: set[Target] = set()  # by this thread
        self._done: dict[Target, WantedLimit] = {}  # for which the driver was called
        self._all = False
        self._due = threading.Event()
        self._ending = False

    def register(self, uuid: str, handle: Handle) -> None:
        """Take the handle of a GPU."""
        self._handles[uuid] = handle

    def want(self, table: Mapping[Target, WantedLimit]) -> None:
        """Take another table, and work on it at once, if the driver was polled before."""
        self._table = table
        if self._handles:
            self._wake()

    def check(self) -> None:
        """Read all limits back again, and set those that are not as wanted: a driver that was reloaded has none."""
        self._all = True
        self._wake()

    def _wake(self) -> None:
        self._due.set()
        if self._table and not self.ident:  # not started yet: mostly there are no limits
            self.start()

    def end(self) -> None:
        """Stop. If a call does not return, the process ends: the library can't be closed then."""
        if not self.ident:
            return
        self._ending = True
        self._due.set()
        self.join(END_TIMEOUT)
        if self.is_alive():
            os._exit(0)

    def run(self) -> None:
        while True:
            self._due.wait()
            if self._ending:
                return
            try:
                self._set_new()
                while self._all:
                    self._all = False
                    self._read_again()
            except OSError:  # the parent is gone; the main thread finds out, too
                return

    def _set_new(self) -> None:
        self._due.clear()
        before, self._done = self._done, dict(self._table)
        new = [wanted for target, wanted in self._done.items() if not _is_same(before.get(target), wanted)]
        self._report(list(map(self._answer, new)))

    def _read_again(self) -> None:
        answers = []
        for target in list(self._done):
            if self._due.is_set():
                if self._ending:
                    return
                self._set_new()
            if wanted := self._done.get(target):
                answers.append(self._answer(wanted))
        # Of the others, something else is wanted by now.
        self._report([answer for answer in answers if _is_same(self._done.get(answer.wanted.target), answer.wanted)])

    def _report(self, answers: list[LimitAnswer]) -> None:
        self._calls.end(Part.LIMITS)
        if answers:
            self._emit(LimitReport(tuple(answers)))

    def _answer(self, wanted: WantedLimit) -> LimitAnswer:
        self._calls.begin(Part.LIMITS, wanted.uuid)
        handle = self._handles.get(wanted.uuid)
        if handle is None:
            return LimitAnswer(wanted, LimitState.PENDING, reason="the driver does not list the GPU")
        try:
            return self._enforce(wanted, handle)
        except NvmlError as error:
            if not os.path.isdir(wanted.cgroup):  # its container has ended
                return LimitAnswer(wanted, LimitState.REMOVED)
            reason = UNSUPPORTED.get(error.code, str(error))
            if error.code == Code.NOT_FOUND:
                reason += _missing_controller(wanted.cgroup)
            return LimitAnswer(wanted, LimitState.REFUSED, reason=reason)

    def _enforce(self, wanted: WantedLimit, handle: Handle) -> LimitAnswer:
        found = self._library.memory_limit(handle, wanted.cgroup)
        if not _fits(found, wanted.hard):
            if found and not wanted.ours and wanted.target not in self._set:
                return LimitAnswer(
                    wanted, LimitState.FOREIGN, found.hard, found.used, "the cgroup has a limit that sgpu did not set"
                )
            self._set.add(wanted.target)
            self._library.set_memory_limit(handle, wanted.cgroup, wanted.hard)
            found = self._library.memory_limit(handle, wanted.cgroup)
        if _fits(found, wanted.hard):
            state = LimitState.REMOVED if wanted.hard is None else LimitState.ENFORCED
            return LimitAnswer(wanted, state, *(attrs.astuple(found) if found else ()))
        read = f"{found.hard} bytes" if found else "no limit"
        return LimitAnswer(
            wanted,
            LimitState.REFUSED,
            None,
            found.used if found else None,
            f"the driver took the limit and reads back {read}",
        )


def _is_same(known: WantedLimit | None, wanted: WantedLimit) -> bool:
    """Return whether the same bytes are wanted: whose limit it is matters only until they are set."""
    return known is not None and known.hard == wanted.hard


def _fits(found: MemoryLimit | None, hard: int | None) -> bool:
    if found is None or hard is None:
        return found is None and hard is None
    return abs(found.hard - hard) < ROUNDING


def _missing_controller(cgroup: str) -> str:
    """Return what to add to an error where the kernel has the dmem controller and this cgroup does not."""
    directory = cgroup
    while directory not in ("/", ""):
        directory = os.path.dirname(directory)
        try:
            with open(f"{directory}/cgroup.controllers") as file:
                controllers = file.read().split()
            with open(f"{directory}/cgroup.subtree_control") as file:
                enabled = file.read().split()
        except OSError:
            return ""
        if "dmem" in controllers and "dmem" not in enabled:
            return (
                f"; {directory}/cgroup.subtree_control lacks dmem: add +dmem there, as runc does and crun does not, "
                f"or boot with cgroup_disable=dmem"
            )
    return ""


@contextmanager
def limit_setter(library: Library, emit: Callable[[Message], None], calls: Calls) -> Iterator[LimitSetter]:
    """Open a setter for this library; it is stopped at the end."""
    setter = LimitSetter(library, emit, calls)
    try:
        yield setter
    finally:
        setter.end()
