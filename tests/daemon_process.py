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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

#: Seconds after which a process that should have said or done something is taken to hang.
TIMEOUT: Final = 10.0
COMMAND: Final = (sys.executable, "-m", "sgpu")


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


class DaemonProcess:
    """`python -m sgpu` with these directories and flags: started by entering it, killed with its children at the end.

    SGPU_* variables of the test runner are not passed on; `env` is set on top. When the block fails,
    the log goes to stderr, where pytest captures it.
    """

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
        self.arguments = [*command, *directories, *flags]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SGPU_")}
        self.env = {**inherited, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._lines: list[LogLine] = []
        self._ended = False
        self._changed = threading.Condition()

    def __enter__(self) -> DaemonProcess:
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
        with suppress(OSError):  # it has ended, or just now ends
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
        """What was written so far, with times."""
        with self._changed:
            return tuple(self._lines)

    @property
    def logs(self) -> str:
        """What was written so far."""
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

    def pss_bytes(self) -> int:
        """Proportional memory, its children's included: what processes share is divided among them."""
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (self.pid, *self.children())]
        lines = [line for rollup in rollups for line in rollup.splitlines() if line.startswith("Pss:")]
        return sum(int(line.split()[1]) * 1024 for line in lines)

    def cpu_seconds(self) -> float:
        """Processor time of its living threads, children not included."""
        # Not from `stat`, which counts in hundredths of a second.
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def children(self) -> list[int]:
        """The ids of its direct children."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]

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
