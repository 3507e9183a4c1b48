"""The demo of dynamic resource allocation: slices, a claim that names memory, a GPU that fails and recovers.

It plays the API server, the scheduler, and the kubelet as far as plugins go.
"""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import attrs
import trio

from sgpu import rpc
from sgpu.api import dra_v1_pb2, pluginregistration_pb2
from sgpu.commands.demo.api_server import ApiObjects, Object, serve_connection
from sgpu.commands.demo.steps import PAUSE, StepFailedError, check_stopped, in_time, running_daemon, say
from sgpu.dra.driver import claim_path
from sgpu.dra.registrar import sockets
from sgpu.dra.slices import DRIVER, PATH
from sgpu.lib import listeners
from sgpu.lib.concurrency import wait_until

Response = TypeVar("Response")

GPUS: Final = 2
NODE: Final = "demo-node"
CLAIM: Final = dra_v1_pb2.Claim(namespace="team", name="train", uid="2f1a7c52-demo")
#: Seconds between looks for a socket or a file.
LOOK: Final = 0.05


@attrs.frozen
class Cluster:
    """The API server, and the directories that a kubelet and a container runtime would look at."""

    api: ApiObjects
    directory: Path
    address: str

    @property
    def devices(self) -> list[Object]:
        """Return all devices in the node's slices, as the scheduler reads them."""
        return [each for _, thing in sorted(self.api.below(PATH).items()) for each in thing["spec"]["devices"]]

    async def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until the API server's objects are as they should be."""
        async with in_time(what):
            await wait_until(condition, self.api.changed)

    def allocate(self, memory: str) -> Object:
        """Create the claim as the scheduler leaves it: it takes the first device without a taint."""
        device = next(each for each in self.devices if not each.get("taints"))
        result = {
            **{"driver": DRIVER, "pool": NODE, "device": device["name"], "request": "gpu", "shareID": "demo-share"},
            "consumedCapacity": {"memory": memory, "shares": "1"},
        }
        path = claim_path(CLAIM.namespace, CLAIM.name)
        thing = {
            "metadata": {"namespace": CLAIM.namespace, "name": CLAIM.name, "uid": CLAIM.uid},
            "status": {
                "allocation": {"devices": {"results": [result]}},
                "reservedFor": [{"resource": "pods", "name": "train-0", "uid": "demo-pod"}],
            },
        }
        self.api.objects[path] = thing
        return device


@asynccontextmanager
async def running_cluster(directory: Path) -> AsyncIterator[Cluster]:
    """Serve the API server on a free port of this machine, as `kubectl proxy` does."""
    api = ApiObjects()
    api.put(f"/api/v1/nodes/{NODE}", {"metadata": {"name": NODE}, "status": {}})
    listening = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listeners.serve, listening, partial(serve_connection, api))
        yield Cluster(api, directory, f"127.0.0.1:{listening[0].socket.getsockname()[1]}")
        nursery.cancel_scope.cancel()


