"""`sgpu cordon` and `uncordon`: take one GPU out of service, put it back. The daemon does it; this asks and waits."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sgpu.config.load import Loaded
from sgpu.lib.interrupts import interrupts_held
from sgpu.lib.logs import few, printable
from sgpu.lib.output import checked_output
from sgpu.observe.client import NoAnswerError, OrderRefusedError, fetch, send
from sgpu.observe.describe import progress
from sgpu.observe.orders import Done, Order
from sgpu.observe.snapshot import GpuSnapshot, Snapshot

#: Seconds between two looks.
INTERVAL: Final = 0.5


def cordon(loaded: Loaded, options: Mapping[str, Any]) -> int:
    """Cordon a GPU and, if asked to, wait until it is released. Returns the exit code."""
    (name,) = options["arguments"]
    socket = loaded.settings.status_socket
    try:
        done = send(socket, "cordon", Order(name, options["reason"]))
        parts = _parts(fetch(socket), done)
    except (NoAnswerError, OrderRefusedError) as error:
        return _fail(str(error))
    _print(f"{_name(done)} is cordoned{'' if done.changed else ' already'}: no more containers get a share of it")
    if not options["wait"]:
        _print(f"{_state(parts)}; `sgpu status` shows when it is released")
        return 0
    return _wait(socket, done, options["timeout"])


def uncordon(loaded: Loaded, options: Mapping[str, Any]) -> int:
    """End the cordon of a GPU. Returns the exit code."""
    (name,) = options["arguments"]
    try:
        done = send(loaded.settings.status_socket, "uncordon", Order(name))
    except (NoAnswerError, OrderRefusedError) as error:
        return _fail(str(error))
    now = "is uncordoned: its shares are offered as soon as the driver answers for it"
    _print(f"{_name(done)} {now if done.changed else 'was not cordoned'}")
    return 0


def _wait(socket: str, done: Done, timeout: float) -> int:
    """Wait until the GPU is released, for so many seconds (0: without end), over restarts of the daemon."""
    end = time.monotonic() + timeout if timeout else float("inf")
    with interrupts_held() as wait_for_interrupt:  # they must not end it in the middle of a look
        return _look_until(end, socket, done, wait_for_interrupt)


def _look_until(
    end: float, socket: str, done: Done, wait_for_interrupt: Callable[[float], signal.Signals | None]
) -> int:
    said, others = "", 0
    while True:
        try:
            parts = _parts(fetch(socket), done)
            state = _state(parts)
            if parts and all(part.cordon and part.cordon.released for part in parts):
                break
            if not all(part.cordon for part in parts):
                return _fail(f"{_name(done)} was uncordoned meanwhile")
            if any(part.memory_used is not None for part in parts):  # else its processes are unknown, too
                others = sum(use.processes for part in parts for use in part.containers if not use.shares)
        except NoAnswerError as error:
            state = str(error)
        if state != said:
            print(f"waiting: {state}", file=sys.stderr, flush=True)
            said = state
        interrupt = wait_for_interrupt(max(min(INTERVAL, end - time.monotonic()), 0))
        if interrupt or time.monotonic() >= end:
            why = interrupt.name if interrupt else "the time is over"
            return _fail(f"{why}: {_name(done)} is not released and stays cordoned; {state}")
    _print(f"{_name(done)} is released: no container has a share of it, and no process of sgpu has it open")
    if others:
        _print(
            f"{others} process(es) without a share of it used it before: `fuser -v /dev/nvidia*` on the host names them"
        )
    return 0


def _parts(snapshot: Snapshot, done: Done) -> list[GpuSnapshot]:
    """Return the GPU, or its MIG instances in its place; nothing if the daemon does not see it, as after its start."""
    return [gpu for gpu in snapshot.gpus if done.uuid in (gpu.uuid, gpu.parent)]


def _state(parts: Sequence[GpuSnapshot]) -> str:
    users = few([f"{use.namespace}/{use.pod}" for part in parts for use in part.containers if use.shares])
    states = dict.fromkeys(progress(part) for part in parts)
    return printable(", ".join(states) + (f", by {users}" if users else "")) or "the daemon does not see it"


def _name(done: Done) -> str:
    return printable(str(done))


def _print(text: str) -> None:
    with checked_output():
        print(text)


def _fail(message: str) -> int:
    print(f"sgpu: {message}", file=sys.stderr)
    return 1
