"""The real daemon as a process: its log line by line, its signals, its exit status, its footprint in /proc.

Knows nothing of gRPC or GPUs: what it runs is a command line.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, TypeVar

import attrs

#: Seconds after which a process that should have written or done something is taken to hang.
TIMEOUT: Final = 30.0
COMMAND: Final = (sys.executable, "-m", "sgpu")

Process = TypeVar("Process", bound="LoggedProcess")


class LogLine(NamedTuple):
    """One line the process wrote, with the monotonic time it was read."""

    time: float
    text: str


@contextmanager
def short_directory() -> Iterator[Path]:
    """A temporary directory with a path short enough for Unix sockets (107 bytes); pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@attrs.frozen
class Memory:
    """Bytes of several processes together: resident in each; their proportional part, where what processes share is
    divided among all of the machine; the same as if no others had any of it, as on a node that runs no tests; and the
    part of that which is of no file, so that the kernel can't take it back.
    """

    resident: int
    proportional: int
    alone: int
    anonymous: int


class LoggedProcess:
    """Any command line: started by entering it, killed with its children at the end.

    SGPU_* variables of the test runner are not passed on; `env` is set on top. When the block fails,
    the log goes to stderr, where pytest captures it.
    """

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self.arguments = list(arguments)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SGPU_")}
        self.env = {**inherited, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._lines: list[LogLine] = []
        self._ended = False
        self._changed = threading.Condition()

    def __enter__(self: Process) -> Process:
        self.started = time.monotonic()
        # A session of its own, so that children it leaves behind can be killed with it.
        self.process = subprocess.Popen(
            self.arguments,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="daemon log")
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        children = []
        if self.process.poll() is None:
            with suppress(OSError, AssertionError):  # it just now ends
                children = self.children()
        for pid in (-self.process.pid, *children):  # those have sessions of their own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        if self.process.stdout:
            self.process.stdout.close()
        if error is not None:
            print(self._report("its log"), file=sys.stderr)

    @property
    def pid(self) -> int:
        return self.process.pid

    # The log

    @property
    def lines(self) -> tuple[LogLine, ...]:
        """The lines written so far, with times."""
        with self._changed:
            return tuple(self._lines)

    @property
    def logs(self) -> str:
        """The text written so far."""
        return "\n".join(line.text for line in self.lines)

    def wait_log(self, substring: str, timeout: float = TIMEOUT, *, since: int = 0) -> LogLine:
        """Wait for a line with `substring`, from line `since` on: `since=len(process.lines)` is a new one.

        AssertionError with the log after `timeout` seconds, or at once when the process has closed its output.
        """

        def found() -> LogLine | None:
            return next((line for line in self._lines[since:] if substring in line.text), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, timeout)
            line = found()
        if line is None:
            raise AssertionError(self._report(f"no line with {substring!r} within {timeout} s"))
        return line

    # The process

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)

    def wait_exit(self, timeout: float = TIMEOUT) -> int:
        """Its exit status, negative for a signal; AssertionError with the log if it does not exit in time."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._report(f"still running after {timeout} s")) from None
        # What it wrote last is in the log when this returns, unless a child it left holds the pipe open.
        self._reader.join(1.0)
        return status

    def terminate(self, timeout: float = TIMEOUT) -> None:
        """Send SIGTERM; AssertionError with the log unless it exits with 0 in time."""
        self.signal(signal.SIGTERM)
        status = self.wait_exit(timeout)
        assert status == 0, self._report(f"exit status {status} after SIGTERM")

    # Its footprint

    def fd_count(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def thread_count(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def rss_bytes(self) -> int:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def memory(self) -> Memory:
        """Of it and its descendants."""
        return memory(self.pids())

    def cpu_seconds(self) -> float:
        """Processor time so far of it and its living children, in all of their threads."""
        # The clocks that clock_getcpuclockid(3) gives: `stat` counts in hundredths of a second.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self.pids())

    def wake_ups(self) -> Counter[int]:
        """How often its threads, and its children's, have waited so far, by thread: those that live."""
        return Counter(dict(waits for pid in self.pids() for waits in _waits(pid)))

    def pids(self) -> list[int]:
        """It, its children, and theirs."""
        return descendants_of(self.process.pid)

    def children(self) -> list[int]:
        """The ids of its direct children."""
        return children_of(self.pid)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(LogLine(time.monotonic(), line.decode(errors="replace").rstrip("\n")))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _report(self, what: str) -> str:
        lines = "\n".join(f"{line.time - self.started:8.3f} {line.text}" for line in self.lines)
        return f"{what}; {' '.join(self.arguments)} wrote:\n{lines or '(nothing)'}"


class DaemonProcess(LoggedProcess):
    """`python -m sgpu` with these directories and flags."""

    def __init__(
        self,
        plugin_directory: Path,
        host_path: Path,
        flags: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        directories = ("-plugin-directory", str(plugin_directory), "-host-path", str(host_path))
        super().__init__([*command, *directories, *flags], env=env)
        self._daemon = 0

    @property
    def pid(self) -> int:
        """The daemon itself. Signals go to its parent, which hands them on."""
        deadline = time.monotonic() + TIMEOUT
        while not self._daemon:
            assert time.monotonic() < deadline, self._report("it has no child")
            self._daemon = next(iter(children_of(self.process.pid)), 0)
        return self._daemon


def _waits(pid: int) -> Iterator[tuple[int, int]]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # it has just ended
            line = next(line for line in (task / "status").read_text().splitlines() if line.startswith("voluntary"))
            yield int(task.name), int(line.split()[1])


def children_of(pid: int) -> list[int]:
    """The ids of the direct children of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def descendants_of(pid: int) -> list[int]:
    """The id of a process, of its children, and of theirs."""
    return [pid, *(each for child in children_of(pid) for each in descendants_of(child))]


def memory(pids: Iterable[int]) -> Memory:
    """Return the memory of these processes, from /proc/PID/smaps. Needs permission to debug them."""
    resident = proportional = anonymous = 0
    files: defaultdict[str, int] = defaultdict(int)
    for pid in pids:
        for mapping, size in _mappings(pid):
            resident += size["Rss"]
            proportional += size["Pss"]
            if mapping:  # of a file: what is not written to is one copy for all, and they have largely the same part
                files[mapping] = max(files[mapping], size["Rss"] - size["Anonymous"])
                anonymous += size["Anonymous"]
            else:
                anonymous += size["Pss"]
    return Memory(*(1024 * size for size in (resident, proportional, anonymous + sum(files.values()), anonymous)))


def _mappings(pid: int) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Return a mapping's part of a file (empty: none), and sizes in KiB by name."""
    found: list[tuple[str, dict[str, int]]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # address, permissions, offset, device, inode, path
            found.append((" ".join(words[1:5]) if words[4] != "0" else "", {}))
        elif words[-1] == "kB":
            found[-1][1][words[0].rstrip(":")] = int(words[1])
    yield from found
