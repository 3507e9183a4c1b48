"""The whole daemon with `-api dra` and `auto`: the real process between an API server and a kubelet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from daemon_process import DaemonProcess
from dra_claims import NAMESPACE, NODE, RESOURCE, claim, result
from fake_api_server import FakeApiServer, serving_plain
from fake_kubelet import FakeKubelet
from fake_plugin_manager import FakePluginManager
from fake_pod_resources import FakePodResources
from node import Node
from watching import wait_until

from sgpu.dra.driver import claim_path
from sgpu.dra.slices import DRIVER, PATH, unit_uuid
from sgpu.observe.client import fetch

pytestmark = pytest.mark.process

CLAIM = (NAMESPACE, "c", "u-1")


@attrs.frozen
class World:
    """A node whose kubelet and API server outlive its daemons."""

    node: Node
    root: Path
    server: FakeApiServer
    kubelet: FakePluginManager
    port: int

    def daemon(self, api: str) -> DaemonProcess:
        flags = {
            "-api": api,
            "-api-server": f"127.0.0.1:{self.port}",
            "-node-name": NODE,
            "-dra-plugin-directory": self.root / "plugins",
            "-dra-registry-directory": self.root / "registry",
            "-cdi-directory": self.root / "cdi",
            "-status-socket": self.root / "status.sock",
        }
        return self.node.daemon(*(str(word) for pair in flags.items() for word in pair), simulate=2)

    @property
    def devices(self) -> list[str]:
        return [each["name"] for thing in self.server.below(PATH).values() for each in thing["spec"]["devices"]]

    @property
    def files(self) -> list[str]:
        return [path.name for path in (self.root / "cdi").glob("*")]


@pytest.fixture
def world(node: Node) -> Iterator[World]:
    root, server = node.plugins.parent, FakeApiServer()
    for name in ("plugins", "registry"):
        (root / name).mkdir()
    server.tokens.add("")
    server.put(f"/api/v1/nodes/{NODE}", {"metadata": {}, "status": {"nodeInfo": {"kubeletVersion": "v1.36.2"}}})
    with FakePluginManager(root / "registry") as kubelet, serving_plain(server) as port:
        yield World(node, root, server, kubelet, port)


def test_a_claim_from_one_daemon_to_the_next(world: World) -> None:
    """Published, registered, prepared; the same after SIGKILL; unprepared; and nothing is left after SIGTERM."""
    with world.daemon("dra") as first:
        world.kubelet.wait_for(lambda: DRIVER in world.kubelet.plugins)
        device, _ = wait_until(lambda: world.devices, "published")
        results = [result(unit_uuid(device), consumedCapacity={"shares": "1", "memory": "4Gi"})]
        world.server.objects[claim_path(NAMESPACE, "c")] = claim(*results)
        prepared = world.kubelet.prepare(CLAIM).claims["u-1"]
        assert [each.device_name for each in prepared.devices] == [device]
        (file,) = world.files
        (made,) = json.loads((world.root / "cdi" / file).read_text())["devices"]
        assert prepared.devices[0].cdi_device_ids == [f"k8s.{DRIVER}/claim={made['name']}"]
        assert f"SGPU_MEMORY_BYTES={4 << 30}" in made["containerEdits"]["env"]
        first.kill()
        assert first.wait_exit()
    with world.daemon("dra") as second:
        second.wait_log(f"registered {DRIVER}")
        assert world.kubelet.prepare(CLAIM).claims["u-1"] == prepared
        assert world.files == [file]
        assert not world.kubelet.unprepare(CLAIM).claims["u-1"].error
        assert world.files == []
        second.terminate()
    assert not [*world.root.glob("registry/*"), *world.root.glob("plugins/*/*.sock")]
    assert len(world.devices) == 2  # the kubelet deletes them, where no daemon comes


@pytest.mark.parametrize("holder", [False, True], ids=["free", "a pod with a share"])
def test_auto(world: World, holder: bool) -> None:
    """Chosen once and said: by claims where the cluster can, and never under a pod that has a share."""
    with FakePodResources(world.node.pods) as pods, FakeKubelet(world.node.plugins) as kubelet:
        if holder:
            pods.assign("team", "trainer", "main", ["GPU-4404041a-04cf-1ccf-9e70-f139a9b1e23c::0"], RESOURCE)
        with world.daemon("auto") as daemon:
            if holder:
                kubelet.wait_registrations(1)
            else:
                world.kubelet.wait_for(lambda: DRIVER in world.kubelet.plugins)
                wait_until(lambda: world.devices, "published")
            said = daemon.wait_log("-api auto: offering GPUs")
            wait_until((world.root / "status.sock").exists, "served")
            status = fetch(str(world.root / "status.sock"))
            assert status.api == ("device-plugin" if holder else "dra")
            assert status.api_reason in said.text
            assert ("team/trainer" in status.api_reason) is holder
            daemon.terminate()
        assert bool(world.devices) is not holder
