"""The limits that sgpu has set, on disk, and their way to a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from virtual_clock import beside, real

from sgpu.driver.limit_file import LimitSender, load, save
from sgpu.driver.messages import decode_limits
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, Target, WantedLimit
from sgpu.node.enforcement import Enforcement
from sgpu.node.limits import WantedLimits

BOOT = "a-boot"


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A GPU and a cgroup that is there."""
    (tmp_path / "pod1").mkdir()
    return Target("GPU-a", str(tmp_path / "pod1"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "limits.json"


def make_anew(directory: Path) -> None:
    """Another directory of that name; the old one stays, so that its inode is not used again."""
    directory.rename(directory.with_name("old"))
    directory.mkdir()


@pytest.mark.parametrize(
    ("change", "known"),
    [
        pytest.param(lambda cgroup, file: None, True, id="as it was"),
        pytest.param(lambda cgroup, file: cgroup.rmdir(), False, id="gone"),
        pytest.param(lambda cgroup, file: make_anew(cgroup), False, id="another cgroup of that name"),
        pytest.param(lambda cgroup, file: file.write_text("{"), False, id="no record"),
        pytest.param(lambda cgroup, file: file.write_text("[]"), False, id="another record"),
        pytest.param(lambda cgroup, file: file.unlink(), False, id="no file"),
        pytest.param(
            lambda cgroup, file: file.write_text(file.read_text().replace(BOOT, "x")), False, id="another boot"
        ),
    ],
)
def test_load(target: Target, file: Path, change: Callable[[Path, Path], object], known: bool) -> None:
    """A limit is ours as long as its very cgroup is there."""
    save(file, BOOT, [target, Target("GPU-a", "/nowhere")])
    change(Path(target.cgroup), file)
    assert load(file, BOOT) == ((target,) if known else ())


class Sent:
    """A sender to a worker whose input is read here."""

    def __init__(self, file: Path | None) -> None:
        self.enforcement = Enforcement()
        self.sender = LimitSender(self.enforcement, file, BOOT)
        self.input, self._output = trio.testing.memory_stream_one_way_pair()

    async def next(self) -> tuple[list[WantedLimit], list[Target]]:
        return decode_limits(bytes(await self._output.receive_some(10_000)))


@asynccontextmanager
async def fed(file: Path | None) -> AsyncIterator[Sent]:
    sent = Sent(file)
    await sent.sender.load()
    async with beside(sent.sender.feed, sent.input):
        yield sent


@real
async def test_recorded_before_it_is_sent(target: Target, file: Path) -> None:
    """The record has a limit by the time that a worker gets it, and no longer once it is removed."""
    async with fed(file) as sent:
        sent.enforcement.want(WantedLimits({target: 5}))
        assert await sent.next() == ([WantedLimit(*target, 5)], [])
        assert load(file, BOOT) == (target,)
        sent.enforcement.answer([LimitAnswer(WantedLimit(*target, 5), LimitState.ENFORCED, 5)])
        assert await sent.next() == ([WantedLimit(*target, 5, ours=True)], [])
        sent.enforcement.want(WantedLimits())
        assert await sent.next() == ([WantedLimit(*target, None, ours=True)], [])
        sent.enforcement.answer([LimitAnswer(WantedLimit(*target, None), LimitState.REMOVED)])
        assert await sent.next() == ([], [target])
        assert load(file, BOOT) == ()


@real
async def test_only_what_changes(target: Target, file: Path) -> None:
    """Another limit is sent without those that were sent before; a new worker gets them all."""
    other = Target("GPU-b", target.cgroup)
    async with fed(file) as sent:
        sent.enforcement.want(WantedLimits({target: 5}))
        assert await sent.next() == ([WantedLimit(*target, 5)], [])
        sent.enforcement.want(WantedLimits({target: 5, other: 6}))
        assert await sent.next() == ([WantedLimit(*other, 6)], [])
        assert set(load(file, BOOT)) == {target, other}
        stream, received = trio.testing.memory_stream_one_way_pair()
        async with beside(sent.sender.feed, stream):
            new, _ = decode_limits(bytes(await received.receive_some(10_000)))
        assert len(new) == 2


@real
async def test_adopted(target: Target, file: Path) -> None:
    """What an earlier sgpu set is removed unless it is wanted."""
    save(file, BOOT, [target])
    async with fed(file) as sent:
        sent.enforcement.want(WantedLimits())
        assert await sent.next() == ([WantedLimit(*target, None, ours=True)], [])


@pytest.mark.parametrize("path", [None, Path("/proc/none/limits.json")], ids=["none", "not writable"])
@real
async def test_no_record(target: Target, path: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    """Limits are set without a record as well; one that can't be written is a warning."""
    async with fed(path) as sent:
        sent.enforcement.want(WantedLimits({target: 5}))
        assert await sent.next() == ([WantedLimit(*target, 5)], [])
    assert ("limits.json" in caplog.text) == (path is not None)
