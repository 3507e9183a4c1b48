"""Measures what someone at a terminal waits for: the version, and the help."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

from daemon_process import COMMAND
from table import Aim, Figure, median_and


def answers(number: int) -> Iterator[Figure]:
    """From starting the command to its end."""
    for word in ("-version", "-help"):
        times = []
        for _ in range(number):
            started = time.perf_counter()
            subprocess.run([*COMMAND, word], stdout=subprocess.DEVNULL, check=True)
            times.append(1000 * (time.perf_counter() - started))
        yield from median_and(f"`{word}`", {"sgpu": times}, "worst", 1, (Aim(90), None))
