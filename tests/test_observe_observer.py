"""The snapshot of a node: what comes from whom."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from virtual_clock import real

from sgpu import __version__
from sgpu.driver.health import FaultRecord
from sgpu.driver.messages import NotReady, Report
from sgpu.driver.monitor import Monitor
from sgpu.driver.xids import XidPolicy
from sgpu.lib.sizes import GIB
from sgpu.node.claims import ClaimedUnit, PreparedClaim
from sgpu.node.container import Container
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.gpu import Gpu, Health, MigInstance
from sgpu.node.policy import Policy, Rule
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.node.usage import ContainerUse
from sgpu.observe.counters import Counters
from sgpu.observe.observer import Observer
from sgpu.observe.registrations import Registrations
from sgpu.observe.snapshot import GpuSnapshot, ResourceSnapshot, Snapshot
from sgpu.observe.watchdog import Watchdog

SHARED, WHOLE = "example.com/shared", "example.com/whole"
#: Seconds, monotonic and since the epoch.
NOW, WALL = 500.0, 1_700_000_000.0
WEB = Container("team", "web", "main")


def gpu(letter: str, **changes: Any) -> Gpu:  # noqa: ANN401
    made = Gpu(f"GPU-{letter}", "Tesla T4", "00000000:3B:00.0", device_nodes=(), memory_total=16 * GIB)
    return attrs.evolve(made, **changes)


class World:
    """GPU a is shared, b is whole, c is excluded."""

    def __init__(self) -> None:
        rules = (Rule("1", uuid="GPU-b", shares=1, resource=WHOLE), Rule("2", uuid="GPU-c", exclude=True))
        self.node = NodeState(Policy(SHARED, 4, rules), 5.0, clock=lambda: NOW)
        self.registrations = Registrations(Counters())
        self.standby = False
        self.monitor = Monitor(self.node, XidPolicy(), FaultRecord("550.54"), Counters().nvml_errors)
        self.observer = Observer(
            self.node,
            self.registrations,
            Counters(),
            Watchdog(),
            self.monitor,
            clock=lambda: NOW,
            wall_clock=lambda: WALL,
        )

    def snapshot(self) -> Snapshot:
        return self.observer.snapshot()

    def gpu(self, letter: str = "a") -> GpuSnapshot:
        return next(gpu for gpu in self.snapshot().gpus if gpu.uuid == f"GPU-{letter}")

    def hold(self, *numbers: int) -> None:
        """A container has these shares of GPU a."""
        self.node.set_holders({SHARED: {Share("GPU-a", number): WEB for number in numbers}})


@pytest.fixture
def world() -> World:
    made = World()
    made.node.set_gpus(tuple(map(gpu, "abc")))
    return made


class TestGpus:
    def test_all(self, world: World) -> None:
        """Gather all that is known of a GPU."""
        world.hold(1)
        world.node.usage.set_figures({"GPU-a": Figures(16 * GIB, 1 * GIB, 30)}, NOW - 2)
        world.node.update_pressure(0.9)
        assert world.gpu() == GpuSnapshot(
            uuid="GPU-a",
            name="Tesla T4",
            pci_bus_id="00000000:3B:00.0",
            resource=SHARED,
            healthy=True,
            reason="",
            since=0.0,
            memory_total=16 * GIB,
            memory_used=15 * GIB,
            memory_free=1 * GIB,
            utilization=30,
            shares=4,
            allocated=1,
            withheld=3,
            containers=(ContainerUse("team", "web", "main", 1),),
        )

    def test_instances(self, world: World) -> None:
        """Show a GPU in MIG mode by its instances: those that are there, and those that are gone and in use."""
        instances = tuple(MigInstance(f"MIG-{letter}", "T4 MIG 1g.5gb", "1g.5gb", GIB) for letter in "xy")
        parent = gpu("a", mig_mode=True, instances=instances)
        world.node.set_gpus((parent,))
        world.node.set_holders({SHARED: {Share("MIG-x", 0): WEB}})
        world.node.usage.set_figures({"MIG-y": Figures(GIB, GIB // 2, None, ())}, NOW)
        world.node.set_gpus((attrs.evolve(parent, instances=instances[1:]),))
        there, gone = world.snapshot().gpus
        assert (there.uuid, there.parent, there.mig_profile, there.mig_mode) == ("MIG-y", "GPU-a", "1g.5gb", False)
        assert (there.memory_used, there.utilization, there.shares, there.healthy) == (GIB // 2, None, 1, True)
        assert (gone.uuid, gone.healthy, gone.shares, gone.allocated) == ("MIG-x", False, 0, 1)
        assert gone.since > WALL
        assert [use.pod for use in gone.containers] == ["web"]

    def test_no_instances(self, world: World) -> None:
        """Show a GPU in MIG mode that has no instances by itself."""
        world.node.set_holders({SHARED: {}})
        world.node.set_gpus((gpu("a", mig_mode=True),))
        (seen,) = world.snapshot().gpus
        assert (seen.uuid, seen.resource, seen.shares, seen.mig_mode, seen.parent) == ("GPU-a", "", 0, True, "")

    def test_claims(self, world: World) -> None:
        """Show what claims take of a GPU's memory, where there are claims at all."""
        unit = ClaimedUnit("s", "GPU-a", SHARED, (Share("GPU-a", 0),), 4 * GIB)
        world.node.set_claims({"u": PreparedClaim("u", "team", "c", (), (unit, attrs.evolve(unit, uuid="GPU-b")))})
        assert world.gpu().memory_claimed is None
        world.observer.registrations.api = "dra"
        assert [gpu.memory_claimed for gpu in world.snapshot().gpus] == [4 * GIB, 4 * GIB, 0]

    def test_rules(self, world: World) -> None:
        """Show the resource and the shares of each GPU, and of one that is excluded, none."""
        world.node.set_holders({})
        shown = [(gpu.resource, gpu.shares, gpu.allocated) for gpu in world.snapshot().gpus]
        assert shown == [(SHARED, 4, 0), (WHOLE, 1, 0), ("", 0, None)]

    def test_unhealthy(self, world: World) -> None:
        """Show the reason, and since when."""
        world.node.set_gpus((gpu("a", health=Health.UNHEALTHY, reason="XID 79", since=WALL - 60),))
        seen = world.gpu()
        assert (seen.healthy, seen.reason, seen.since) == (False, "XID 79", WALL - 60)

    @pytest.mark.parametrize(
        ("figures", "age", "total"),
        [
            pytest.param(None, 0, 16 * GIB, id="none"),
            pytest.param(Figures(8 * GIB, 4 * GIB, 30), 100, 16 * GIB, id="old"),
            pytest.param(Figures(), 0, None, id="not supported"),
            pytest.param(Figures(8 * GIB), 0, 8 * GIB, id="total alone"),
        ],
    )
    def test_unknown(self, world: World, figures: Figures | None, age: float, total: int | None) -> None:
        """Show None for what the driver does not say, or said long ago; the memory's size is known without figures."""
        if figures:
            world.node.usage.set_figures({"GPU-a": figures}, NOW - age)
        seen = world.gpu()
        assert (seen.memory_total, seen.memory_used, seen.memory_free) == (total, None, None)
        assert (seen.utilization, seen.allocated, seen.containers) == (None, None, ())

    def test_processes(self, world: World) -> None:
        """Show what containers use as long as figures are fresh; who has shares stays known."""
        figures = {"GPU-a": Figures(16 * GIB, 12 * GIB, 30, (ProcessUse(7, GIB, 5), ProcessUse(8, GIB, 5)))}
        world.hold(1)
        for age, containers in (
            (0, (ContainerUse("", "", "", 0, GIB, 5, 1), ContainerUse("team", "web", "main", 1, GIB, 5, 1))),
            (100, (ContainerUse("team", "web", "main", 1),)),
        ):
            world.node.usage.set_figures(figures, NOW - age)
            world.node.usage.set_owners(figures, {7: WEB, 8: None})
            assert world.gpu().containers == containers


