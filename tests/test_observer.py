"""What is gathered of a node, and from whom."""

from __future__ import annotations

import attrs
import pytest

from sgpu import __version__
from sgpu.catalog import Catalog
from sgpu.device import Device, Health
from sgpu.inventory import Inventory
from sgpu.monitor import Memory, Monitor
from sgpu.observer import Observer
from sgpu.policy import Policy, Rule
from sgpu.record import Record
from sgpu.report import NotReady, ProcessReport, Report
from sgpu.snapshot import ContainerUse, GpuSnapshot, ResourceSnapshot
from sgpu.usage import Holder, Sample, Usage
from sgpu.xids import XidPolicy

SHARED, WHOLE = "example.com/shared", "example.com/whole"
#: Seconds, monotonic and since the epoch.
NOW, WALL = 500.0, 1_700_000_000.0
INTERVAL = 5.0
GIB = 1 << 30


def gpu(letter: str) -> Device:
    return Device(f"GPU-{letter}", "Tesla T4", "00000000:3B:00.0", shares=4, device_nodes=(), memory_bytes=16 * GIB)


class World:
    """GPU a is shared, b is whole, c is excluded."""

    def __init__(self) -> None:
        rules = (Rule("1", uuid="GPU-b", shares=1, resource=WHOLE), Rule("2", uuid="GPU-c", exclude=True))
        self.node = Inventory()
        self.catalog = Catalog(Policy(SHARED, 4, rules))
        self.usage = Usage(INTERVAL)
        self.record = Record(lambda: NOW)
        self.monitor = Monitor(self.node, 4, XidPolicy(), Memory())
        self.observer = Observer(self.node, self.catalog, self.usage, self.record, self.monitor, lambda: WALL)

    def has(self, *devices: Device) -> None:
        self.node.replace(devices)
        self.catalog.replace(devices)

    def gpu(self, letter: str) -> GpuSnapshot:
        return next(gpu for gpu in self.observer.snapshot().gpus if gpu.uuid == f"GPU-{letter}")


@pytest.fixture
def world() -> World:
    made = World()
    made.has(*map(gpu, "abc"))
    return made


class TestGpus:
    def test_a_gpu(self, world: World) -> None:
        """All that is known of it, from everyone who knows something."""
        world.usage.sampled({"GPU-a": Sample(16 * GIB, 12 * GIB, 30)}, NOW - 2)
        world.usage.held({"GPU-a::1": Holder("team", "web", "main")})
        world.catalog.inventories[SHARED].withhold({"GPU-a": frozenset({0, 2})})
        assert world.gpu("a") == GpuSnapshot(
            uuid="GPU-a",
            name="Tesla T4",
            pci_bus_id="00000000:3B:00.0",
            resource=SHARED,
            healthy=True,
            reason="",
            since=0.0,
            memory_total=16 * GIB,
            memory_used=4 * GIB,
            memory_free=12 * GIB,
            utilisation=30,
            shares=4,
            allocated=1,
            withheld=2,
            containers=(ContainerUse("team", "web", "main", 1),),
        )

    def test_by_rules(self, world: World) -> None:
        """A GPU has the resource and the shares that the operator gave it; none, if it is excluded."""
        assert [(gpu.resource, gpu.shares) for gpu in world.observer.snapshot().gpus] == [
            (SHARED, 4),
            (WHOLE, 1),
            ("", 0),
        ]

    def test_down(self, world: World) -> None:
        """With the reason, and since when."""
        world.has(attrs.evolve(gpu("a"), health=Health.UNHEALTHY, reason="XID 79", since=WALL - 60))
        seen = world.gpu("a")
        assert (seen.healthy, seen.reason, seen.since) == (False, "XID 79", WALL - 60)

    def test_nothing_is_known(self, world: World) -> None:
        """What nobody said is None, not 0; the size of its memory is known from elsewhere."""
        seen = world.gpu("a")
        assert (seen.memory_total, seen.memory_used, seen.memory_free) == (16 * GIB, None, None)
        assert (seen.utilisation, seen.allocated, seen.containers) == (None, None, ())

    @pytest.mark.parametrize("sample", [Sample(None, None, None), Sample(16 * GIB, None, None)], ids=["all", "free"])
    def test_memory_not_supported(self, world: World, sample: Sample) -> None:
        """Where the driver does not tell."""
        world.usage.sampled({"GPU-a": sample}, NOW)
        seen = world.gpu("a")
        assert (seen.memory_total, seen.memory_used, seen.memory_free) == (sample.memory_total, None, None)

    def test_stale_processes(self, world: World) -> None:
        """Nor are those of its processes; who has shares is still known."""
        sample = Sample(16 * GIB, 12 * GIB, 30, (ProcessReport(7, GIB, 5), ProcessReport(8, GIB, 5)))
        web = Holder("team", "web", "main")
        world.usage.held({"GPU-a::1": web})
        for age, containers in (
            (0, (ContainerUse("", "", "", 0, GIB, 5, 1), ContainerUse("team", "web", "main", 1, GIB, 5, 1))),
            (100, (ContainerUse("team", "web", "main", 1),)),
        ):
            world.usage.sampled({"GPU-a": sample}, NOW - age)
            world.usage.owned(world.usage.samples, {7: web, 8: None})
            assert world.gpu("a").containers == containers

    def test_stale(self, world: World) -> None:
        """Figures of a driver that no longer answers are not shown as if they were of now."""
        world.usage.sampled({"GPU-a": Sample(16 * GIB, 12 * GIB, 30)}, NOW - 100)
        assert world.gpu("a").memory_used is None
        assert world.observer.snapshot().sampled_at == WALL - 100


