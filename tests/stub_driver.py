"""A driver for tests: tests/stub/nvml_stub.c as a libnvidia-ml that can be steered while others have it loaded.

Knows NVML's functions and facts, not what sgpu does with them. A new fact of a GPU is one field of `StubGpu` here and
one function there.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from uuid import NAMESPACE_OID, uuid5

import attrs

from sgpu.driver.nvml import EventType

SOURCE: Final = Path(__file__).parent / "stub" / "nvml_stub.c"
HEADER: Final = Path(__file__).parent.parent / "proto" / "nvml" / "nvml.h"
#: Every function that the header declares.
FUNCTIONS: Final = frozenset(re.findall(r"\b(nvml\w+)\(", HEADER.read_text()))

GIB: Final = 1 << 30
MIB: Final = 1 << 20


@attrs.frozen
class StubGpu:
    """One GPU as NVML describes it. `StubGpu(n)` is the n-th of a machine full of equal ones."""

    number: int = 0
    uuid: str = attrs.Factory(lambda self: f"GPU-{uuid5(NAMESPACE_OID, str(self.number))}", takes_self=True)
    minor: int = attrs.Factory(lambda self: self.number, takes_self=True)
    bus_id: str = attrs.Factory(lambda self: f"00000000:{0x3B + self.number:02X}:00.0", takes_self=True)
    name: str = "Tesla T4"
    total: int = 15 * GIB  # bytes, as all memory here
    used: int = 0  # without what is reserved
    reserved: int = 450 * MIB
    event_types: int = EventType.XID_CRITICAL | EventType.DOUBLE_BIT_ECC
    lost: bool = False  # still counted, but every call for it fails
    # None: this GPU does not support the question.
    utilization: int | None = 0
    recovery_action: int | None = None
    rows_pending: int | None = 0
    rows_failed: int = 0
    pages_pending: int | None = None
    fabric_state: int | None = None
    fabric_status: int = 0
    # Processes by list: id and bytes of memory (NOT_AVAILABLE: not known).
    compute: tuple[tuple[int, int], ...] | None = ()
    graphics: tuple[tuple[int, int], ...] | None = ()
    mps: tuple[tuple[int, int], ...] | None = ()
    # How busy they were: process id, percent, and when (microseconds since the epoch; 0: a moment ago).
    samples: tuple[tuple[int, int, int], ...] | None = ()


@attrs.frozen
class StubEvent:
    """One event, delivered to every event set that is registered for it when it happens."""

    gpu: StubGpu
    type: int
    data: int = 0


@attrs.frozen
class StubState:
    """All that the library answers from."""

    gpus: tuple[StubGpu, ...] = attrs.field(default=(), converter=tuple)
    driver_version: str = "550.54.15"
    #: Function, or function and UUID with a dot between: an NVML code, or what else it does.
    calls: Mapping[str, int | str] = attrs.Factory(dict)
    events: tuple[StubEvent, ...] = ()
    #: Bytes by which the newest variants make an entry of a list of processes longer, as drivers 535.43 to 535.86 do.
    process_surplus: int = 0
    #: Whether samples from before the time that is asked for are returned as well.
    stale_samples: bool = False
    #: What keeps memory limits: `dmem`, `misc`, `lies` (sets none, and reports success), or `none`, as before R615.
    limits: str = "none"
    #: Bytes of each GPU that the processes of a cgroup use, by the name of its directory.
    limit_used: Mapping[str, int] = attrs.Factory(dict)

    def lines(self) -> list[str]:
        """The state file's lines, which nvml_stub.c describes."""
        pairs: dict[str, object] = {"driver_version": self.driver_version, "gpus": len(self.gpus)}
        pairs.update(process_surplus=self.process_surplus, stale_samples=int(self.stale_samples), limits=self.limits)
        for index, gpu in enumerate(self.gpus):
            pairs[f"gpu.{index}"] = gpu.uuid
            facts = attrs.asdict(gpu, filter=attrs.filters.exclude("number", "uuid"))
            pairs.update({f"{gpu.uuid}.{key}": _in_state(fact) for key, fact in facts.items()})
            for key, fact in facts.items():
                if isinstance(fact, tuple):
                    pairs.update({f"{gpu.uuid}.{key}.{n}": " ".join(map(str, entry)) for n, entry in enumerate(fact)})
            pairs.update({f"{gpu.uuid}.limit_used.{name}": used for name, used in self.limit_used.items()})
        pairs.update({f"call.{call}": answer for call, answer in self.calls.items()})
        pairs["events"] = len(self.events)
        for serial, event in enumerate(self.events, start=1):
            pairs[f"event.{serial}"] = f"{event.gpu.uuid} {event.type} {event.data}"
        return [f"{key}={value}\n" for key, value in pairs.items()]


