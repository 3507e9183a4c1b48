"""Orders to cordon: recorded, carried out, and refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from virtual_clock import real, virtual

from sgpu.driver import cordon_file
from sgpu.driver.simulated import simulated_gpus
from sgpu.node.container import Container
from sgpu.node.gpu import Cordon, Gpu
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.observe.cordons import CordonRefusedError, Cordons
from sgpu.observe.orders import Order

FIRST, SECOND = simulated_gpus(2)
RESOURCE = "example.com/gpu"
NOW = 1000.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cordon.json"


@pytest.fixture
def node() -> NodeState:
    """A container has a share of the first GPU."""
    node = NodeState(Policy(RESOURCE, 4), 5, clock=lambda: 0.0)
    node.set_gpus((FIRST, SECOND))
    node.set_holders({RESOURCE: {Share(FIRST.uuid, 0): Container("team", "one", "main")}})
    return node


@pytest.fixture
def cordons(node: NodeState, path: Path) -> Cordons:
    return Cordons(node, path, "boot", lambda: NOW)


async def wait_until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # nothing tells of it
        await trio.sleep(0.01)


def on_disk(path: Path) -> dict[str, Cordon | None]:
    return {uuid: gpu.cordon for uuid, gpu in cordon_file.load(path, "boot").items()}


@virtual
async def test_cordon_and_uncordon(node: NodeState, cordons: Cordons, path: Path) -> None:
    """Carry out an order, and have it on disk when that is said; again, it changes nothing but the reason."""
    done = await cordons.cordon(Order("0", "bad row"))
    assert (done.uuid, done.name, done.pci_bus_id, done.changed) == (FIRST.uuid, FIRST.name, FIRST.pci_bus_id, True)
    assert on_disk(path) == {FIRST.uuid: Cordon("bad row", NOW)} == {node.gpus[0].uuid: node.gpus[0].cordon}
    for reason, expected in (("", "bad row"), ("worse", "worse")):
        assert not (await cordons.cordon(Order(FIRST.uuid, reason))).changed
        assert on_disk(path) == {FIRST.uuid: Cordon(expected, NOW)}
    assert (await cordons.uncordon(Order("0"))).changed
    assert not (await cordons.uncordon(Order("0"))).changed
    assert on_disk(path) == {}
    assert node.gpus[0].cordon is None


@virtual
async def test_released_at_once(node: NodeState, cordons: Cordons) -> None:
    """A GPU of which nobody has a share need not wait for the kubelet's next list."""
    await cordons.cordon(Order("1"))
    assert node.gpus[1].released


@virtual
async def test_refused(node: NodeState, cordons: Cordons, path: Path) -> None:
    """Change nothing where there is no such GPU, no file, or none that can be written."""
    with pytest.raises(CordonRefusedError, match="no GPU of this node"):
        await cordons.cordon(Order("7"))
    with pytest.raises(CordonRefusedError, match="-cordon-file"):
        await Cordons(node, None, "boot").cordon(Order("0"))
    path.with_name(f"{path.name}.new").mkdir()
    with pytest.raises(CordonRefusedError, match=str(path)):
        await cordons.cordon(Order("0"))
    assert node.cordoned == {}
    assert on_disk(path) == {}


@virtual
async def test_load(node: NodeState, cordons: Cordons, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Take what another daemon recorded, also of a card that is not there now, which can be uncordoned by its UUID."""
    elsewhere = Gpu("GPU-x", "T4", "00000000:99:00.0", ())
    cordoned = [attrs.evolve(gpu, cordon=Cordon("bad row", 1)) for gpu in (FIRST, elsewhere)]
    cordon_file.save(path, "boot", {gpu.uuid: gpu for gpu in cordoned})
    await cordons.load()
    assert node.gpus[0].cordon == Cordon("bad row", 1)
    assert [FIRST.uuid in caplog.messages[0], "GPU-x" in caplog.messages[1]] == [True, True]
    await cordons.uncordon(Order("GPU-x"))
    assert on_disk(path).keys() == {FIRST.uuid}
    await Cordons(node, None, "boot").load()
    assert node.cordoned.keys() == {FIRST.uuid}


@real
async def test_releases_are_recorded(
    node: NodeState, cordons: Cordons, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Record that a GPU was released, and warn once while that fails."""
    await cordons.cordon(Order("0"))
    in_the_way = path.with_name(f"{path.name}.new")
    in_the_way.mkdir()
    caplog.set_level(logging.WARNING)
    caplog.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cordons.save_releases)
        node.set_holders({RESOURCE: {}})
        await wait_until(lambda: caplog.messages)
        in_the_way.rmdir()
        node.changed.notify()
        await wait_until(lambda: on_disk(path) == {FIRST.uuid: Cordon("", NOW, released=True)})
        nursery.cancel_scope.cancel()
    assert [str(path) in message for message in caplog.messages] == [True]
