"""The DRA front-end between a kubelet on grpcio and an API server, in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs
import pytest
import trio
import trio.testing
from daemon_process import short_directory
from dra_claims import NAMESPACE, NODE, RESOURCE, claim, result
from fake_api_server import Answer, FakeApiServer, serving
from fake_plugin_manager import KNOWN, FakePluginManager
from virtual_clock import real
from watching import wait_until as poll

from sgpu.config.settings import Settings
from sgpu.dra import checkpoint, frontend, publisher, registrar, sharers
from sgpu.dra.driver import claim_path, health
from sgpu.dra.prepared import Places, PreparedClaims
from sgpu.dra.slices import DRIVER, PATH
from sgpu.driver.fault_file import read_boot_id
from sgpu.driver.simulated import simulated_gpus, with_faults
from sgpu.kubeapi import Access, open_api_server
from sgpu.lib.concurrency import wait_until
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, Target
from sgpu.node.claims import ClaimedUnit, Pod, PreparedClaim
from sgpu.node.container import Container
from sgpu.node.edits import AllocationOptions, HostPaths
from sgpu.node.limits import WantedLimits
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations

T = TypeVar("T")
GPUS = simulated_gpus(2)
OPTIONS = AllocationOptions(HostPaths("/host/nvidia", "/usr/local/nvidia", "/dev"))
CLAIM = (NAMESPACE, "c", "u-1")
TIMEOUT = 60


@attrs.frozen
class World:
    """A node with its sgpu, kubelet and API server."""

    root: Path
    node: NodeState
    server: FakeApiServer
    access: Access
    kubelet: FakePluginManager
    registrations: Registrations
    settings: Settings
    leaving: trio.Event

    def claims(self, *claims: dict[str, object]) -> None:
        """The API server has these, under the uid that each says."""
        for each in claims:
            namespace, name = each["metadata"]["namespace"], each["metadata"]["name"]  # type: ignore[index]
            self.server.objects[claim_path(namespace, name)] = each

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in (self.root / "cdi").iterdir())


async def thread(function: Callable[[], T]) -> T:
    """What the kubelet does, which waits for this event loop."""
    return await trio.to_thread.run_sync(function)


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch,
    *,
    factor: float = 0,
    failure: str = "open",
    known: tuple[str, ...] = KNOWN,
    server: FakeApiServer | None = None,
    root: Path | None = None,
) -> AsyncIterator[World]:
    server = server or FakeApiServer()
    server.objects.setdefault(f"/api/v1/nodes/{NODE}", {"metadata": {"name": NODE, "uid": "n"}, "status": {}})
    node, counters = NodeState(Policy(RESOURCE, 4, limit_factor=factor), 5), Counters()
    node.set_gpus(GPUS)
    registrations, leaving = Registrations(counters), trio.Event()
    with nullcontext(root) if root else short_directory() as root, trio.fail_after(TIMEOUT):
        for name in ("cdi", "registry", "account"):
            (root / name).mkdir()
        settings = Settings(
            api="dra",
            node_name=NODE,
            dra_plugin_directory=str(root / "plugins"),
            dra_registry_directory=str(root / "registry"),
            cdi_directory=str(root / "cdi"),
            memory_limits_failure=failure,
        )
        with serving(server, root / "account") as access, FakePluginManager(root / "registry", known) as kubelet:
            monkeypatch.setattr(frontend, "find_access", lambda *_: access)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(frontend.run, node, settings, OPTIONS, registrations, counters, str, leaving)
                yield World(root, node, server, access, kubelet, registrations, settings, leaving)
                nursery.cancel_scope.cancel()


async def registered(world: World) -> None:
    await thread(partial(world.kubelet.wait_for, lambda: DRIVER in world.kubelet.plugins))
    if not world.server.instead:
        await published(world)


async def published(world: World) -> None:
    """Wait until there is no request under way, which would be left behind."""
    await thread(partial(poll, lambda: world.server.below(PATH), "published"))


@real
async def test_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the slice to the claim's end: what the kubelet gets, what the runtime gets, and what is left."""
    async with running(monkeypatch) as world:
        await registered(world)
        assert world.kubelet.plugins == {DRIVER: str(world.root / f"plugins/{DRIVER}/dra.sock")}
        world.claims(claim(result(GPUS[0].uuid)))
        for _ in range(2):  # the kubelet asks again after its restart
            answer = (await thread(partial(world.kubelet.prepare, CLAIM))).claims
            (device,) = answer["u-1"].devices
            assert (list(device.request_names), device.pool_name, device.share_id) == (["gpu"], NODE, "s-1")
            assert device.device_name == GPUS[0].uuid.lower()
            assert device.cdi_device_ids == ["k8s.gpu.deepomatic.com/claim=u-1-s-1"]
            assert world.files == ["k8s.gpu.deepomatic.com-claim_u-1.json"]
        assert world.registrations.by_resource[RESOURCE].registered
        assert world.registrations.by_resource[RESOURCE].streams == 1
        assert world.registrations.by_resource[RESOURCE].unpublished() == ""  # type: ignore[misc]
        for _ in range(2):
            answered = (await thread(partial(world.kubelet.unprepare, CLAIM))).claims
            assert {uid: each.error for uid, each in answered.items()} == {"u-1": ""}
            assert world.files == []


