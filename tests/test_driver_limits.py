"""Setting limits and reading them back, with the stub library loaded into this process."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from stub_driver import GIB, StubDriver
from watching import wait_until

from sgpu.driver import limits
from sgpu.driver.calls import Calls, Part, create
from sgpu.driver.limits import LimitSetter, limit_setter
from sgpu.driver.messages import LimitReport, Message
from sgpu.driver.nvml import Code, open_library
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, WantedLimit

#: Seconds after which something that is due is taken not to come.
TIMEOUT = 30.0


class World:
    """A driver with one GPU, a cgroup, and a setter that was told of the GPU."""

    def __init__(
        self, root: Path, driver: StubDriver, setter: LimitSetter, messages: queue.Queue[Message], calls: Calls
    ) -> None:
        self.calls = calls
        self.cgroup = root / "pod1"
        self.driver = driver
        self.setter = setter
        self.messages = messages
        (self.gpu,) = driver.state.gpus

    def wanted(self, hard: int | None = GIB, *, ours: bool = False) -> WantedLimit:
        return WantedLimit(self.gpu.uuid, str(self.cgroup), hard, ours)

    def want(self, *table: WantedLimit) -> list[LimitAnswer]:
        """The answers to this table."""
        self.setter.want({wanted.target: wanted for wanted in table})
        return self.answers()

    def answers(self) -> list[LimitAnswer]:
        while not isinstance(message := self.messages.get(timeout=TIMEOUT), LimitReport):
            pass
        return list(message.answers)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    driver = StubDriver(tmp_path)
    driver.gpus(1)
    driver.set(limits="dmem", limit_used={"pod1": 7})
    (tmp_path / "pod1").mkdir()
    messages = queue.Queue[Message]()
    with closing(create()) as calls, open_library(tmp_path) as library:
        with limit_setter(library, messages.put, calls) as setter:
            setter.register(driver.state.gpus[0].uuid, library.handle(0))
            yield World(tmp_path, driver, setter, messages, calls)


def test_enforced(world: World) -> None:
    """A limit counts as enforced once it is read back; one that is as wanted is not set again."""
    enforced = [LimitAnswer(world.wanted(), LimitState.ENFORCED, GIB, 7)]
    assert world.want(world.wanted()) == enforced
    world.setter.check()
    assert world.answers() == enforced
    assert world.driver.calls("nvmlDeviceSetMemoryLimits") == 1


def test_only_what_is_new(world: World) -> None:
    """Another table costs calls only for what is new in it: a container waits for one limit, not for all."""
    other = world.cgroup.with_name("pod2")
    other.mkdir()
    new = WantedLimit(world.gpu.uuid, str(other), GIB)
    world.want(world.wanted())
    calls = world.driver.calls("nvmlDeviceGetMemoryLimits")
    (answer,) = world.want(world.wanted(ours=True), new)
    assert answer.wanted == new
    assert world.driver.calls("nvmlDeviceGetMemoryLimits") == calls + 2


def test_new_ones_first(world: World) -> None:
    """What is new while all are read again comes first; what was read of a limit that has changed since is not told."""
    one, two, new = (
        WantedLimit(world.gpu.uuid, str(world.cgroup.with_name(name)), GIB) for name in ("pod1", "pod2", "pod3")
    )
    for name in ("pod2", "pod3"):
        world.cgroup.with_name(name).mkdir()
    world.want(one, two)
    world.driver.hang("nvmlDeviceGetMemoryLimits")
    world.setter.check()
    wait_until(lambda: world.calls.current(Part.LIMITS), "the first one is read")
    larger = one._replace(hard=2 * GIB)
    world.setter.want({wanted.target: wanted for wanted in (larger, two, new)})
    world.driver.works("nvmlDeviceGetMemoryLimits")
    assert {answer.wanted for answer in world.answers()} == {larger, new}
    assert [answer.wanted for answer in world.answers()] == [two]


def test_checked_again(world: World) -> None:
    """A check reads back what is used now, and sets what the driver has lost."""
    world.want(world.wanted())
    for file in world.driver.path.parent.glob("limit.*"):
        file.unlink()
    world.driver.set(limit_used={"pod1": 9})
    world.setter.check()
    assert world.answers() == [LimitAnswer(world.wanted(), LimitState.ENFORCED, GIB, 9)]


def test_changed_and_removed(world: World) -> None:
    """A limit that this process has set is replaced, and removed when none is wanted."""
    world.want(world.wanted())
    assert world.want(world.wanted(2 * GIB)) == [LimitAnswer(world.wanted(2 * GIB), LimitState.ENFORCED, 2 * GIB, 7)]
    assert world.want(world.wanted(None)) == [LimitAnswer(world.wanted(None), LimitState.REMOVED)]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
def test_set_before(world: World, tmp_path: Path, ours: bool) -> None:
    """A limit that is there already is replaced only if it is ours."""
    with open_library(tmp_path) as library:
        library.set_memory_limit(library.handle(0), str(world.cgroup), 2 * GIB)
    (answer,) = world.want(world.wanted(ours=ours))
    assert (answer.state, answer.hard) == ((LimitState.ENFORCED, GIB) if ours else (LimitState.FOREIGN, 2 * GIB))


@pytest.mark.parametrize(
    ("backend", "fails", "fact"),
    [
        pytest.param("lies", {}, "reads back no limit", id="a backend that lies"),
        pytest.param("none", {}, "does not support", id="no backend"),
        pytest.param("misc", {"nvmlDeviceSetMemoryLimits": Code.NO_PERMISSION}, "privileged", id="no permission"),
        pytest.param("misc", {"nvmlDeviceSetMemoryLimits": Code.INVALID_ARGUMENT}, "NVML error 2", id="invalid"),
        pytest.param("misc", {"nvmlDeviceGetMemoryLimits": 999}, "NVML error 999", id="unknown error"),
        pytest.param("dmem", {"nvmlDeviceSetMemoryLimits": Code.NOT_FOUND}, "+dmem", id="no controller on the way"),
    ],
)
def test_refused(world: World, tmp_path: Path, backend: str, fails: dict[str, int], fact: str) -> None:
    """A limit that can't be read back is refused, with the reason."""
    (tmp_path / "cgroup.controllers").write_text("cpu dmem memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    world.driver.set(limits=backend)
    for function, code in fails.items():
        world.driver.fail(function, code)
    (answer,) = world.want(world.wanted())
    assert answer.state is LimitState.REFUSED
    assert fact in answer.reason


def test_older_driver(tmp_path: Path) -> None:
    """A library that lacks the calls says which driver has them."""
    driver = StubDriver(tmp_path, without=["nvmlDeviceSetMemoryLimits_v1", "nvmlDeviceGetMemoryLimits_v1"])
    (gpu,) = driver.gpus(1)
    messages = queue.Queue[Message]()
    with closing(create()) as calls, open_library(tmp_path) as library:
        with limit_setter(library, messages.put, calls) as setter:
            setter.register(gpu.uuid, library.handle(0))
            wanted = WantedLimit(gpu.uuid, str(tmp_path), GIB)
            setter.want({wanted.target: wanted})
            report = messages.get(timeout=TIMEOUT)
            assert calls.current(Part.LIMITS) is None
    assert isinstance(report, LimitReport)
    assert "R615" in report.answers[0].reason


def test_gone(world: World) -> None:
    """A cgroup that is gone has no limit; a GPU that is not listed has none yet."""
    world.cgroup.rmdir()
    stranger = WantedLimit("GPU-x", "/x", GIB)
    answers = world.want(world.wanted(), stranger)
    assert {answer.wanted.uuid: answer.state for answer in answers} == {
        world.gpu.uuid: LimitState.REMOVED,
        "GPU-x": LimitState.PENDING,
    }


def test_nothing_to_do(world: World) -> None:
    """Without limits there is no thread, and no report."""
    world.setter.want({})
    world.setter.check()
    assert (world.setter.ident, world.messages.empty()) == (None, True)


def test_hang(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that does not return is written down, and ends the process when the library is to be closed."""
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(limits, "END_TIMEOUT", 0.05)
    world.driver.hang("nvmlDeviceGetMemoryLimits")
    world.setter.want({world.wanted().target: world.wanted()})
    wait_until(lambda: world.calls.current(Part.LIMITS), "it is written down")
    call = world.calls.current(Part.LIMITS)
    assert call
    assert call.uuid == world.gpu.uuid
    world.setter.end()
    assert ended.is_set()
    world.driver.works("nvmlDeviceGetMemoryLimits")
    world.setter.join(TIMEOUT)
