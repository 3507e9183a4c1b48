"""The demo of the device plugin: a registration, allocations, a kubelet restart, a GPU that fails and recovers."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from sgpu import rpc
from sgpu.api import v1beta1_grpc, v1beta1_pb2
from sgpu.commands.demo.steps import PAUSE, check_stopped, in_time, running_daemon, say
from sgpu.deviceplugin import registration
from sgpu.lib.concurrency import Broadcast, wait_until
from sgpu.node.shares import Share

Response = TypeVar("Response")

GPUS: Final = 3
SHARES: Final = 10


class DemoKubelet(v1beta1_grpc.RegistrationServicer):
    """As much of a kubelet as it takes to show a device plugin: it is registered with, lists, and allocates."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._registered = trio.Event()
        self._changed = Broadcast()
        self.socket = Path()
        self.resource = ""
        self.health: dict[str, str] = {}

    async def Register(self, request: v1beta1_pb2.RegisterRequest) -> v1beta1_pb2.Empty:
        self.socket = self._directory / request.endpoint
        self.resource = request.resource_name
        # As the real one does: call back before answering.
        await self.call("GetDevicePluginOptions", v1beta1_pb2.Empty(), v1beta1_pb2.DevicePluginOptions)
        self._registered.set()
        return v1beta1_pb2.Empty()

    async def call(self, method: str, request: object, response_type: Callable[[], Response]) -> Response:
        """Call the plugin."""
        return await rpc.unary_call(self.socket, f"/v1beta1.DevicePlugin/{method}", request, response_type)

    async def allocate(self, count: int) -> v1beta1_pb2.ContainerAllocateResponse:
        """Admit a pod that asks for `count` shares, and return what its container gets."""
        free = [share_id for share_id, health in self.health.items() if health == "Healthy"]
        question = v1beta1_pb2.PreferredAllocationRequest()
        question.container_requests.add(available_deviceIDs=free, allocation_size=count)
        preferred = await self.call("GetPreferredAllocation", question, v1beta1_pb2.PreferredAllocationResponse)
        chosen = preferred.container_responses[0].deviceIDs
        request = v1beta1_pb2.AllocateRequest()
        request.container_requests.add(devices_ids=chosen)
        for share_id in chosen:
            del self.health[share_id]  # in use, and so no longer free
        return (await self.call("Allocate", request, v1beta1_pb2.AllocateResponse)).container_responses[0]

    async def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until the list of devices is as it should be."""
        async with in_time(what):
            await wait_until(condition, self._changed)

    async def watch(self) -> None:
        """Follow the plugin's list once it has registered, as long as there is one."""
        await self._registered.wait()
        async with rpc.open_channel(self.socket) as channel:
            lists = channel.streaming(
                "/v1beta1.DevicePlugin/ListAndWatch", v1beta1_pb2.Empty(), v1beta1_pb2.ListAndWatchResponse
            )
            with suppress(trio.BrokenResourceError):  # the plugin hung up, which the steps notice where it matters
                async for response in lists:
                    self.health = {device.ID: device.health for device in response.devices}
                    self._changed.notify()

    def healthy_by_gpu(self) -> Counter[str]:
        """Count the healthy shares of each GPU."""
        return Counter(_gpu(share_id) for share_id, health in self.health.items() if health == "Healthy")


@asynccontextmanager
async def running_kubelet(directory: Path) -> AsyncIterator[DemoKubelet]:
    """Run a kubelet that listens in `directory` while the context is open."""
    demo_kubelet = DemoKubelet(directory)
    handler = partial(rpc.serve_connection, rpc.routes([demo_kubelet.service]))
    with rpc.listen(directory / registration.SOCKET) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.serve_listeners, handler, [listener]))
            nursery.start_soon(demo_kubelet.watch)
            yield demo_kubelet
            nursery.cancel_scope.cancel()


async def show(directory: Path) -> None:
    """Show it. Raises StepFailedError."""
    faults = directory / "faults"
    total = GPUS * SHARES
    flags = ("-gpu-duplication-factor", str(SHARES), "-plugin-directory", str(directory))
    with running_daemon(GPUS, faults, *flags) as process:
        say(f"The daemon starts before there is a kubelet, with {GPUS} simulated GPUs of {SHARES} shares.")
        await trio.sleep(PAUSE)
        async with running_kubelet(directory) as first:
            say("A kubelet starts.")
            await first.wait_until(f"{total} devices", lambda: len(first.health) == total)
            say(f"It receives {len(first.health)} devices of {first.resource}:")
            _show_devices(first)
            for number, count in enumerate((1, 1, 2), start=1):
                await trio.sleep(PAUSE)
                _show_allocation(number, count, await first.allocate(count))
            await trio.sleep(PAUSE)
        say("The kubelet stops, and starts again.")
        started = trio.current_time()
        async with running_kubelet(directory) as second:
            await second.wait_until("devices listed again", lambda: len(second.health) == total)
            say(f"{len(second.health)} devices listed again after {1000 * (trio.current_time() - started):.1f} ms.")
            await trio.sleep(PAUSE)
            say("GPU 1 fails.")
            faults.write_text("1 it has fallen off the bus\n")
            await second.wait_until("GPU 1 down", lambda: len(second.healthy_by_gpu()) == GPUS - 1)
            _show_devices(second)
            await trio.sleep(PAUSE)
            say("GPU 1 is back.")
            faults.unlink()
            await second.wait_until("GPU 1 back", lambda: len(second.healthy_by_gpu()) == GPUS)
            _show_devices(second)
            await trio.sleep(PAUSE)
            say("The daemon receives SIGTERM.")
            process.send_signal(signal.SIGTERM)
            await check_stopped(process, directory, "sgpu-*.sock")


def _show_devices(seen: DemoKubelet) -> None:
    healthy = seen.healthy_by_gpu()
    for uuid, shares in Counter(map(_gpu, seen.health)).items():
        print(f"    {uuid}   {healthy[uuid]:3d} of {shares} healthy")
    first, last = next(iter(seen.health)), list(seen.health)[-1]
    print(f"    ids: {first} … {last}", flush=True)


def _show_allocation(number: int, count: int, response: v1beta1_pb2.ContainerAllocateResponse) -> None:
    say(f"Pod {number} asks for {count} share(s); its container gets:")
    for name, value in sorted(response.envs.items()):
        print(f"    {name}={value}", flush=True)


def _gpu(share_id: str) -> str:
    share = Share.parse(share_id)
    return share.uuid if share else share_id