async def show(directory: Path) -> None:
    """Show it. Raises StepFailedError."""
    faults, cdi = directory / "faults", directory / "cdi"
    plugins, registry = directory / "plugins", directory / "registry"
    for path in (plugins, registry, directory / "device-plugins"):
        path.mkdir()
    async with running_cluster(directory) as cluster:
        flags = {
            "-api": "dra",
            "-api-server": cluster.address,
            "-node-name": NODE,
            "-plugin-directory": str(directory / "device-plugins"),
            "-dra-plugin-directory": str(plugins),
            "-dra-registry-directory": str(registry),
            "-cdi-directory": str(cdi),
        }
        with running_daemon(GPUS, faults, *(word for pair in flags.items() for word in pair)) as process:
            say(f"The daemon starts with {GPUS} simulated GPUs, and publishes a ResourceSlice.")
            await cluster.wait_until(f"{GPUS} devices published", lambda: len(cluster.devices) == GPUS)
            _show_devices(cluster)
            await trio.sleep(PAUSE)
            say("The kubelet finds the driver's socket, and asks what it is.")
            service = await _register(sockets(plugins, registry)[0].registration)
            await trio.sleep(PAUSE)
            device = cluster.allocate("4Gi")
            say(f"A claim asks for 4 GiB. The scheduler allocates {device['name']}, and the kubelet prepares it.")
            await _prepare(service, cdi)
            await trio.sleep(PAUSE)
            say("GPU 0 fails.")
            faults.write_text("0 it has fallen off the bus\n")
            await cluster.wait_until("a taint", lambda: any(each.get("taints") for each in cluster.devices))
            _show_devices(cluster)
            await trio.sleep(PAUSE)
            say("GPU 0 is back. It is published within 10 s.")
            faults.unlink()
            await cluster.wait_until("no taint", lambda: not any(each.get("taints") for each in cluster.devices))
            _show_devices(cluster)
            await trio.sleep(PAUSE)
            say("The pod ends, and the kubelet unprepares its claim.")
            await _unprepare(service, cdi)
            await trio.sleep(PAUSE)
            say("The daemon receives SIGTERM.")
            process.send_signal(signal.SIGTERM)
            await check_stopped(process, directory, "*/**/*.sock")


async def _register(socket: Path) -> Path:
    """Do as the kubelet does with a new plugin, and return the socket of its service."""
    async with in_time(str(socket)):
        while not await trio.Path(socket).exists():  # noqa: ASYNC110  # it comes within a moment
            await trio.sleep(LOOK)
    ask, told = pluginregistration_pb2.InfoRequest(), pluginregistration_pb2.RegistrationStatus(plugin_registered=True)
    info = await _call(socket, "/pluginregistration.Registration/GetInfo", ask, pluginregistration_pb2.PluginInfo)
    answer = pluginregistration_pb2.RegistrationStatusResponse
    await _call(socket, "/pluginregistration.Registration/NotifyRegistrationStatus", told, answer)
    print(f"    {info.type} {info.name}: {', '.join(info.supported_versions)}", flush=True)
    return Path(info.endpoint)


async def _prepare(service: Path, cdi: Path) -> None:
    request = dra_v1_pb2.NodePrepareResourcesRequest(claims=[CLAIM])
    method = "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources"
    answer = (await _call(service, method, request, dra_v1_pb2.NodePrepareResourcesResponse)).claims[CLAIM.uid]
    if answer.error:
        raise StepFailedError(answer.error)
    (file,) = await trio.Path(cdi).iterdir()
    print(f"    The container gets {', '.join(answer.devices[0].cdi_device_ids)}; {file.name} has:")
    for each in json.loads(await file.read_text())["devices"]:
        for variable in sorted(each["containerEdits"]["env"]):
            print(f"    {variable}", flush=True)


async def _unprepare(service: Path, cdi: Path) -> None:
    request = dra_v1_pb2.NodeUnprepareResourcesRequest(claims=[CLAIM])
    method = "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodeUnprepareResources"
    answer = (await _call(service, method, request, dra_v1_pb2.NodeUnprepareResourcesResponse)).claims[CLAIM.uid]
    left = [path.name for path in await trio.Path(cdi).iterdir()]
    if answer.error or left:
        raise StepFailedError(f"the claim's end: {answer.error}, files left: {left}")
    print("    Its CDI file is gone.", flush=True)


async def _call(socket: Path, method: str, request: object, response: Callable[[], Response]) -> Response:
    async with in_time(method):
        return await rpc.unary_call(socket, method, request, response)
    raise AssertionError("in_time raises")


def _show_devices(cluster: Cluster) -> None:
    for each in cluster.devices:
        capacity = ", ".join(f"{name} {of['value']}" for name, of in sorted(each["capacity"].items()))
        taints = "".join(f"   {taint['key']}={taint['value']}:{taint['effect']}" for taint in each.get("taints", ()))
        print(f"    {each['name']}   {capacity}{taints}", flush=True)
