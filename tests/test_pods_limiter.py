"""The limits that are wanted, as pods and their containers come and go on a node of files."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from node import RESOURCE
from virtual_clock import beside, real

from sgpu.lib.concurrency import wait_until
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, Target, WantedLimit
from sgpu.node.claims import ClaimedUnit, Pod, PreparedClaim
from sgpu.node.container import Container
from sgpu.node.gpu import Gpu
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.pods.limiter import LimitOptions, limit_containers

MIB = 1 << 20
UID = "0c1d2e3f-4a5b-6c7d-8e9f-001122334455"
ID = "ab" * 32
SHARE = Share("GPU-a", 0)


@attrs.frozen
class World:
    """A node with one GPU of 10 shares of 100 MiB, a cgroup tree, the kubelet's checkpoint and log links."""

    root: Path
    node: NodeState

    @property
    def pod(self) -> Path:
        return self.root / f"cgroup/kubepods/burstable/pod{UID}"

    @property
    def options(self) -> LimitOptions:
        # Seldom, so that a test that waits for a look that nobody asked for fails.
        return LimitOptions(self.root / "cgroup", self.root / "plugins", self.root / "logs", interval=3600)

    def allocate(self, *shares: Share, container: str = "main", resource: str = RESOURCE) -> None:
        """As the kubelet writes it: in one step."""
        ids = {"0": list(map(str, shares))}
        entry = {"PodUID": UID, "ContainerName": container, "ResourceName": resource, "DeviceIDs": ids}
        new = self.root / "checkpoint"
        new.write_text(json.dumps({"Data": {"PodDeviceEntries": [entry], "RegisteredDevices": {}}}))
        new.rename(self.root / "plugins/kubelet_internal_checkpoint")

    def wanted(self) -> dict[str, int]:
        """MiB by the cgroup's name."""
        return {Path(target.cgroup).name: hard // MIB for target, hard in self.node.enforcement.wanted.hard.items()}

    async def wait_wanted(self, **sizes: int) -> None:
        """Wait for these limits: of the pod, and of its one container."""
        named = {{"pod": self.pod.name, "container": ID}[name]: size for name, size in sizes.items()}
        await wait_until(lambda: self.wanted() == named, self.node.enforcement.answered)


@pytest.fixture
def world(tmp_path: Path) -> World:
    for name in ("cgroup/kubepods/burstable", "plugins", "logs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cgroup/cgroup.controllers").touch()
    node = NodeState(Policy(RESOURCE, 10, limit_factor=1), interval=5)
    node.set_gpus((Gpu("GPU-a", "T4", "0:3B:0.0", (), 1000 * MIB),))
    return World(tmp_path, node)


@asynccontextmanager
async def limited(world: World) -> AsyncIterator[None]:
    async with beside(limit_containers, world.options, world.node):
        yield


@real
async def test_a_pod_from_its_allocation_to_its_end(world: World) -> None:
    """Limit the pod as soon as its cgroup is there, its container likewise; the log link tells its name."""
    async with limited(world):
        world.allocate(SHARE, Share("GPU-a", 1))
        world.pod.mkdir()
        await world.wait_wanted(pod=200)
        (world.pod / ID).mkdir()
        await world.wait_wanted(pod=200, container=200)
        assert not world.node.enforcement.wanted.containers
        (world.root / f"logs/trainer_team_main-{ID}.log").touch()
        (world.root / "plugins/kubelet_internal_checkpoint").write_text("{}")  # somebody removed the kubelet's
        target = Target("GPU-a", str(world.pod / ID))
        named = {target: Container("team", "trainer", "main")}
        await wait_until(lambda: world.node.enforcement.wanted.containers == named, world.node.enforcement.answered)
        (world.pod / ID).rmdir()
        await world.wait_wanted(pod=200)
        world.pod.rmdir()
        await world.wait_wanted()


@real
async def test_allocation_after_the_cgroup(world: World) -> None:
    """A cgroup that was there before its shares is limited when the kubelet writes them down."""
    world.pod.mkdir()
    async with limited(world):
        world.allocate(SHARE, resource="example.com/other")
        await world.wait_wanted()
        world.allocate(SHARE)
        await world.wait_wanted(pod=100)


@real
async def test_known_pod(world: World) -> None:
    """A container of a pod that is known does not wait for files to be read."""
    world.allocate(SHARE)
    world.pod.mkdir()
    async with limited(world):
        await world.wait_wanted(pod=100)
        (world.root / "plugins/kubelet_internal_checkpoint").write_text("{")  # in place, as nobody does: unseen
        (world.pod / ID).mkdir()
        await world.wait_wanted(pod=100, container=100)
        assert not world.node.enforcement.problem


@real
async def test_policy(world: World) -> None:
    """Another factor changes the limits, and without one there are none, until there is one again."""
    world.allocate(SHARE)
    world.pod.mkdir()
    async with limited(world):
        await world.wait_wanted(pod=100)
        for factor, sizes in ((2.5, {"pod": 250}), (0, {}), (1, {"pod": 100})):
            world.node.set_policy(Policy(RESOURCE, 10, limit_factor=factor))
            await world.wait_wanted(**sizes)


@real
async def test_gone(world: World) -> None:
    """What sgpu has set is forgotten with its cgroup."""
    old = world.root / "cgroup/old"
    old.mkdir()
    targets = [Target("GPU-a", str(old)), Target("GPU-a", str(world.root / "cgroup/gone"))]
    world.node.enforcement.adopt(targets)

    world.allocate(SHARE)
    world.pod.mkdir()
    async with limited(world):
        await world.wait_wanted(pod=100)
        table = {WantedLimit("GPU-a", str(world.pod), 100 * MIB), WantedLimit("GPU-a", str(old), None, ours=True)}
        while set(world.node.enforcement.table().values()) != table:
            world.node.enforcement.look.notify()
            await trio.lowlevel.checkpoint()


@real
async def test_claim(world: World) -> None:
    """The pod of a claim may use the claim's memory, and so may each of its containers until it is known whose it is;
    one without the claim has nothing of its own.
    """
    other = Share("GPU-a", 1)
    units = (
        ClaimedUnit("s-1", "GPU-a", RESOURCE, (SHARE,), 300 * MIB),
        ClaimedUnit("s-2", "GPU-a", RESOURCE, (other,)),
    )
    (world.pod / ID).mkdir(parents=True)
    (world.root / f"logs/trainer_team_main-{ID}.log").touch()

    async with limited(world):
        world.node.set_claims({"u": PreparedClaim("u", "team", "c", (Pod(UID, "trainer"),), units)})
        await world.wait_wanted(pod=400, container=400)
        assert world.node.enforcement.wanted.pods == dict.fromkeys((SHARE, other), (str(world.pod),))
        world.node.set_claimants({SHARE: (Container("team", "trainer", "main"),)})
        await world.wait_wanted(pod=400, container=300)


@real
async def test_a_claim_of_two_pods(world: World) -> None:
    """Each is held to the claim. A pod that comes later makes somebody ask the kubelet whether it has one, once."""
    claim = PreparedClaim(
        "u", "team", "c", (Pod(UID, "one"),), (ClaimedUnit("s", "GPU-a", RESOURCE, (SHARE,), 300 * MIB),)
    )
    uid = UID.replace("0c1d", "1c1d")
    later = world.pod.with_name(f"pod{uid}")
    world.pod.mkdir()
    async with limited(world):
        world.node.set_claims({"u": claim})
        await world.wait_wanted(pod=300)
        appeared = world.node.pods_appeared.next
        later.mkdir()
        await appeared.wait()
        world.node.set_claims({"u": attrs.evolve(claim, pods=(*claim.pods, Pod(uid, "two")))})
        both = {world.pod.name: 300, later.name: 300}
        await wait_until(lambda: world.wanted() == both, world.node.enforcement.answered)
        assert world.node.enforcement.wanted.pods == {SHARE: (str(world.pod), str(later))}
        assert not world.node.pods_appeared.next.is_set()


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        pytest.param(lambda root: (root / "cgroup/cgroup.controllers").unlink(), "cgroup v2", id="cgroup v1"),
        pytest.param(
            lambda root: [(root / f"cgroup/kubepods{name}").rmdir() for name in ("/burstable", "")],
            "-cgroup-directory",
            id="no kubelet",
        ),
        pytest.param(
            lambda root: (root / "plugins/kubelet_internal_checkpoint").write_text("{"),
            "checkpoint",
            id="no checkpoint",
        ),
    ],
)
@real
async def test_problem(
    world: World, caplog: pytest.LogCaptureFixture, change: Callable[[Path], object], fact: str
) -> None:
    """What is missing for limits is one warning."""
    change(world.root)
    async with limited(world):
        while not caplog.records:
            world.node.enforcement.look.notify()
            await trio.lowlevel.checkpoint()
    (record,) = caplog.records
    assert fact in record.message
    assert world.node.enforcement.problem == record.message


@real
async def test_answers(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """What the driver answers is seen in the container's use, and why limits are not enforced in the log, once."""
    world.allocate(SHARE)
    (world.pod / ID).mkdir(parents=True)
    (world.root / f"logs/trainer_team_main-{ID}.log").touch()
    async with limited(world):
        await world.wait_wanted(pod=100, container=100)
        table = world.node.enforcement.table().values()
        world.node.set_holders({RESOURCE: {SHARE: Container("team", "trainer", "main")}})
        for _ in range(2):
            world.node.set_limits(LimitAnswer(wanted, LimitState.REFUSED, reason="no R615") for wanted in table)
        (use,) = world.node.usage.uses("GPU-a")
        assert (use.memory_limit, use.limit_state, use.limit_reason) == (100 * MIB, "refused", "no R615")
        assert use.memory_used is None
        world.node.set_limits(LimitAnswer(wanted, LimitState.ENFORCED, wanted.hard, 7) for wanted in table)
        (use,) = world.node.usage.uses("GPU-a")
        assert (use.memory_limit, use.limit_state, use.memory_used) == (100 * MIB, "enforced", 7)
    assert [record.message for record in caplog.records if "R615" in record.message] == [
        "memory limits are not enforced: no R615 (2)"
    ]
