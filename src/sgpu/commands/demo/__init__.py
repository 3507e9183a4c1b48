"""`python -m sgpu demo`: the real daemon, as a process, on simulated GPUs, against a small kubelet and API server.

Each step prints what was seen, and fails the demo when it was not seen in time.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import trio

from sgpu.commands.demo import deviceplugin, dra
from sgpu.commands.demo.steps import StepFailedError
from sgpu.lib.concurrency import find_error


def demo(api: str) -> int:
    """Show one way to offer GPUs, as `-api` names it; returns the exit code."""
    show = dra.show if api == "dra" else deviceplugin.show
    try:
        scratch = tempfile.TemporaryDirectory(prefix="sgpu-demo-")
    except OSError as error:  # as in sgpu's pod, whose root file system is read-only
        print(f"sgpu: {error}; set TMPDIR to a directory that can be written to", file=sys.stderr)
        return 1
    with scratch as directory:
        try:
            trio.run(show, Path(directory))
        except Exception as error:
            failed = find_error(error, StepFailedError)
            if failed is None:
                raise
            print(f"\nFAILED: {failed}", flush=True)
            return 1
    print("\nAll of it was seen.", flush=True)
    return 0
