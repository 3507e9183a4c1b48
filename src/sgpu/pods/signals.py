"""Sends signals to the process that was meant, never to another that has its id by now. Knows no GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from sgpu.lib.threads import run_in_thread
from sgpu.node.container import Container, Process
from sgpu.pods.processes import Places, UnattributableError, find_owners


class ProcessGoneError(Exception):
    """The process has ended, is in another container, or can no longer be attributed to one."""


class SignalRefusedError(Exception):
    """The kernel lets nobody here signal the process. The message says why, and what to do."""


@attrs.frozen
class OpenProcess:
    """A process by a descriptor (pidfd), which stays that process's when it has ended."""

    descriptor: int

    def send(self, number: signal.Signals) -> None:
        """Send it a signal. Raises ProcessGoneError or SignalRefusedError."""
        try:
            signal.pidfd_send_signal(self.descriptor, number)
        except ProcessLookupError as error:
            raise ProcessGoneError("it has ended") from error
        except OSError as error:
            raise _refused(error) from error

    async def ends_within(self, seconds: float) -> bool:
        """Wait for its end. Returns whether it came in time."""
        with trio.move_on_after(seconds) as waiting:
            await trio.lowlevel.wait_readable(self.descriptor)
        return not waiting.cancelled_caught


@asynccontextmanager
async def open_process(places: Places, process: Process, container: Container) -> AsyncIterator[OpenProcess]:
    """Open a process that still runs in this container. Raises ProcessGoneError or SignalRefusedError."""
    # A disk that hangs must not keep the daemon from stopping.
    descriptor = await run_in_thread(_open, places, process, container, abandon_on_cancel=True)
    try:
        yield OpenProcess(descriptor)
    finally:
        os.close(descriptor)


def _open(places: Places, process: Process, container: Container) -> int:
    descriptor = _pidfd(process.pid)  # from here on, whichever process it is stays the same
    try:
        owners = find_owners(places, (process.pid,), 0.0)
        if owners.processes.get(process.pid) != process:
            raise ProcessGoneError("it has ended, or is in no known container")
        if owners.containers[process.pid] != container or process.pid in owners.mps:
            raise ProcessGoneError("it is not in that container any more")
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, UnattributableError):
            raise ProcessGoneError(f"its container is unknown: {error}") from error
        raise
    return descriptor


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise ProcessGoneError("it has ended") from error
    except OSError as error:
        raise _refused(error) from error


def _refused(error: OSError) -> SignalRefusedError:
    advice = "run sgpu as root with hostPID: true, privileged or with the capability KILL, on Linux 5.3 or later"
    return SignalRefusedError(f"{error.strerror}; {advice}")