@real
async def test_each_claim_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can't be prepared says why, and the others are prepared."""
    async with running(monkeypatch) as world:
        await registered(world)
        world.claims(claim(result(GPUS[0].uuid)), claim(result("GPU-z", "s-2"), uid="u-2", name="d"))
        asked = (CLAIM, (NAMESPACE, "d", "u-2"), (NAMESPACE, "none", "u-3"))
        answer = (await thread(partial(world.kubelet.prepare, *asked))).claims
        assert len(answer["u-1"].devices) == 1
        assert "claim team/d: its GPU GPU-z is gone" in answer["u-2"].error
        assert "claim team/none: it does not exist any more" in answer["u-3"].error
        assert world.node.claims.keys() == {"u-1"}


@real
async def test_server_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the API server says is in the pod's events."""
    server = FakeApiServer()
    async with running(monkeypatch, server=server) as world:
        await registered(world)
        server.tokens.clear()
        answer = (await thread(partial(world.kubelet.prepare, CLAIM))).claims
        assert "401" in answer["u-1"].error


@real
async def test_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """All devices at once, and again when one changes."""
    async with running(monkeypatch) as world:
        await registered(world)
        stream = await thread(world.kubelet.health)
        first = await thread(lambda: next(stream))
        assert [(each.device.pool_name, each.health, each.message) for each in first.devices] == [(NODE, 1, "")] * 2
        world.node.set_gpus(with_faults(GPUS, {1: "XID 79"}, 1.0))
        second = await thread(lambda: next(stream))
        assert [(each.health, each.message) for each in second.devices] == [(1, ""), (2, "XID 79")]


def test_health_of_instances() -> None:
    """Each has its own reason beside its GPU's: a healthy GPU can have an instance that is not."""
    (gpu,) = simulated_gpus(1, profiles="1g.5gb,1g.5gb")
    first, second = gpu.instances
    gpu = attrs.evolve(gpu, instances=(first, attrs.evolve(second, reason="XID 94")))
    seen = health((gpu,), NODE, 1.0).devices
    assert [(each.device.device_name, each.health, each.message) for each in seen] == [
        (first.uuid.lower(), 1, ""),
        (second.uuid.lower(), 2, "XID 94"),
    ]


