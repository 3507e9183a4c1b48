"""Events as the API server gets them: from the node's state, and from the real daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import trio
from fake_api_server import Answer, FakeApiServer, connected
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from in_pod import in_pod
from node import Node
from virtual_clock import virtual
from watching import wait_until

from sgpu.kubeapi import Access
from sgpu.lib.sizes import GIB, MIB
from sgpu.node.gpu import Gpu, Health
from sgpu.node.notices import Notice, Reason
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState
from sgpu.observe import event_writer
from sgpu.observe.events import PER_MINUTE
from sgpu.pods.log_links import pod_uid

T = TypeVar("T")

GPU = Gpu("GPU-a", "Tesla T4", "0:3B:0.0", ())
EVENTS = "/api/v1/namespaces/{}/events"
EXCEEDED = Notice(Reason.MEMORY_EXCEEDED, "GPU-a", "GPU GPU-a: too much", "team/a", "main")


def events(server: FakeApiServer, namespace: str = "team") -> list[dict[str, Any]]:
    return list(server.below(EVENTS.format(namespace)).values())


@attrs.define
class World:
    node: NodeState
    server: FakeApiServer
    in_place: trio.Event
    #: Whether another daemon serves.
    standby: bool = False


async def run_here(function: Callable[..., T], *args: object) -> T:
    return function(*args)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(NodeState(Policy("example.com/gpu", 4), 1.0), FakeApiServer(), trio.Event())
    monkeypatch.setattr(event_writer, "find_access", lambda *needs: Access("", Path(), Path(), needs[-1]))
    monkeypatch.setattr(event_writer, "open_api_server", lambda access: connected(world.server, access.manifest))
    monkeypatch.setattr(event_writer, "run_in_thread", run_here)  # a virtual clock does not wait for threads
    return world


@asynccontextmanager
async def writing(world: World, logs: Path) -> AsyncIterator[None]:
    """Write events of node-a, in place from now on unless another serves."""
    async with trio.open_nursery() as nursery:
        served = (world.in_place, lambda: world.standby)
        nursery.start_soon(event_writer.write_events, world.node, "node-a", "", logs, 0.0, *served)
        if not world.standby:
            world.in_place.set()
        await trio.sleep(1)
        yield
        nursery.cancel_scope.cancel()


@virtual
async def test_of_a_pod(world: World, tmp_path: Path) -> None:
    """In its namespace, with its uid of the kubelet's links."""
    (tmp_path / "a_team_main-1.log").symlink_to("/var/log/pods/team_a_uid-1/main/0.log")
    (tmp_path / "others.log").touch()
    async with writing(world, tmp_path):
        world.node.notices.add(EXCEEDED)
        await trio.sleep(1)
    (event,) = events(world.server)
    assert (event["involvedObject"]["uid"], event["reason"]) == ("uid-1", "GPUMemoryExceeded")
    assert pod_uid(tmp_path, "team/b") == pod_uid(tmp_path / "none", "team/a") == ""


@virtual
async def test_stand_by(world: World, tmp_path: Path) -> None:
    """Silent until it takes over, and what happened before was the other's to tell."""
    world.standby = True
    async with writing(world, tmp_path):
        world.node.notices.add(EXCEEDED)
        await trio.sleep(60)
        world.in_place.set()
        await trio.sleep(60)
        assert world.server.requests == []
        world.node.notices.add(EXCEEDED)
        await trio.sleep(1)
    assert len(events(world.server)) == 1


