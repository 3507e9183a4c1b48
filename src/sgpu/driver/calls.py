"""The call of libnvidia-ml that a worker is in: it writes it down where its parent looks when it hears nothing.

A message for each call would wake the parent several times a poll, for what matters only if a call does not return.
What is written down outlives a worker that crashes.
"""

from __future__ import annotations

import enum
import os
import struct
import time
from typing import Final

import attrs

#: When the call began, whether it goes on, and the UUID of its GPU: NVML's have at most 96 bytes.
_ENTRY: Final = struct.Struct("=q?247p")


class Part(enum.IntEnum):
    """Threads of the worker that make calls beside each other."""

    POLL = 0
    LIMITS = 1


@attrs.frozen
class Call:
    """A call that has not returned: about this GPU, or about the driver as a whole if empty, for so many seconds."""

    uuid: str
    seconds: float


def now() -> int:
    """Return the time in nanoseconds, by a clock that all processes have."""
    return time.monotonic_ns()


@attrs.frozen
class Calls:
    """What both processes have: a file in memory, by its descriptor."""

    descriptor: int

    def begin(self, part: Part, uuid: str) -> None:
        """Write down that calls about this GPU begin (empty: about the driver), which may never return."""
        self._write(part, True, uuid)

    def end(self, part: Part) -> None:
        """Write down that they have returned."""
        self._write(part, False, "")

    def current(self, part: Part) -> Call | None:
        """Return the call that has not returned."""
        entry = self._read(part)
        if len(entry) < _ENTRY.size:
            return None
        began, goes_on, uuid = _ENTRY.unpack(entry)
        return Call(uuid.decode("utf-8", "surrogateescape"), (now() - began) / 1e9) if goes_on else None

    @property
    def any(self) -> bool:
        """Return whether there ever was one."""
        return bool(self._read(Part.POLL))

    def close(self) -> None:
        """Close it, in this process."""
        os.close(self.descriptor)

    def _write(self, part: Part, goes_on: bool, uuid: str) -> None:
        entry = _ENTRY.pack(now(), goes_on, uuid.encode("utf-8", "surrogateescape"))
        os.pwrite(self.descriptor, entry, part * _ENTRY.size)

    def _read(self, part: Part) -> bytes:
        return os.pread(self.descriptor, _ENTRY.size, part * _ENTRY.size)


def create() -> Calls:
    """Make one, for a worker to inherit. Raises OSError."""
    return Calls(os.memfd_create("sgpu-calls"))
