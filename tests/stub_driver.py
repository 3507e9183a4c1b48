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
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from uuid import NAMESPACE_OID, uuid4, uuid5

import attrs

from sgpu.driver.nvml import EventType

SOURCE: Final = Path(__file__).parent / "stub" / "nvml_stub.c"
HEADER: Final = Path(__file__).parent.parent / "proto" / "nvml" / "nvml.h"
#: Every function that the header declares.
FUNCTIONS: Final = frozenset(re.findall(r"\b(nvml\w+)\(", HEADER.read_text()))

GIB: Final = 1 << 30
MIB: Final = 1 << 20


#: The entry of an event or a process that is about no MIG instance.
NO_INSTANCE: Final = 0xFFFFFFFF
#: By card: its name, its memory in MiB, and of each profile the slices, the MiB and how many there can be. The H200's
#: are those of a real one, the others' those of NVIDIA's tables.
CARDS: Final = {
    "A100": ("NVIDIA A100-SXM4-40GB", 40960, {"1g.5gb": (1, 4864, 7), "1g.5gb+me": (1, 4864, 1),
             "1g.10gb": (1, 9856, 4), "2g.10gb": (2, 9856, 3), "3g.20gb": (3, 19968, 2), "4g.20gb": (4, 19968, 1),
             "7g.40gb": (7, 40192, 1)}),
    "A30": ("NVIDIA A30", 24576, {"1g.6gb": (1, 5836, 4), "1g.6gb+me": (1, 5836, 1), "2g.12gb": (2, 11672, 2),
            "2g.12gb+me": (2, 11672, 1), "4g.24gb": (4, 23344, 1)}),
    "H100": ("NVIDIA H100 80GB HBM3", 81920, {"1g.10gb": (1, 10240, 7), "1g.10gb+me": (1, 10240, 1),
             "1g.20gb": (1, 20480, 4), "2g.20gb": (2, 20480, 3), "3g.40gb": (3, 40960, 2), "4g.40gb": (4, 40960, 1),
             "7g.80gb": (7, 81920, 1)}),
    "H200": ("NVIDIA H200", 143771, {"1g.18gb": (1, 16384, 7), "1g.18gb+me": (1, 16384, 1), "1g.35gb": (1, 33280, 4),
             "2g.35gb": (2, 33280, 3), "3g.71gb": (3, 71424, 2), "4g.71gb": (4, 71424, 1), "7g.141gb": (7, 143360, 1)}),
    "B200": ("NVIDIA B200", 184320, {"1g.23gb": (1, 23552, 7), "1g.23gb+me": (1, 23552, 1), "1g.45gb": (1, 46080, 4),
             "2g.45gb": (2, 46080, 3), "3g.90gb": (3, 92160, 2), "4g.90gb": (4, 92160, 1), "7g.180gb": (7, 184320, 1)}),
}  # fmt: skip
#: Slices of a card, which its instances divide.
SLICES: Final = 7


@attrs.frozen
class StubInstance:
    """A MIG instance. `index` is that among the GPU's instances, which can have holes."""

    index: int
    uuid: str
    name: str
    gpu_instance: int
    compute_instance: int = 0
    slices: int = 1
    total: int = GIB
    used: int = 0
    reserved: int = 0
    utilization: int | None = None
    samples: None = None
    compute: tuple[tuple[int, int], ...] | None = ()
    graphics: tuple[tuple[int, int], ...] | None = ()
    mps: tuple[tuple[int, int], ...] | None = ()

    @property
    def profile(self) -> str:
        return self.name.rpartition(" ")[2]


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
    # MIG: 0 off, 1 on, None: not supported; what it will be after a reset; and how many instances there can be.
    mig_mode: int | None = None
    mig_pending: int = attrs.Factory(lambda self: self.mig_mode or 0, takes_self=True)
    mig_max: int = SLICES
    instances: tuple[StubInstance, ...] = ()


def mig_gpu(number: int = 0, card: str = "A100", **facts: Any) -> StubGpu:  # noqa: ANN401  # as the fields have it
    """Return a card in MIG mode, without instances."""
    name, memory, _ = CARDS[card]
    events = EventType.XID_CRITICAL | EventType.MIG_CONFIG_CHANGE
    mig = {"name": name, "total": memory * MIB, "mig_mode": 1, "utilization": None, "samples": None}
    return StubGpu(number, **{**mig, "event_types": events, "recovery_action": 0, **facts})