@virtual
async def test_server_away(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seldom asked, one warning, and what happened meanwhile is told when it is back; once, if an answer got lost."""
    world.server.instead["POST"] = [Answer(503, {"message": "away"})]
    async with writing(world, tmp_path):
        world.node.notices.add(EXCEEDED)
        await trio.sleep(600)
        world.node.notices.add(EXCEEDED)
        assert len(world.server.requests) < 30
        assert len(caplog.records) == 1
        del world.server.instead["POST"]
        await trio.sleep(60)
        (event,) = events(world.server)
        assert event["count"] == 2
        world.server.instead["POST"] = [Answer(409, {"message": "already exists"}), Answer(500, {})]
        world.node.notices.add(attrs.evolve(EXCEEDED, pod="team/b"))
        await trio.sleep(60)
        assert len(caplog.records) == 1


@virtual
async def test_no_right(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is asked for once; one warning names what gives the right."""
    world.server.instead["POST"] = [Answer(403, {"message": "events is forbidden"})]
    async with writing(world, tmp_path):
        for pod in ("team/a", "other/a", "team/a"):
            world.node.notices.add(attrs.evolve(EXCEEDED, pod=pod))
            await trio.sleep(90)
    assert len(world.server.requests) == 3
    (record,) = caplog.records
    assert all(fact in record.message for fact in ("events is forbidden", event_writer.MANIFEST))


@virtual
async def test_too_many(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A few a minute, and one warning says that there were more."""
    async with writing(world, tmp_path):
        for number in range(100):
            world.node.notices.add(attrs.evolve(EXCEEDED, pod=f"team/{number}"))
        await trio.sleep(30)
        assert len(events(world.server)) == PER_MINUTE
    (record,) = caplog.records
    assert f"{PER_MINUTE} a minute" in record.message


@virtual
async def test_faults(world: World, tmp_path: Path) -> None:
    """A fault and its end, on the Node."""
    async with writing(world, tmp_path):
        world.node.set_gpus((attrs.evolve(GPU, health=Health.UNHEALTHY, reason="XID 79", since=2e10),))
        await trio.sleep(1)
        world.node.set_gpus((GPU,))
        await trio.sleep(1)
    assert {event["reason"] for event in events(world.server, "default")} == {"GPUUnhealthy", "GPUHealthy"}


@virtual
async def test_not_in_a_pod(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say so, and leave the rest of the daemon alone."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    node, in_place = NodeState(Policy("example.com/gpu", 4), 1.0), trio.Event()
    in_place.set()
    await event_writer.write_events(node, "node-a", "", tmp_path, 0.0, in_place, lambda: False)
    (record,) = caplog.records
    assert "-events needs sgpu to run in a pod" in record.message


@pytest.mark.process
def test_daemon(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real daemon tells of a GPU that fails and recovers, over TLS."""
    server, faults = FakeApiServer(), tmp_path / "faults"

    def event(reason: str) -> dict[str, Any]:
        found = {event["reason"]: event for event in events(server, "default")}
        return found.get(reason, {})

    flags = ("-events", "-node-name", "node-a", "-simulate-faults", str(faults))
    with in_pod(server, monkeypatch) as command, node.daemon(*flags, simulate=2, command=command) as daemon:
        faults.write_text("1 fell off the bus\n")
        down = wait_until(lambda: event("GPUUnhealthy"), "an event")
        assert "fell off the bus" in down["message"]
        assert down["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "node-a"}
        faults.write_text("")
        assert "fell off the bus" in wait_until(lambda: event("GPUHealthy"), "the other event")["message"]
        daemon.terminate()
    assert len(events(server, "default")) == 2


@pytest.mark.process
def test_daemon_of_pods(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the driver's processes to the Events of the pod that fills a GPU, with its uid."""
    server, (gpu,) = FakeApiServer(), node.driver.state.gpus
    node.start_process(100, "team/big/main")
    (link,) = node.logs.iterdir()
    link.unlink()
    link.symlink_to("/var/log/pods/team_big_uid-1/main/0.log")
    node.driver.change(gpu, used=14 * GIB + 512 * MIB, compute=((100, 14 * GIB),))
    flags = ("-events", "-node-name", "node-a", "-memory-guard", "warn", "-gpu-duplication-factor", 4)
    with (
        FakeKubelet(node.plugins) as kubelet,
        FakePodResources(node.pods) as pods,
        in_pod(server, monkeypatch) as command,
        node.daemon(*flags, command=command),
    ):
        pods.assign("team", "big", "main", [f"{gpu.uuid}::0"])
        kubelet.wait_devices(4)
        wait_until(lambda: len(events(server)) == 2, "two events")
    assert {event["reason"]: event["involvedObject"]["uid"] for event in events(server)} == {
        **{"GPUMemoryFull": "uid-1", "GPUMemoryExceeded": "uid-1"}
    }
