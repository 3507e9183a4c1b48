"""What the demos have in common: the real daemon as a process, and steps that are seen in time or fail the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import trio

#: Seconds that any step may take before the demo says that it failed.
STEP_TIMEOUT: Final = 20
#: Seconds between steps, so that people can follow.
PAUSE: Final = 0.7


class StepFailedError(Exception):
    """Something that the demo shows did not happen."""


@asynccontextmanager
async def in_time(what: str) -> AsyncIterator[None]:
    """Fail the demo where the block takes too long. Raises StepFailedError."""
    with trio.move_on_after(STEP_TIMEOUT) as scope:
        yield
    if scope.cancelled_caught:
        raise StepFailedError(f"not seen within {STEP_TIMEOUT} s: {what}")


@contextmanager
def running_daemon(gpus: int, faults: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon as users start it, with so many simulated GPUs. It is killed at the end if it has not stopped."""
    # Another daemon may have the addresses.
    command = [
        sys.executable,
        "-P",
        "-m",
        "sgpu",
        "-simulate",
        str(gpus),
        *flags,
        "-metrics-address=",
        "-cordon-file=",
        "-status-socket=",
    ]
    command += ["-simulate-faults", str(faults)]
    print(f"$ {' '.join(['python -m sgpu', *command[4:]])}", flush=True)
    # Settings of the surroundings are not what is shown here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGPU_")}
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


async def check_stopped(process: subprocess.Popen[bytes], directory: Path, sockets: str) -> None:
    """Check that the daemon stops cleanly and leaves none of these sockets. Raises StepFailedError."""
    async with in_time("the daemon's end"):
        code = await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
    left = [path.name for path in await trio.Path(directory).glob(sockets)]
    if code or left:
        raise StepFailedError(f"a clean stop: exit code {code}, sockets left: {left}")
    say("It stopped with exit code 0 and removed its sockets.")


def say(text: str) -> None:
    """Print what happens."""
    print(f"\n> {text}", flush=True)