class TestNode:
    def test_versions_and_times(self, world: World) -> None:
        """Show the versions, and when the driver last answered, on the wall clock."""
        before = world.snapshot()
        assert (before.version, before.time, before.driver_version) == (__version__, WALL, "550.54")
        assert before.sampled_at is None
        world.node.usage.set_figures({}, NOW - 100)
        assert world.snapshot().sampled_at == WALL - 100

    def test_no_gpu(self, world: World) -> None:
        """Show neither resources nor the driver's version before there is a GPU: that is of the last run."""
        world.node.set_gpus(())
        snapshot = world.snapshot()
        assert (snapshot.driver_version, snapshot.resources, snapshot.gpus) == ("", (), ())

    def test_unknown(self, world: World) -> None:
        """Tell apart that nobody has a share, or a process, and that it is unknown."""
        assert not world.snapshot().holders_known
        world.node.set_holders({})
        world.node.usage.set_owners({}, None, "no /proc")
        assert world.snapshot().holders_known
        assert world.snapshot().stale_answers is None
        world.node.usage.stale_answers = ()
        assert world.snapshot().stale_answers == ()
        assert world.snapshot().processes_problem == "no /proc"

    def test_resources(self, world: World) -> None:
        """Show all that are offered, registered or not."""
        with world.registrations.session(SHARED) as registration:
            world.registrations.attempted(SHARED, "kubelet", success=True)
            registration.streams += 1
            assert world.snapshot().resources == (
                ResourceSnapshot(SHARED, registered=True, streams=1),
                ResourceSnapshot(WHOLE, registered=False, streams=0),
            )

    @real
    async def test_waiting(self) -> None:
        """Say what is waited for until there is a GPU; when the driver goes, the GPUs say it themselves."""
        world = World()
        world.monitor.not_ready(NotReady("no library"))
        assert world.snapshot().waiting == "no library"
        world.node.set_gpus((gpu("a"),))
        assert world.snapshot().waiting == ""
        world.node.set_gpus(())
        world.monitor.report(Report((), (), (), "550.54", "/x"))
        assert world.snapshot().waiting == ""

    def test_simulated(self, world: World) -> None:
        """Say that GPUs are simulated where there is no driver."""
        assert not world.snapshot().simulated
        snapshot = attrs.evolve(world.observer, monitor=None).snapshot()
        assert (snapshot.driver_version, snapshot.waiting, len(snapshot.gpus)) == ("", "", 3)
        assert snapshot.simulated