@attrs.frozen
class StubEvent:
    """One event, delivered to every event set that is registered for it when it happens."""

    gpu: StubGpu
    type: int
    data: int = 0
    gpu_instance: int = NO_INSTANCE
    compute_instance: int = NO_INSTANCE


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
    #: Where the device nodes are that nvmlInit opens, as far as it may; without, there are none.
    dev: str = ""
    #: What keeps memory limits: `dmem`, `misc`, `lies` (sets none, and reports success), or `none`, as before R615.
    limits: str = "none"
    #: Bytes of each GPU that the processes of a cgroup use, by the name of its directory.
    limit_used: Mapping[str, int] = attrs.Factory(dict)

    def lines(self) -> list[str]:
        """The state file's lines, which nvml_stub.c describes."""
        pairs: dict[str, object] = {"driver_version": self.driver_version, "gpus": len(self.gpus)}
        pairs.update(process_surplus=self.process_surplus, stale_samples=int(self.stale_samples), limits=self.limits)
        if self.dev:
            pairs["dev"] = self.dev
        for index, gpu in enumerate(self.gpus):
            pairs[f"gpu.{index}"] = gpu.uuid
            pairs.update(_facts(gpu))
            for instance in gpu.instances:
                pairs[f"{gpu.uuid}.mig.{instance.index}"] = instance.uuid
                pairs.update({f"{instance.uuid}.parent": gpu.uuid, **_facts(instance)})
            pairs.update({f"{gpu.uuid}.limit_used.{name}": used for name, used in self.limit_used.items()})
        pairs.update({f"call.{call}": answer for call, answer in self.calls.items()})
        pairs["events"] = len(self.events)
        for serial, event in enumerate(self.events, start=1):
            ids = f"{event.gpu_instance} {event.compute_instance}"
            pairs[f"event.{serial}"] = f"{event.gpu.uuid} {event.type} {event.data} {ids}"
        return [f"{key}={value}\n" for key, value in pairs.items()]


class StubDriver:
    """A driver below `root`, where `open_library(root)` finds it. Each change is seen by the library's next call.

    `without` names functions that the library lacks, as older drivers do. Making a second one below the same `root`
    is an upgrade of the driver.
    """

    def __init__(self, root: Path, *, without: Iterable[str] = (), **state: Any) -> None:  # noqa: ANN401  # as `set`
        self.root = root
        self.path = root / "lib64" / "libnvidia-ml.so.1"
        self.state = attrs.evolve(StubState(), **state)
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

    def create(self, gpu: StubGpu, profile: str, **facts: Any) -> StubInstance:  # noqa: ANN401
        """Create a MIG instance, which no other ever has the UUID of, and have the event of it happen."""
        current = self.gpu(gpu.uuid)
        name, _, profiles = next(card for card in CARDS.values() if card[0] == current.name)
        slices, memory, _ = profiles[profile]
        indices = {each.index for each in current.instances}
        taken = {each.gpu_instance for each in current.instances}
        instance = StubInstance(
            **{
                "index": next(index for index in range(current.mig_max) if index not in indices),
                "uuid": f"MIG-{uuid4()}",
                "name": f"{name} MIG {profile}",
                "gpu_instance": next(number for number in range(1, 15) if number not in taken),
                "slices": slices,
                "total": memory * MIB,
                **facts,
            }
        )
        self._reconfigure(current, (*current.instances, instance))
        return instance

    def destroy(self, gpu: StubGpu, *instances: StubInstance) -> None:
        """Destroy these MIG instances, all if none is named, and have the event of it happen."""
        current = self.gpu(gpu.uuid)
        gone = {instance.uuid for instance in instances or current.instances}
        self._reconfigure(current, tuple(each for each in current.instances if each.uuid not in gone))

    def change_instance(self, gpu: StubGpu, instance: StubInstance, **changes: Any) -> StubInstance:  # noqa: ANN401
        """Change facts of an instance; returns it as it is now."""
        changed = attrs.evolve(instance, **changes)
        others = self.gpu(gpu.uuid).instances
        self.change(self.gpu(gpu.uuid), instances=tuple(changed if o.uuid == instance.uuid else o for o in others))
        return changed

    def gpu(self, uuid: str) -> StubGpu:
        """Return a GPU as it is now."""
        return next(gpu for gpu in self.state.gpus if gpu.uuid == uuid)

    def _reconfigure(self, gpu: StubGpu, instances: tuple[StubInstance, ...]) -> None:
        self.change(gpu, instances=instances)
        self.event(gpu, EventType.MIG_CONFIG_CHANGE)

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

    def xid(self, gpu: StubGpu, number: int, instance: StubInstance | None = None) -> None:
        """Have an XID happen, of a MIG instance where one is named."""
        ids = (instance.gpu_instance, instance.compute_instance) if instance else ()
        self.event(gpu, EventType.XID_CRITICAL, number, *ids)

    def event(self, gpu: StubGpu, event_type: int, data: int = 0, *ids: int) -> None:
        """Have an event happen. Event sets that are not registered for it by now never get it."""
        self.set(events=(*self.state.events, StubEvent(gpu, event_type, data, *ids)))

    def calls(self, function: str, gpu: StubGpu | None = None) -> int:
        """How often a function was called (any variant, unless a variant is named), by whatever process."""
        _call(function, gpu)
        return sum(
            number
            for line, number in Counter(self.call_log()).items()  # thousands of lines, of few kinds
            for called, _, uuid in [line.partition(" ")]
            if function in (called, re.sub(r"_v\d$", "", called)) and (gpu is None or uuid == gpu.uuid)
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


def _facts(owner: StubGpu | StubInstance) -> dict[str, object]:
    """The lines of one GPU or instance."""
    pairs: dict[str, object] = {}
    for key, fact in attrs.asdict(owner, filter=attrs.filters.exclude("number", "uuid", "instances")).items():
        pairs[f"{owner.uuid}.{key}"] = _in_state(fact)
        if isinstance(fact, tuple):
            pairs.update({f"{owner.uuid}.{key}.{n}": " ".join(map(str, entry)) for n, entry in enumerate(fact)})
    return pairs


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