class StubDriver:
    """A driver below `root`, where `open_library(root)` finds it. Each change is seen by the library's next call.

    `without` names functions that the library lacks, as older drivers do. Making a second one below the same `root`
    is an upgrade of the driver.
    """

    def __init__(self, root: Path, *, without: Iterable[str] = ()) -> None:
        self.root = root
        self.path = root / "lib64" / "libnvidia-ml.so.1"
        self.state = StubState()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write("calls", b"")
        self.set()
        # A copy with an inode of its own: the loader takes one inode for one library, and with it one state.
        self._write(self.path.name, _library(frozenset(without)))

    def set(self, **changes: Any) -> None:  # noqa: ANN401  # as the fields have it
        """Change parts of the StubState."""
        self.state = attrs.evolve(self.state, **changes)
        self._write("state", "".join(self.state.lines()).encode(errors="surrogateescape"))

    def gpus(self, number: int) -> tuple[StubGpu, ...]:
        """Have that many equal GPUs."""
        self.set(gpus=map(StubGpu, range(number)))
        return self.state.gpus

    def change(self, gpu: StubGpu, **changes: Any) -> StubGpu:  # noqa: ANN401
        """Change facts of one GPU; returns it as it is now."""
        changed = attrs.evolve(gpu, **changes)
        self.set(gpus=(changed if each.uuid == gpu.uuid else each for each in self.state.gpus))
        return changed

    def fail(self, function: str, code: int, gpu: StubGpu | None = None) -> None:
        """Have a function answer a code, for one GPU or always. The name without a variant's suffix is all variants."""
        self.set(calls={**self.state.calls, _call(function, gpu): code})

    def hang(self, function: str, gpu: StubGpu | None = None) -> None:
        """Have a function not return until it `works` again."""
        self.set(calls={**self.state.calls, _call(function, gpu): "hang"})

    def crash(self, function: str, gpu: StubGpu | None = None) -> None:
        """Have a function abort the process that calls it."""
        self.set(calls={**self.state.calls, _call(function, gpu): "crash"})

    def works(self, function: str, gpu: StubGpu | None = None) -> None:
        """Undo fail, hang or crash of the same function and GPU."""
        call = _call(function, gpu)
        self.set(calls={other: answer for other, answer in self.state.calls.items() if other != call})

    def xid(self, gpu: StubGpu, number: int) -> None:
        """Have an XID happen."""
        self.event(gpu, EventType.XID_CRITICAL, number)

    def event(self, gpu: StubGpu, event_type: int, data: int = 0) -> None:
        """Have an event happen. Event sets that are not registered for it by now never get it."""
        self.set(events=(*self.state.events, StubEvent(gpu, event_type, data)))

    def calls(self, function: str, gpu: StubGpu | None = None) -> int:
        """How often a function was called (any variant, unless a variant is named), by whatever process."""
        _call(function, gpu)
        return sum(
            function in (called, re.sub(r"_v\d$", "", called)) and (gpu is None or uuid == gpu.uuid)
            for called, _, uuid in (line.partition(" ") for line in self.call_log())
        )

    def call_log(self) -> list[str]:
        """Every call, in order: the function and, where it was for one GPU, its UUID."""
        return [line.strip() for line in (self.path.parent / "calls").read_text().splitlines()]

    def _write(self, name: str, content: bytes) -> None:
        """Replace a file beside the library in one step, with a modification time that no other version has."""
        now = time.time_ns()
        new = self.path.parent / f".{name}.{os.getpid()}.{now}"
        new.write_bytes(content)
        os.utime(new, ns=(now, now))
        new.replace(self.path.parent / name)


def _in_state(fact: str | int | tuple[object, ...] | None) -> str | int:
    if fact is None:
        return "none"
    if isinstance(fact, tuple):
        return len(fact)
    return fact if isinstance(fact, str) else int(fact)


def _call(function: str, gpu: StubGpu | None) -> str:
    if not any(function in (name, re.sub(r"_v\d$", "", name)) for name in FUNCTIONS):
        raise ValueError(f"{function} is not declared in {HEADER}")
    return f"{function}.{gpu.uuid}" if gpu else function


@functools.cache
def _object() -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "nvml_stub.o"
        command = ["cc", "-c", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{HEADER.parent}", str(SOURCE), "-o", str(target)]
        subprocess.run(command, check=True)
        return target.read_bytes()


@functools.cache
def _library(without: frozenset[str]) -> bytes:
    """The library, linked once per set of absent functions. The compiler is the slow part, so that runs but once."""
    if unknown := without - FUNCTIONS:
        raise ValueError(f"{sorted(unknown)} are not declared in {HEADER}")
    with tempfile.TemporaryDirectory() as scratch:
        unlinked, versions, target = (Path(scratch, name) for name in ("nvml_stub.o", "versions", "nvml_stub.so"))
        unlinked.write_bytes(_object())
        versions.write_text(f"{{ local: {' '.join(f'{name};' for name in sorted(without))} }};")
        script = [f"-Wl,--version-script={versions}"] if without else []
        command = ["cc", "-shared", "-Wl,-soname,libnvidia-ml.so.1", *script, str(unlinked), "-o", str(target), "-ldl"]
        subprocess.run(command, check=True)
        return target.read_bytes()
