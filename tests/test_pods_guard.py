"""The memory guard on real processes in real cgroups: whom it names, whom it ends, whom it spares."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from containers import STUBBORN, Containers, containers
from virtual_clock import real, until

from sgpu.lib.sizes import GIB
from sgpu.node.container import Container
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.gpu import Gpu
from sgpu.node.guard import SAMPLES, GuardPolicy, Sample
from sgpu.node.notices import Reason
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.pods import guard as guard_module
from sgpu.pods.guard import Guard, GuardOptions
from sgpu.pods.processes import find_owners

pytestmark = pytest.mark.process

RESOURCE, GPU = "example.com/gpu", "GPU-a"
BIG, SMALL = Container("team", "big", "main"), Container("team", "small", "main")
#: Seconds after which something that is due is taken not to come.
TIMEOUT = 20.0
Child = subprocess.Popen[str]


@attrs.define
class World:
    """A GPU of 40 GiB in four shares, of which BIG and SMALL have one each, and a guard that tolerates 1 GiB."""

    host: Containers
    guard: Guard
    actions: Counter[tuple[str, ...]]
    node: NodeState
    now: float = 0.0

    def look(self, memory: dict[Child, int], samples: int = SAMPLES) -> None:
        """Take samples in which these processes use so many GiB, of 38 in all."""
        uses = tuple(ProcessUse(child.pid, used * GIB, 0) for child, used in memory.items())
        figures = {GPU: Figures(40 * GIB, 2 * GIB, 0, uses)}
        owners = find_owners(self.host.places, [child.pid for child in memory], 0.0)
        self.node.usage.set_owners(figures, owners.containers)
        for _ in range(samples):
            self.now += 1
            self.guard.look(Sample(self.now + trio.current_time(), figures, owners))

    def counts(self) -> dict[str, int]:
        """How often the guard did what to whom."""
        return {f"{action} {pod}": count for (_, _, pod, _, action), count in self.actions.items()}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Containers]:
    with containers(tmp_path) as host:
        yield host


@pytest.fixture(autouse=True)
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Return what the guard has logged. What survives SIGKILL is given up soon."""
    monkeypatch.setattr(guard_module, "KILL_TIME", 0.2)
    with caplog.at_level(logging.INFO, "sgpu"):
        yield lambda: [record.getMessage() for record in caplog.records]


Messages = Callable[[], list[str]]


@asynccontextmanager
async def guarded(host: Containers, *, terminate: bool = True, grace: float = TIMEOUT) -> AsyncIterator[World]:
    node = NodeState(Policy(RESOURCE, 4), 1.0)
    node.set_gpus((Gpu(GPU, "T4", "0:3B:0.0", (), 40 * GIB),))
    node.set_holders({RESOURCE: {Share(GPU, 0): BIG, Share(GPU, 1): SMALL}})
    options = GuardOptions(GuardPolicy(0.9, 0.0, GIB, frozenset()), terminate, grace)
    actions: Counter[tuple[str, ...]] = Counter()
    async with trio.open_nursery() as nursery:
        yield World(host, Guard(options, host.places, node, actions, nursery), actions, node)


async def logged(messages: Messages, fact: str) -> None:
    """Wait for a message that has it."""
    await until(lambda: fact in messages()[-1])


@real
async def test_warn(host: Containers, messages: Messages) -> None:
    """Name an over-user once with all figures, in the log, the counter and the usage; touch nobody."""
    async with guarded(host, terminate=False) as world:
        big, small = host.start(BIG), host.start(SMALL)
        world.look({big: 20, small: 11}, SAMPLES + 3)
        exceeded = {use.pod: use.exceeded for use in world.node.usage.uses(GPU)}
        assert exceeded == {"big": 10 * GIB, "small": None}
        assert world.counts() == {"warn big": 1}
        (message,) = messages()
        facts = (GPU, "team/big", "main", "20.0 GiB", "10.0", "1.0", "38.0 of 40.0 GiB", "leaves it running")
        assert all(fact in message for fact in facts)
        world.guard.look(None)
        assert {use.exceeded for use in world.node.usage.uses(GPU)} == {None}
        world.node.set_holders(None)
        world.look({big: 20, small: 11})
        assert world.counts() == {"warn big": 1}
    assert big.poll() is small.poll() is None