@pytest.mark.parametrize("name", [f"registry/{DRIVER}-reg.sock", f"plugins/{DRIVER}/dra.sock"])
@real
async def test_a_socket_that_is_removed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Both are served again, and the kubelet finds them."""
    async with running(monkeypatch) as world:
        await registered(world)
        world.claims(claim(result(GPUS[0].uuid)))
        (world.root / name).unlink()
        await thread(partial(world.kubelet.wait_for, lambda: world.kubelet.found == 2))
        assert (await thread(partial(world.kubelet.prepare, CLAIM))).claims["u-1"].devices


@real
async def test_handing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two daemons serve for a moment, the kubelet calls the newer one, and each knows what the other prepares."""
    async with running(monkeypatch) as world:
        await registered(world)
        world.claims(claim(result(GPUS[0].uuid)), claim(result(GPUS[0].uuid, "s-2"), uid="u-2", name="d"))
        await thread(partial(world.kubelet.prepare, CLAIM))
        other, counters = NodeState(Policy(RESOURCE, 4), 5), Counters()
        other.set_gpus(GPUS)
        served = (other, world.settings, OPTIONS, Registrations(counters), counters, str, trio.Event())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(frontend.run, *served)
            await thread(partial(world.kubelet.wait_for, lambda: world.kubelet.found == 2))
            assert world.kubelet.plugins[DRIVER].endswith("dra-2.sock")
            await thread(partial(world.kubelet.prepare, (NAMESPACE, "d", "u-2")))
            await wait_until(lambda: len(world.node.claims) == 2, world.node.changed)
            assert world.node.claims == other.claims
            shares = [unit.shares[0].number for each in other.claims.values() for unit in each.units]
            assert sorted(shares) == [0, 1]
            nursery.cancel_scope.cancel()
        await thread(partial(world.kubelet.wait_for, lambda: not world.kubelet.plugins[DRIVER].endswith("-2.sock")))
        await thread(partial(world.kubelet.unprepare, CLAIM, (NAMESPACE, "d", "u-2")))
        assert (world.node.claims, world.files) == ({}, [])


@real
async def test_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that leaves publishes nothing any more, and goes on preparing claims."""
    monkeypatch.setattr(publisher, "INTERVAL", 0.05)
    async with running(monkeypatch) as world:
        await registered(world)
        world.claims(claim(result(GPUS[0].uuid)))
        world.leaving.set()
        await trio.testing.wait_all_tasks_blocked()
        for path in world.server.below(PATH):
            world.server.remove(path)
        assert (await thread(partial(world.kubelet.prepare, CLAIM))).claims["u-1"].devices
        await trio.sleep(1)  # twenty times as long as it takes to make them again
        assert not world.server.below(PATH)


@real
async def test_an_older_kubelet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One that knows no shares of a device does not take the driver, and the log says what it takes."""
    async with running(monkeypatch, known=("v1beta1.DRAPlugin",)) as world:
        await thread(partial(world.kubelet.wait_for, lambda: world.kubelet.refused))
        await published(world)
        await thread(partial(poll, lambda: "needs Kubernetes 1.36" in caplog.text, "logged"))
        assert not world.registrations.by_resource[RESOURCE].registered


