"""Standard output that may be closed or full: one error, instead of a traceback now and another at exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class OutputError(Exception):
    """Standard output can't be written to. The message says why."""


@contextmanager
def checked_output() -> Iterator[None]:
    """Write to standard output in here. Raises OutputError where that fails, be it at the last flush."""
    if sys.stdout is None:
        raise OutputError("standard output is closed")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Python flushes what is left once more as it ends: that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"cannot write to standard output: {error.strerror or error}") from error
