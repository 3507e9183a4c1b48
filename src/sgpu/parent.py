"""The daemon's parent: it hands signals on, and kills a daemon that gives no sign of life.

The kubelet waits for the daemon without a deadline, and starts no pod of the node meanwhile. A daemon that is stopped
(SIGSTOP, a debugger) can't end itself, and process 1 of a container can't be killed by anything in it: so the daemon is
a child, of a process that does next to nothing. Imports nothing that it can do without: it takes 4 MB as it is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

#: Seconds between looks for a sign of life. The daemon gives one every 5 s (`observe.watchdog`).
INTERVAL = 10.0
#: Looks in a row without a sign of life, after which the daemon is killed: 30 s. One whose event loop is stuck has
#: ended itself before, with its stacks. Looks are counted, not seconds: where both are frozen, both go on afterwards.
PATIENCE = 3
#: Signals that are the daemon's to handle.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: What a shell adds to the number of the signal that ended a process.
SIGNALED = 128
FAILED = 1


def run_in_child(start: Callable[[int | None], int]) -> int:
    """Return what `start` returns, which runs in a child. It gets a pipe to write signs of life to.

    The pipe's other end is closed when the parent has ended. As long as there was no sign of life, none is expected.
    Where the kernel refuses a child, it runs here, and gets no pipe.
    """
    signs, alive = os.pipe()
    waited = {*FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    try:
        child = os.fork()
    except OSError as error:
        for descriptor in (signs, alive):
            os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        print(f"sgpu: cannot start a process ({error}): nothing ends a daemon that is stopped", file=sys.stderr)
        return start(None)
    if child == 0:
        os.close(signs)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return start(alive)
    os.close(alive)
    os.set_blocking(signs, False)
    return _watch(child, signs, waited)


def _watch(child: int, signs: int, waited: set[signal.Signals]) -> int:
    silent = -1  # looks without a sign of life; negative: none is expected
    killed = False
    while True:
        received = signal.sigtimedwait(waited, INTERVAL)
        if received is None:
            silent = 0 if _read(signs) else silent + (silent >= 0)
            if silent >= PATIENCE:
                killed, silent = True, -1
                _kill(child)
        elif received.si_signo != signal.SIGCHLD:
            os.kill(child, received.si_signo)
            silent = max(silent, 0)  # it is expected to end, even before it has begun
        elif (code := _reap(child)) is not None:
            return FAILED if killed else code


def _read(signs: int) -> bytes:
    try:
        return os.read(signs, 4096)
    except BlockingIOError:
        return b""


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    print(
        f"sgpu: the daemon has given no sign of life for {INTERVAL * PATIENCE:g} s, and is killed, because the kubelet "
        "waits for it: it was stopped (SIGSTOP, a debugger), or hangs in the kernel",
        file=sys.stderr,
        flush=True,
    )


def _reap(child: int) -> int | None:
    """Reap whatever has ended: process 1 gets everybody's orphans. Returns the child's exit code, None if it runs."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else SIGNALED - ended
