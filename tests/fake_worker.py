"""The driver's process, played by tasks on trio's virtual clock. Knows what a parent sees of it, and no driver."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing

from sgpu.driver import calls
from sgpu.driver.calls import Calls, Part
from sgpu.driver.messages import (
    GpuReport,
    LimitReport,
    Message,
    NotReady,
    Report,
    WorkerConfig,
    decode_config,
    encode,
)

#: Seconds between polls, and that a call may take.
INTERVAL: Final = 5.0
DEADLINE: Final = 20.0
CONFIG: Final = WorkerConfig("/host", "/dev", "/sys", INTERVAL)
#: More starts than any test needs.
TOO_MANY: Final = 100


@attrs.frozen
class CallStarted:
    """What it writes down before it calls: about which GPU (empty: the driver)."""

    uuid: str
    part: Part = Part.POLL


#: What a worker says and does: messages, text that is none, and calls.
Said = Message | bytes | CallStarted


def report(*uuids: str, skipped: Sequence[str] = (), problems: Sequence[str] = (), error: str = "") -> Report:
    """A poll that found these GPUs, each with this error."""
    gpus = tuple(GpuReport(uuid=uuid, name="", pci_bus_id="", device_nodes=(), error=error) for uuid in uuids)
    return Report(gpus, tuple(problems), tuple(skipped), "550.1", "/l/nvml.so", order=(*uuids, *skipped))


class FakeWorker:
    """As much of a trio.Process as is used. A `stuck` one does not die when it is killed."""

    def __init__(self, command: list[str], options: dict[str, Any]) -> None:
        self.command = command
        self.options = options
        self.config = decode_config(command[-2])
        self._calls = Calls(int(command[-1]))
        self.started_at = trio.current_time()
        self.returncode: int | None = None
        self.killed = False
        self.stuck = False
        self.scope = trio.CancelScope()
        self._output, self.stdout = trio.testing.memory_stream_one_way_pair()
        self.stdin, self.input = trio.testing.memory_stream_one_way_pair()
        self._died = trio.Event()

    async def emit(self, *said: Said) -> None:
        """Write down calls, and messages to standard output, each in a piece of its own."""
        for each in said:
            if isinstance(each, CallStarted):
                self._calls.begin(each.part, each.uuid)
                continue
            if isinstance(each, (Report, NotReady, LimitReport)):
                self._calls.end(Part.LIMITS if isinstance(each, LimitReport) else Part.POLL)
            await self._output.send_all(each if isinstance(each, bytes) else encode(each))

    async def close(self) -> None:
        """Close standard output."""
        await self._output.aclose()

    def die(self, code: int) -> None:
        """Be gone."""
        self.returncode = code
        self._died.set()

    def kill(self) -> None:
        """As trio.Process has it: a process that is gone can be killed too."""
        self.killed = True
        if self.returncode is None and not self.stuck:
            self.scope.cancel()
            self.die(-9)

    async def wait(self) -> int | None:
        """Wait until it is gone."""
        await self._died.wait()
        return self.returncode

    async def check_released(self) -> None:
        """Fail unless it was killed and its pipe is closed."""
        assert self.killed
        with pytest.raises(trio.ClosedResourceError):
            await self.stdout.receive_some(1)


Behavior = Callable[[FakeWorker], Awaitable[object]]


class FakeWorkers:
    """Stands in for `trio.lowlevel.open_process`: the n-th worker has the n-th behavior, later ones the last.

    Single polls (`once`) are counted by themselves, and have behaviors of their own.
    """

    def __init__(self, *behaviors: Behavior, trials: Sequence[Behavior] = ()) -> None:
        self.behaviors = behaviors
        self.trial_behaviors = trials or (silent,)
        self.all: list[FakeWorker] = []
        self.trials: list[FakeWorker] = []

    def install(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start these from now on; they run in the nursery."""
        monkeypatch.setattr(trio.lowlevel, "open_process", partial(self._open, nursery))
        monkeypatch.setattr(calls, "now", lambda: int(1e9 * trio.current_time()))

    async def _open(self, nursery: trio.Nursery, command: list[str], **options: Any) -> FakeWorker:  # noqa: ANN401
        await trio.lowlevel.checkpoint()
        assert len(self.all) < TOO_MANY, "workers are started without end"
        worker = FakeWorker(command, options)
        behaviors = self.trial_behaviors if worker.config.once else self.behaviors
        others = self.trials if worker.config.once else self.all
        behavior = behaviors[min(len(others), len(behaviors) - 1)]
        others.append(worker)
        nursery.start_soon(self._run, behavior, worker)
        return worker

    async def _run(self, behavior: Behavior, worker: FakeWorker) -> None:
        with worker.scope:
            await behavior(worker)
            await trio.sleep_forever()

    def gaps(self) -> list[float]:
        """Seconds between the starts."""
        return [after.started_at - before.started_at for before, after in itertools.pairwise(self.all)]


async def healthy(worker: FakeWorker) -> None:
    """Answers for one GPU, poll after poll."""
    await worker.emit(CallStarted(""), CallStarted("GPU-a"), report("GPU-a"))
    while True:
        await trio.sleep(INTERVAL)
        await worker.emit(report("GPU-a"))


async def silent(worker: FakeWorker) -> None:
    """Starts and says nothing."""


def emits(*messages: Said, every: float = 0.0) -> Behavior:
    """Emits that and nothing more, or the last again and again."""

    async def behavior(worker: FakeWorker) -> None:
        await worker.emit(*messages)
        while every:
            await trio.sleep(every)
            await worker.emit(messages[-1])

    return behavior


def exits(code: int, *messages: Said) -> Behavior:
    """Emits that and exits."""

    async def behavior(worker: FakeWorker) -> None:
        await worker.emit(*messages)
        worker.die(code)
        await worker.close()

    return behavior


def closes(*messages: Said, code: int | None = None, after: float = 0.0) -> Behavior:
    """Emits that, closes its pipe, and exits later or never."""

    async def behavior(worker: FakeWorker) -> None:
        await worker.emit(*messages)
        await worker.close()
        await trio.sleep(after)
        if code is not None:
            worker.die(code)

    return behavior


def gets_stuck(*messages: Said) -> Behavior:
    """Emits that and is then stuck in the kernel for good."""

    async def behavior(worker: FakeWorker) -> None:
        worker.stuck = True
        await worker.emit(*messages)

    return behavior
