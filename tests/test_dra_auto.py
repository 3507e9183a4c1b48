"""Where the facts for `-api auto` come from: files, a kubelet on grpcio and an API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from daemon_process import short_directory
from dra_claims import NODE, RESOURCE
from fake_api_server import Answer, FakeApiServer, serving_plain
from fake_pod_resources import FakePodResources
from watching import wait_until

from sgpu.config.settings import Settings
from sgpu.dra import auto, checkpoint
from sgpu.dra.choice import Choice
from sgpu.dra.slices import DRIVER
from sgpu.driver.fault_file import read_boot_id
from sgpu.node.claims import PreparedClaim
from sgpu.node.policy import Mig, Policy

POLICY = Policy(RESOURCE, 10, mig=Mig.PROFILE, mig_resource="deepomatic.com/mig-{profile}")
DEVICE = "GPU-4404041a-04cf-1ccf-9e70-f139a9b1e23c"


@attrs.frozen
class World:
    """A node's directories, its kubelet, and the API server."""

    settings: Settings
    kubelet: FakePodResources
    server: FakeApiServer

    def decide(self, patience: float = 0) -> Choice:
        return trio.run(auto.decide, self.settings, POLICY, patience)

    def prepared(self, boot_id: str) -> None:
        claim = PreparedClaim("u-1", "team", "c", (), ())
        checkpoint.save(Path(self.settings.dra_plugin_directory) / DRIVER, boot_id, [claim])


@pytest.fixture
def world() -> Iterator[World]:
    server = FakeApiServer()
    server.tokens.add("")
    server.put(f"/api/v1/nodes/{NODE}", {"metadata": {}, "status": {"nodeInfo": {"kubeletVersion": "v1.36.1"}}})
    with short_directory() as root, FakePodResources(root / "kubelet.sock") as kubelet, serving_plain(server) as port:
        settings = Settings(
            node_name=NODE,
            api_server=f"127.0.0.1:{port}",
            pod_resources_socket=str(root / "kubelet.sock"),
            dra_plugin_directory=str(root),
        )
        yield World(settings, kubelet, server)


def test_dra(world: World) -> None:
    """All that it takes is there; the slice that was tried is not stored."""
    choice = world.decide()
    assert choice.dra, choice.reason
    assert "v1.36.1" in choice.reason
    assert list(world.server.objects) == [f"/api/v1/nodes/{NODE}"]


@pytest.mark.parametrize(
    ("resource", "device", "dra"),
    [
        pytest.param(RESOURCE, f"{DEVICE}::3", False, id="a share"),
        pytest.param("deepomatic.com/mig-1g.10gb", f"MIG-{DEVICE[4:]}::0", False, id="a MIG profile"),
        pytest.param("example.com/gpu", DEVICE, True, id="of another plugin"),
    ],
)
def test_holders(world: World, resource: str, device: str, dra: bool) -> None:
    """Pods with shares by a device plugin keep it, whatever the API server could do."""
    world.kubelet.assign("team", "trainer", "main", [device], resource)
    choice = world.decide()
    assert choice.dra is dra
    assert ("team/trainer" in choice.reason) is not dra


def test_too_old(world: World) -> None:
    """A server that can't is not asked for more."""
    world.server.release = "v1.34.1"
    assert "v1.34.1" in world.decide().reason
    assert not [request for request in world.server.requests if request.startswith("POST")]


def test_not_kept(world: World) -> None:
    """What the API server drops is named."""

    def drop(thing: dict[str, object]) -> None:
        for each in thing["spec"]["devices"]:  # type: ignore[index]
            del each["allowMultipleAllocations"]

    world.server.drop = drop
    assert "allowMultipleAllocations" in world.decide().reason


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        pytest.param(Answer(403, {"message": "no"}), "403", id="no rights"),
        pytest.param(Answer(200, {"metadata": {}}), "does not say", id="a Node without a kubelet"),
    ],
)
def test_unknown(world: World, answer: Answer, fact: str) -> None:
    """What does not pass by itself is not waited for."""
    world.server.instead["GET /api/v1/nodes"] = [answer]
    choice = world.decide(patience=600)
    assert not choice.dra
    assert fact in choice.reason


def test_not_in_a_pod(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no API server to ask."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    alone = attrs.evolve(world, settings=attrs.evolve(world.settings, api_server=""))
    assert not alone.decide(patience=600).dra


def test_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubelet that is not there yet, as after a reboot, and an API server that starts."""
    monkeypatch.setattr(auto, "INTERVAL", 0.01)
    monkeypatch.setattr("sgpu.kubeapi.client.REQUEST_TIMEOUT", 0.3)
    world.server.instead["GET /version"] = [Answer(503, {"message": "starting"})]

    async def check() -> Choice:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            return await auto.decide(world.settings, POLICY, 60)

    async def come() -> None:
        await trio.to_thread.run_sync(partial(wait_until, lambda: len(world.server.requests) > 4, "asked"))
        world.server.instead.clear()

    assert trio.run(check).dra


@pytest.mark.parametrize(
    ("boot_id", "dra", "fact"),
    [
        pytest.param(read_boot_id(), True, "1 claim", id="in this boot"),
        pytest.param("before", True, "before, and now", id="before the reboot"),
        pytest.param(None, False, "503", id="none"),
    ],
)
def test_claims(world: World, monkeypatch: pytest.MonkeyPatch, boot_id: str | None, dra: bool, fact: str) -> None:
    """A node with claims stays with them, even where no API server answers."""
    monkeypatch.setattr("sgpu.kubeapi.client.REQUEST_TIMEOUT", 0.3)
    world.server.instead["GET"] = [Answer(503, {"message": "away"})]
    if boot_id:
        world.prepared(boot_id)
    choice = world.decide()
    assert choice.dra is dra
    assert fact in choice.reason


def test_claims_of_another_version(world: World) -> None:
    """They are there, and stay where they are: the front-end sets them aside."""
    world.prepared(read_boot_id())
    path = Path(world.settings.dra_plugin_directory) / DRIVER / checkpoint.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    assert world.decide().dra
    assert path.exists()


def test_the_kubelet_is_silent(world: World) -> None:
    """It is not known who has shares: a node with claims before is not changed under them."""
    world.prepared("before")
    alone = attrs.evolve(world, settings=attrs.evolve(world.settings, pod_resources_socket="/nowhere"))
    assert not alone.decide().dra