@real
async def test_terminate(host: Containers, messages: Messages) -> None:
    """End the largest process of the over-user that is furthest above its part; then look again."""
    async with guarded(host) as world:
        first, second, small = host.start(BIG), host.start(BIG), host.start(SMALL)
        world.look({first: 2, second: 18, small: 16})
    assert second.wait(0) == -signal.SIGTERM
    assert first.poll() is small.poll() is None
    assert world.counts() == {"warn big": 1, "warn small": 1, "terminate big": 1}
    sent, ended = messages()[-2:]
    assert all(fact in sent for fact in (f"process {second.pid}", "18.0 GiB", "20.0 GiB", "SIGTERM", "20 s"))
    assert f"process {second.pid}" in ended


@pytest.mark.parametrize(
    "prepare",
    [lambda child: None, lambda child: os.kill(child.pid, signal.SIGSTOP)],
    ids=["ignores SIGTERM", "stopped"],
)
@real
async def test_kill(host: Containers, prepare: Callable[[Child], object]) -> None:
    """Send SIGKILL to what still runs after the grace."""
    async with guarded(host, grace=0.1) as world:
        big = host.start(BIG, *STUBBORN, ready=True)
        prepare(big)
        world.look({big: 20})
    assert big.wait(TIMEOUT) == -signal.SIGKILL
    assert world.counts() == {"warn big": 1, "terminate big": 1, "kill big": 1}
    notices = world.node.notices.take()
    assert [each.reason for each in notices] == [
        *(Reason.MEMORY_EXCEEDED, Reason.PROCESS_TERMINATED, Reason.PROCESS_KILLED)
    ]
    assert {(each.uuid, each.pod, each.container) for each in notices} == {(GPU, "team/big", "main")}
    assert "20.0 GiB" in notices[0].message


@pytest.mark.parametrize("used", [11, None], ids=["within its part", "unknown"])
@real
async def test_spared(host: Containers, messages: Messages, used: int | None) -> None:
    """Send no SIGKILL where the container no longer uses too much, or nobody knows."""
    async with guarded(host, grace=2) as world:
        big = host.start(BIG, *STUBBORN, ready=True)
        world.look({big: 20})
        await logged(messages, "sent SIGTERM")
        world.look({big: used}, 1) if used else world.guard.look(None)
    assert big.poll() is None
    assert "kill big" not in world.counts()
    assert "left alone" in messages()[-1]


@real
async def test_stuck(host: Containers, messages: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say once that a process survives SIGKILL, and leave it; end others on that GPU."""
    deliver = signal.pidfd_send_signal

    def send(descriptor: int, number: signal.Signals) -> None:
        deliver(descriptor, 0 if number == signal.SIGKILL else number)

    monkeypatch.setattr(signal, "pidfd_send_signal", send)
    async with guarded(host, grace=0.1) as world:
        big, small = host.start(BIG, *STUBBORN, ready=True), host.start(SMALL)
        world.look({big: 20})
        await logged(messages, "dmesg")
        world.look({big: 20})
        world.look({big: 20, small: 15})
    assert world.counts()["kill big"] == world.counts()["terminate small"] == 1
    assert sum("dmesg" in message for message in messages()) == 1
    assert small.wait(0) == -signal.SIGTERM


@real
async def test_refused(host: Containers, messages: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say once that signals are refused, however many processes there are, and count none."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    async with guarded(host) as world:
        big, small = host.start(BIG), host.start(SMALL)
        world.look({big: 20, small: 18})
        await logged(messages, "hostPID")
        world.look({big: 20, small: 18})
    assert world.counts() == {"warn big": 1, "warn small": 1}
    assert sum("hostPID" in message for message in messages()) == 1


@real
async def test_mps(host: Containers, messages: Messages) -> None:
    """Name an over-user on a GPU with an MPS server, and end nobody there."""
    async with guarded(host) as world:
        big = host.start(BIG)
        server = host.start(SMALL, "sh", "-c", "printf nvidia-cuda-mps > /proc/$$/comm; echo; read line", ready=True)
        world.look({big: 20, server: 18})
    assert world.counts() == {"warn big": 1}
    assert "MPS server" in messages()[-1]


@real
async def test_gone(host: Containers, messages: Messages) -> None:
    """Signal nobody where the process ended since the sample."""
    async with guarded(host) as world:
        big = host.start(BIG)
        world.look({big: 20})
        big.kill()
        big.wait()
    assert world.counts() == {"warn big": 1}
    assert "has ended" in messages()[-1]