class TestNode:
    def test_as_a_whole(self, world: World) -> None:
        """Who says it, and when."""
        world.monitor.driver_version = "550.54"
        snapshot = world.observer.snapshot()
        assert (snapshot.version, snapshot.time, snapshot.driver_version) == (__version__, WALL, "550.54")
        assert (snapshot.sampled_at, snapshot.holders_known, snapshot.processes_trouble) == (None, False, "")

    def test_driver_of_the_last_run(self, world: World) -> None:
        """The state file's, which may be gone, is not told as if it were there."""
        world.monitor.driver_version = "550.54"
        world.node.replace(())
        assert world.observer.snapshot().driver_version == ""

    def test_processes(self, world: World) -> None:
        """Why they can't be told apart, as long as that is so."""
        world.usage.owned({}, None, "no /proc")
        assert world.observer.snapshot().processes_trouble == "no /proc"
        world.usage.owned({}, {})
        assert world.observer.snapshot().processes_trouble == ""

    def test_holders(self, world: World) -> None:
        """That nobody has a share is something else than not knowing it."""
        world.usage.held({})
        assert world.observer.snapshot().holders_known
        assert world.gpu("a").allocated == 0

    def test_resources(self, world: World) -> None:
        """All that are offered, registered or not."""
        with world.record.session(SHARED) as registration:
            world.record.attempted(SHARED, "kubelet", success=True)
            registration.streams += 1
            assert world.observer.snapshot().resources == (
                ResourceSnapshot(SHARED, registered=True, streams=1),
                ResourceSnapshot(WHOLE, registered=False, streams=0),
            )

    def test_waiting(self) -> None:
        """For the driver, until it is there; not again when it goes, which the GPUs then say themselves."""
        world = World()
        world.monitor.not_ready(NotReady("no library"))
        assert world.observer.snapshot().waiting == "no library"
        world.has(gpu("a"))
        assert world.observer.snapshot().waiting == ""
        world.has()
        world.monitor.report(Report((), (), (), "550.54", "/x"))
        assert world.observer.snapshot().waiting == ""

    def test_simulated(self, world: World) -> None:
        """Without a driver there is no monitor."""
        assert not world.observer.snapshot().simulated
        snapshot = attrs.evolve(world.observer, monitor=None).snapshot()
        assert (snapshot.driver_version, snapshot.waiting, len(snapshot.gpus)) == ("", "", 3)
        assert snapshot.simulated