@real
async def test_beside_a_device_plugin(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As long as the kubelet has the resource from a device plugin, nothing is served, and the log says what to do."""
    monkeypatch.setattr(frontend, "BESIDE_INTERVAL", 0.01)
    server = FakeApiServer()
    path = f"/api/v1/nodes/{NODE}"
    server.put(path, {"metadata": {}, "status": {"allocatable": {RESOURCE: "100"}}})
    async with running(monkeypatch, server=server) as world:
        await thread(partial(poll, lambda: "or use -api device-plugin" in caplog.text, "logged"))
        assert list((world.root / "registry").iterdir()) == []
        server.put(path, {"metadata": {}, "status": {"allocatable": {RESOURCE: "0"}}})
        await registered(world)


@real
async def test_a_restart_without_the_api_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods that end do not wait for it."""
    server = FakeApiServer()
    unit = ClaimedUnit("s-1", GPUS[0].uuid, RESOURCE, (Share(GPUS[0].uuid, 0),))
    with short_directory() as root:
        prepared = PreparedClaim("u-1", NAMESPACE, "c", (), (unit,))
        checkpoint.save(root / "plugins" / DRIVER, read_boot_id(), [prepared])
        server.instead["GET"] = [Answer(503, {"message": "away"})]
        async with running(monkeypatch, server=server, root=root) as world:
            await registered(world)
            assert world.node.claims == {"u-1": prepared}
            assert not (await thread(partial(world.kubelet.unprepare, CLAIM))).claims["u-1"].error
            assert world.node.claims == {}


@real
async def test_deleted_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that was deleted while sgpu was away, and whose kubelet does not come back, is forgotten."""
    server = FakeApiServer()
    async with running(monkeypatch, server=server) as world:
        await registered(world)
        world.claims(claim(result(GPUS[0].uuid)), claim(result(GPUS[0].uuid, "s-2"), uid="u-2", name="d"))
        await thread(partial(world.kubelet.prepare, CLAIM, (NAMESPACE, "d", "u-2")))
        del server.objects[claim_path(NAMESPACE, "c")]
        async with open_api_server(world.access) as api:
            places = Places(world.root / "plugins" / DRIVER, world.root / "cdi")
            claims = PreparedClaims(world.node, places, read_boot_id(), OPTIONS)
            await frontend.forget_deleted(api, world.node, claims)
        assert world.node.claims.keys() == {"u-2"}
        assert world.files == ["k8s.gpu.deepomatic.com-claim_u-2.json"]


@pytest.mark.parametrize(
    ("failure", "state", "error"),
    [
        pytest.param("closed", LimitState.ENFORCED, "", id="enforced"),
        pytest.param("open", LimitState.REFUSED, "", id="open"),
        pytest.param("closed", LimitState.REFUSED, "claim team/c: no memory limit: no R615", id="closed"),
    ],
)
@real
async def test_limits(monkeypatch: pytest.MonkeyPatch, failure: str, state: LimitState, error: str) -> None:
    """A claim is prepared once its pod is limited, or can't be where that is allowed."""
    async with running(monkeypatch, factor=1, failure=failure) as world:
        await registered(world)
        world.claims(claim(result(GPUS[0].uuid)))
        enforcement = world.node.enforcement

        async def limit() -> None:
            await wait_until(lambda: bool(world.node.claims), world.node.changed)
            target = Target(GPUS[0].uuid, "/pod")
            enforcement.want(WantedLimits({target: 5}, {}, {Share(GPUS[0].uuid, 0): ("/pod",)}))
            table = enforcement.table().values()
            world.node.set_limits(LimitAnswer(each, state, each.hard, reason="no R615") for each in table)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(limit)
            answer = (await thread(partial(world.kubelet.prepare, CLAIM))).claims["u-1"]
        assert error in answer.error
        assert bool(answer.error) is bool(error)


@real
async def test_a_pod_that_comes_later(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The kubelet does not ask again for a claim that is prepared: the claim itself says who else has it."""
    monkeypatch.setattr(sharers, "RETRY", 0.1)
    monkeypatch.setattr("sgpu.kubeapi.client.REQUEST_TIMEOUT", 0.3)
    async with running(monkeypatch) as world:
        await registered(world)
        world.claims(claim(result(GPUS[0].uuid)))
        await thread(partial(world.kubelet.prepare, CLAIM))
        both = [{"resource": "pods", "name": name, "uid": f"{name}-1"} for name in "pq"]
        world.claims(claim(result(GPUS[0].uuid), reservedFor=both))
        path = f"GET {claim_path(NAMESPACE, 'c')}"
        world.server.instead[path] = [Answer(503, {"message": "away"})]
        containers = tuple(Container(NAMESPACE, name, "main") for name in "pq")
        world.node.set_claimants({Share(GPUS[0].uuid, 0): containers})
        await thread(partial(poll, lambda: "pods q use claim team/c" in caplog.text, "logged"))
        del world.server.instead[path]
        await wait_until(lambda: len(world.node.claims["u-1"].pods) == 2, world.node.changed)
        kept = checkpoint.read(world.root / "plugins" / DRIVER, read_boot_id())
        assert kept["u-1"].pods == (Pod("p-1", "p"), Pod("q-1", "q"))
        world.server.requests.clear()
        world.node.set_claimants({Share(GPUS[0].uuid, 0): (*containers, Container(NAMESPACE, "p", "sidecar"))})
        await trio.testing.wait_all_tasks_blocked()
        assert path not in world.server.requests


@real
async def test_directory_is_missing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A kubelet whose directories are elsewhere is one warning, and waited for."""
    paths = registrar.sockets(tmp_path / "plugins", tmp_path / "none")
    with trio.move_on_after(0.5):
        await registrar.stay_registered(paths, {}, Registrations(Counters()), Counters())
    (record,) = caplog.records
    assert "-dra-registry-directory" in record.message
