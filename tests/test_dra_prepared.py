"""Claims are prepared and unprepared in any order, and this process can end between any two steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import trio
from dra_claims import NODE, RESOURCE, claim, result, sharing
from hypothesis import given
from hypothesis import strategies as st
from virtual_clock import real

from sgpu.dra import cdi, checkpoint
from sgpu.dra.claims import read_claim
from sgpu.dra.prepared import Places, PreparedClaims
from sgpu.driver.simulated import simulated_gpus
from sgpu.node.edits import AllocationOptions, HostPaths
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState

GPUS = simulated_gpus(2)
OPTIONS = AllocationOptions(HostPaths("/host/nvidia", "/usr/local/nvidia", "/dev"))
UIDS = ("u-0", "u-1")


class CrashError(Exception):
    """The process ends here."""


class World:
    """A node whose sgpu is killed and started again."""

    def __init__(self, root: Path) -> None:
        self.places = Places(root / "plugin", root / "cdi")
        self.places.cdi.mkdir()
        self.boot = 0

    async def start(self) -> None:
        self.node = NodeState(Policy(RESOURCE, 4), 5, clock=lambda: 0.0)
        self.claims = PreparedClaims(self.node, self.places, f"boot-{self.boot}", OPTIONS)
        await self.claims.load()
        self.node.set_gpus(GPUS)

    async def reboot(self, *, new_boot: bool) -> None:
        """`/run` is empty, and the checkpoint's directory is not. A node in a container keeps the id of the boot."""
        for path in self.places.cdi.iterdir():
            path.unlink()
        self.boot += new_boot
        await self.start()

    async def prepare(self, uid: str) -> None:
        await self.claims.prepare(read_claim(claim(result(GPUS[0].uuid, f"s-{uid}"), uid=uid), uid, NODE))

    @property
    def files(self) -> set[str]:
        return {path.stem.rpartition("_")[2] for path in self.places.cdi.glob("*.json")}


def crash_at(number: int) -> Callable[[], None]:
    """Return what is called before and after each change on disk, and ends the process at one of these calls."""
    calls = iter(range(1000))

    def step() -> None:
        if next(calls) == number:
            raise CrashError

    return step


#: What happens, to which claim, and after how many steps the process ends; mostly later than all of them.
STEPS = st.tuples(
    st.sampled_from(("prepare", "prepare", "unprepare", "restart", "reboot", "wipe")),
    st.sampled_from(UIDS),
    st.sampled_from((0, 1, 2, 3, 9, 9, 9, 9)),
)


@given(st.lists(STEPS, min_size=3, max_size=15))
def test_any_order(steps: list[tuple[str, str, int]]) -> None:
    """Whatever came before and wherever it stopped: a claim that was answered as prepared has its file and shares of
    its own, also after a restart; one that was unprepared has nothing.
    """

    async def check(root: Path) -> None:
        world = World(root)
        await world.start()
        answered: dict[str, bool] = {}
        for what, uid, crash in steps:
            with pytest.MonkeyPatch.context() as patch:
                _crash_between(patch, crash_at(crash))
                try:
                    if what == "prepare":
                        answered.pop(uid, None)  # until it is answered, it may be either
                        await world.prepare(uid)
                        answered[uid] = True
                    elif what == "unprepare":
                        answered.pop(uid, None)
                        await world.claims.unprepare(uid)
                        answered[uid] = False
                except CrashError:
                    what = "restart"
            if what == "restart":
                await world.start()
            elif what in ("reboot", "wipe"):
                await world.reboot(new_boot=what == "reboot")
                answered = {known: False for known, prepared in answered.items() if not prepared}
            for known, prepared in answered.items():
                assert (known in world.node.claims) is prepared
                assert (known in world.files) is prepared
            shares = [share for each in world.node.claims.values() for unit in each.units for share in unit.shares]
            assert len(shares) == len(set(shares))
        for uid in UIDS:  # as the kubelet does in the end
            await world.claims.unprepare(uid)
        assert (world.node.claims, world.files) == ({}, set())

    with tempfile.TemporaryDirectory() as directory:
        trio.run(check, Path(directory))


def _crash_between(patch: pytest.MonkeyPatch, step: Callable[[], None]) -> None:
    def wrap(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object) -> object:
            step()
            done = call(*arguments)
            step()
            return done

        return wrapped

    for module, name in ((checkpoint, "save"), (cdi, "write"), (cdi, "remove")):
        patch.setattr(module, name, wrap(getattr(module, name)))


async def prepared(
    root: Path, *results: dict[str, object], config: tuple[dict[str, object], ...] = ()
) -> list[list[str]]:
    """The variables of each device, sorted."""
    world = World(root)
    await world.start()
    await world.claims.prepare(read_claim(claim(*results, config=config), "u-1", NODE))
    devices = json.loads(cdi.file(root / "cdi", "u-1").read_text())["devices"]
    return [sorted(each["containerEdits"]["env"]) for each in devices]


@real
async def test_environment(tmp_path: Path) -> None:
    """The claim's memory, its own variables, and the node's fair part where it names none."""
    name = GPUS[0].uuid.upper().replace("-", "_")
    (env,) = await prepared(
        tmp_path,
        result(GPUS[0].uuid, consumedCapacity={"shares": "2", "memory": "4Gi"}),
        config=(sharing(environment={"A": "b"}),),
    )
    assert env == [
        "A=b",
        "NVIDIA_VISIBLE_DEVICES=void",
        f"SGPU_GPU_UUIDS={GPUS[0].uuid}",
        f"SGPU_MEMORY_BYTES={4 << 30}",
        f"SGPU_MEMORY_BYTES_{name}={4 << 30}",
        "SGPU_SHARES=2",
        f"SGPU_SHARES_{name}=2",
        "SGPU_SIMULATED=1",
    ]


@pytest.mark.parametrize(
    ("config", "memory"),
    [((), 4 << 30), ((sharing("FromClass", memoryLimit="Off"),), 16 << 30)],
    ids=["fair", "off"],
)
@real
async def test_memory(tmp_path: Path, config: tuple[dict[str, object], ...], memory: int) -> None:
    """Without an amount it is the fair part, and without a limit all of it."""
    (env,) = await prepared(tmp_path, result(GPUS[0].uuid), config=config)
    assert f"SGPU_MEMORY_BYTES={memory}" in env


@real
async def test_several_and_admin(tmp_path: Path) -> None:
    """No sums where a container may get one device of several, and no amount where none is taken."""
    admin = result(GPUS[1].uuid, adminAccess=True, shareID=None, consumedCapacity=None)
    first, second = await prepared(tmp_path, result(GPUS[0].uuid), admin)
    assert not any(each.startswith("SGPU_SHARES=") for each in (*first, *second))
    assert not any("MEMORY" in each for each in second)


@real
async def test_unknown_claims_keep_their_files(tmp_path: Path) -> None:
    """Where the checkpoint is a newer sgpu's, files of claims that it has are in use."""
    world = World(tmp_path)
    await world.start()
    await world.prepare("u-1")
    (world.places.plugin / checkpoint.NAME).write_text('{"version": 99}')
    await world.start()
    assert (world.node.claims, world.files) == ({}, {"u-1"})
    await world.claims.unprepare("u-1")
    assert world.files == set()


@real
async def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that can't be recorded is not prepared."""

    def fail(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    world = World(tmp_path)
    await world.start()
    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(OSError, match="No space"):
        await world.prepare("u-1")
    assert (world.node.claims, world.files) == ({}, set())
