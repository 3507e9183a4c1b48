"""Calls of the plugin's methods replayed in this process, against the daemon's own server, to be counted and timed.

The peer sends bytes that were put together beforehand, as a kubelet's gRPC would, and waits on nothing but its socket:
what changes from one version to the next is the server's work alone.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import Any, Final

import attrs
import hpack
import trio
import trio.testing
from google.protobuf.message import Message
from rpc_peer import PREFACE, http2_frame, message, settings, window_update

from sgpu import rpc
from sgpu.api import v1beta1_pb2
from sgpu.deviceplugin.servicer import PluginContext, Streams, plugin_routes
from sgpu.driver.simulated import simulated_gpus
from sgpu.node.edits import AllocationOptions, HostPaths
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters

RESOURCE: Final = "deepomatic.com/shared-gpu"
PATHS: Final = HostPaths("/home/kubernetes/bin/nvidia", "/usr/local/nvidia", "/dev")
#: Bytes that may be on their way to the peer: more than are sent before the connection ends.
WINDOW: Final = 1 << 30
RECEIVE_BYTES: Final = 1 << 20
FRAME_HEADER: Final = 9
END_STREAM: Final = 0x1
#: The types of frames that may have that flag: DATA and HEADERS.
CARRIES_CALLS: Final = (0x0, 0x1)
#: What grpc-go sends. From the second call on, most of it is an index into what was sent before.
HEADERS: Final = (
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("user-agent", "grpc-go/1.78.0"),
    ("te", "trailers"),
)
#: Functions that ask the kernel for something, by the names that they have in Python.
SYSTEM_CALLS: Final = frozenset(
    {"read", "write", "recv", "recv_into", "send", "sendmsg", "sendall", "register", "modify"}
)


def offer(gpus: int, shares: int) -> PluginContext:
    """A node with GPUs like those of a real one, offered as the daemon does by default."""
    controls = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
    node = NodeState(Policy(RESOURCE, shares), interval=5)
    node.set_gpus(
        tuple(
            attrs.evolve(gpu, simulated=False, device_nodes=(f"nvidia{minor}", *controls))
            for minor, gpu in enumerate(simulated_gpus(gpus))
        )
    )
    return PluginContext(node, RESOURCE, AllocationOptions(PATHS))


def requests(context: PluginContext) -> Mapping[str, Message]:
    """For each method, what a kubelet asks while nothing is taken yet: one share; which 4 of all."""
    ids = [share_id for offer in context.node.offered(RESOURCE) for share_id in offer.share_ids()]
    allocate, preferred = v1beta1_pb2.AllocateRequest(), v1beta1_pb2.PreferredAllocationRequest()
    allocate.container_requests.add(devices_ids=ids[:1])
    preferred.container_requests.add(available_deviceIDs=ids, allocation_size=4)
    return {"Allocate": allocate, "GetPreferredAllocation": preferred}


@attrs.frozen
class Answer:
    """The answer to one call: its bytes, and the number of frames."""

    data: bytes
    frames: int


class Peer:
    """The client's end of a connection: one call after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._headers = hpack.Encoder()
        self._stream_id = -1
        self._unread = b""

    async def greet(self) -> None:
        self._sock.send(PREFACE + settings(initial_window_size=WINDOW) + window_update(0, WINDOW))
        await self.rest()
        self._sock.recv(RECEIVE_BYTES)

    async def rest(self) -> None:
        """Until everyone waits: then the next call finds the server as the one before did."""
        await trio.testing.wait_all_tasks_blocked()

    def encode(self, method: str, request: Message) -> bytes:
        """The next call, to be `send`ed."""
        self._stream_id += 2
        block = self._headers.encode([(":path", f"/v1beta1.DevicePlugin/{method}"), *HEADERS])
        body = message(request.SerializeToString())
        parts = [body[start : start + 16384] for start in range(0, len(body), 16384)]
        ends = [*(0 for _ in parts[1:]), END_STREAM]
        frames = [http2_frame(0x0, flags, self._stream_id, part) for part, flags in zip(parts, ends, strict=True)]
        return http2_frame(0x1, 0x4, self._stream_id, block) + b"".join(frames)

    async def send(self, call: bytes) -> Answer:
        """Send it, and wait until it is answered."""
        answer, count, ended = b"", 0, False
        while call or not ended:
            if call:
                call = call[self._sock.send(call) :]
            await trio.lowlevel.wait_readable(self._sock)
            received = self._sock.recv(RECEIVE_BYTES)
            assert received, "the server closed the connection"
            self._unread += received
            while len(self._unread) >= FRAME_HEADER:
                size = FRAME_HEADER + int.from_bytes(self._unread[:3], "big")
                frame, self._unread = self._unread[:size], self._unread[size:]
                answer, count = answer + frame, count + 1
                ended = frame[3] in CARRIES_CALLS and bool(frame[4] & END_STREAM)
        return Answer(answer, count)


@asynccontextmanager
async def connected(context: PluginContext) -> AsyncIterator[Peer]:
    """A server of this resource, as the daemon runs it for one connection, and its peer."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WINDOW)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        async with trio.open_nursery() as nursery:
            table = plugin_routes(context, Streams())
            nursery.start_soon(partial(rpc.serve_connection, table, stream, ended=Counters().called))
            peer = Peer(ours)
            await peer.greet()
            yield peer
            nursery.cancel_scope.cancel()


class Counts(trio.abc.Instrument):
    """Counts what the server's tasks do, as `Counter` of words."""

    def __init__(self) -> None:
        self._peer = trio.lowlevel.current_task()
        self.of: Counter[str] = Counter()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.of["tasks"] += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is not self._peer:
            self.of["turns"] += 1
            sys.setprofile(self._profile)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:  # noqa: ANN401
        if event in ("call", "c_call"):
            self.of["calls of functions"] += 1
        if event == "c_call" and argument.__name__ in SYSTEM_CALLS:
            self.of["system calls"] += 1


async def count(peer: Peer, method: str, request: Message, calls: int) -> Mapping[str, float]:
    """Return the counts of one call, averaged over `calls`."""
    counts = Counts()
    trio.lowlevel.add_instrument(counts)
    try:
        for _ in range(calls):
            answer = await peer.send(peer.encode(method, request))
            counts.of.update({"frames": answer.frames, "bytes": len(answer.data)})
            await peer.rest()
    finally:
        trio.lowlevel.remove_instrument(counts)
    return {what: number / calls for what, number in counts.of.items()}


@attrs.frozen
class Held:
    """The process's memory blocks, tasks and descriptors."""

    blocks: int
    tasks: int
    descriptors: int

    def more_than(self, before: Held) -> dict[str, int]:
        return {name: number - getattr(before, name) for name, number in attrs.asdict(self).items()}


def held() -> Held:
    """Now, without garbage."""
    gc.collect()
    tasks = trio.lowlevel.current_statistics().tasks_living
    return Held(sys.getallocatedblocks(), tasks, len(os.listdir("/proc/self/fd")))
