"""The Node's labels as the API server has them: when they are written, left alone and removed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from fake_api_server import Answer, FakeApiServer, connected
from in_pod import in_pod
from node import Node
from virtual_clock import virtual
from watching import wait_until

from sgpu.kubeapi import Access
from sgpu.observe import node_labels
from sgpu.observe.node_labels import ANNOTATION, CHECK_INTERVAL, INTERVAL, WRITE_INTERVAL, changes

PATH = "/api/v1/nodes/node-a"
FOREIGN = {"kubernetes.io/hostname": "node-a", "deepomatic.com/shared-gpu": "true", "deepomatic.com/gpu.rack": "7"}
COUNT, PRODUCT = "deepomatic.com/gpu.count", "deepomatic.com/gpu.product"


def node(labels: Mapping[str, str], ours: str = "") -> dict[str, Any]:
    """A Node with these labels, of which those are ours."""
    return {"metadata": {"labels": dict(labels), "annotations": {ANNOTATION: ours} if ours else {}}}


@pytest.mark.parametrize(
    ("labels", "ours", "wanted", "change"),
    [
        pytest.param({}, "", {COUNT: "2"}, {COUNT: "2"}, id="none yet"),
        pytest.param({COUNT: "2"}, COUNT, {COUNT: "2"}, None, id="as they should be"),
        pytest.param({COUNT: "9"}, COUNT, {COUNT: "2"}, {COUNT: "2"}, id="changed by somebody"),
        pytest.param({COUNT: "2", PRODUCT: "x"}, f"{COUNT},{PRODUCT}", {COUNT: "2"}, {PRODUCT: None}, id="too many"),
        pytest.param({COUNT: "2"}, f"{COUNT},{PRODUCT}", {COUNT: "2"}, {}, id="removed by somebody"),
        pytest.param({COUNT: "2"}, COUNT, {}, {COUNT: None}, id="none any more"),
        pytest.param({}, "", {}, None, id="never any"),
        pytest.param({"a/b": "c"}, "a/b,deepomatic.com/shared-gpu", {}, {}, id="never another's, whatever is noted"),
    ],
)
def test_changes(labels: Mapping[str, str], ours: str, wanted: Mapping[str, str], change: object) -> None:
    """What is ours becomes what is wanted; the note follows, and labels of others stay."""
    found = changes(node({**FOREIGN, **labels}, ours), wanted)
    assert found.get("metadata", {}).get("labels") == change
    if found:
        assert found["metadata"]["annotations"] == {ANNOTATION: ",".join(sorted(wanted)) or None}


@attrs.define
class World:
    server: FakeApiServer
    wanted: dict[str, str]
    in_place: trio.Event
    has_successor: bool = False

    @property
    def labels(self) -> dict[str, str]:
        """Those that the Node has beside FOREIGN."""
        metadata = self.server.objects[PATH]["metadata"]
        assert metadata["labels"].items() >= FOREIGN.items()
        return {key: value for key, value in metadata["labels"].items() if key not in FOREIGN}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(FakeApiServer(), {COUNT: "2"}, trio.Event())
    world.server.put(PATH, node(FOREIGN))
    world.in_place.set()
    monkeypatch.setattr(node_labels, "find_access", lambda *_: Access("", Path(), Path()))
    monkeypatch.setattr(node_labels, "open_api_server", lambda _: connected(world.server))
    return world


@asynccontextmanager
async def labeling(world: World) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        kept = ("node-a", "", lambda: dict(world.wanted), world.in_place, lambda: world.has_successor)
        nursery.start_soon(node_labels.keep_node_labels, *kept)
        await trio.sleep(1)
        yield
        nursery.cancel_scope.cancel()


@virtual
async def test_life(world: World) -> None:
    """Written once no other daemon serves, changed soon, again after somebody changed them, and removed at the end."""
    world.in_place = trio.Event()
    async with labeling(world):
        assert world.labels == {}
        world.in_place.set()
        await trio.sleep(1)
        assert world.labels == world.wanted
        world.wanted = {COUNT: "3", PRODUCT: "T4"}
        await trio.sleep(WRITE_INTERVAL + INTERVAL)
        assert world.labels == world.wanted
        world.server.put(PATH, node({**FOREIGN, COUNT: "9"}, COUNT))
        await trio.sleep(2 * CHECK_INTERVAL)
        assert world.labels == world.wanted
        world.server.requests.clear()
        await trio.sleep(3600)
        assert set(world.server.requests) == {f"GET {PATH}"}
        assert len(world.server.requests) < 65
        for number in range(100):
            world.wanted = {COUNT: str(number % 2)}
            await trio.sleep(INTERVAL)
        assert world.server.requests.count(f"PATCH {PATH}") <= 100 * INTERVAL / WRITE_INTERVAL + 1
    assert world.labels == {}
    assert world.server.objects[PATH]["metadata"]["annotations"] == {}


@virtual
async def test_successor(world: World) -> None:
    """Labels stay where one takes over, and those of one that was killed until the next one knows better."""
    async with labeling(world):
        world.has_successor = True
    assert world.labels == {COUNT: "2"}
    world.has_successor = False
    world.wanted, requests = {}, len(world.server.requests)
    async with labeling(world):
        await trio.sleep(600)
    assert world.labels == {COUNT: "2"}
    assert len(world.server.requests) == requests


@virtual
async def test_trouble(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One warning a reason, seldom a request, and the end is not kept waiting."""
    world.server.instead["PATCH"] = [Answer(403, {"message": "sgpu-own-node denied request"})]
    async with labeling(world):
        await trio.sleep(3600)
        assert len(world.server.requests) < 250
        (record,) = caplog.records
        assert all(fact in record.message for fact in ("sgpu-own-node denied", "trying again"))
        world.server.delay = 100.0
        stopped_at = trio.current_time()
    assert trio.current_time() - stopped_at <= node_labels.REMOVAL_TIMEOUT


@virtual
async def test_not_in_a_pod(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say so, and leave the rest of the daemon alone."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    in_place = trio.Event()
    in_place.set()
    await node_labels.keep_node_labels("node-a", "", dict, in_place, lambda: False)
    (record,) = caplog.records
    assert "-node-labels api needs sgpu to run in a pod" in record.message


@pytest.mark.process
def test_daemon(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real daemon labels its Node over TLS, and takes that back when it stops."""
    server = FakeApiServer()
    server.put(PATH, {"metadata": {"labels": dict(FOREIGN)}})

    def labels() -> dict[str, str]:
        found: dict[str, str] = server.objects[PATH]["metadata"]["labels"]
        return found

    flags = ("-node-labels", "api", "-node-name", "node-a")
    with in_pod(server, monkeypatch) as command, node.daemon(*flags, command=command) as daemon:
        wait_until(lambda: PRODUCT in labels(), "labels", timeout=60)
        assert labels()[PRODUCT] == "Tesla-T4"
        daemon.terminate()
    assert labels() == FOREIGN
