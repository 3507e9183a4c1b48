"""Running `nvidia-modprobe` for device nodes that exist only once something has asked for them.

They are `nvidia-uvm`, and those of the capabilities of MIG instances.

Blocks as long as that takes: it runs in the driver's process (`worker`). Knows neither NVML nor Kubernetes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

NAME: Final = "nvidia-modprobe"
#: Load the module if it can, and make its nodes.
ARGUMENTS: Final = ("-u", "-c", "0")
#: Where it lies under the host path: GKE's installers and `stage`, a distribution's root.
DIRECTORIES: Final = ("bin", "usr/bin")
#: The only place where it makes nodes.
DEV_DIRECTORY: Final = Path("/dev")
#: Seconds that it may take: loading the module takes about one.
TIMEOUT: Final = 5.0
#: Seconds until it is asked again.
PAUSE: Final = 60.0


class UvmNodes:
    """Has the nodes made, but not again and again."""

    def __init__(self, host_path: Path, dev_directory: Path) -> None:
        self._host_path = host_path
        self._dev_directory = dev_directory
        self._asked_at = float("-inf")
        self._outcome = ""

    def ask(self) -> str:
        """Run it if that was not done lately. Returns what came of it, for the message if the node is still missing."""
        now = time.monotonic()
        if now - self._asked_at >= PAUSE:
            self._asked_at = now
            self._outcome = _run(self._host_path, self._dev_directory, ARGUMENTS)
        return self._outcome


class CapabilityNodes:
    """Has the nodes of capability files made, those of one file not again and again."""

    def __init__(self, host_path: Path, dev_directory: Path) -> None:
        self._host_path = host_path
        self._dev_directory = dev_directory
        self._asked: dict[tuple[Path, ...], tuple[float, str]] = {}

    def make(self, files: tuple[Path, ...]) -> str:
        """Run it if that was not done lately for these files. Returns what came of it."""
        now = time.monotonic()
        asked_at, outcome = self._asked.get(files, (float("-inf"), ""))
        if now - asked_at >= PAUSE:
            outcome = _run(self._host_path, self._dev_directory, [f"-f{file}" for file in files])
            self._asked[files] = now, outcome
        return outcome


def _run(host_path: Path, dev_directory: Path, arguments: Sequence[str]) -> str:
    if dev_directory != DEV_DIRECTORY:
        return f"sgpu can't make it: {NAME} makes nodes in {DEV_DIRECTORY} only"
    import subprocess  # here, because nearly always the nodes are there, and it is a megabyte

    program = next(filter(Path.is_file, (host_path / path / NAME for path in DIRECTORIES)), None)
    if program is None:
        return f"sgpu can't make it: no {NAME} under {host_path}"
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the worker writes its messages there
            stderr=subprocess.PIPE,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{program} did not end within {TIMEOUT:g} s"
    except OSError as error:
        return f"{program} can't be run: {error.strerror}"
    if done.returncode == 0:
        return f"{program} was run, and did not make it"
    said = b" ".join(done.stderr.split()).decode(errors="replace") or "most often because the module is not loaded"
    return f"{program} could not, exit code {done.returncode}: {said}"
