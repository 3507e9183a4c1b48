"""Measure `kubectl sgpu` with many nodes: `tox -e cluster-view`. Takes half a minute.

Each node is a port of its own, on which the daemon's own HTTP server answers with 8 GPUs and 40 containers; one in ten
takes the connection and never answers. In front of them is what does the API server's part: it lists the pods, and
hands each request on to the pod's port. The command is the real one, in its own process, from start to end.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import attrs
import trio
from fake_api import pod, pod_list
from fake_status import GPU, SNAPSHOT

from sgpu.commands.cluster.view import VIEWS
from sgpu.node.usage import ContainerUse
from sgpu.observe import http
from sgpu.observe.snapshot import encode

#: Seconds that it may take, and nodes of which one is silent.
AIM: Final = 10.0
ONE_SILENT_OF: Final = 10
GPUS: Final = 8
USES: Final = tuple(ContainerUse("team", f"server-{n}", "main", 2, n << 30, 7, 1) for n in range(5))
STATUS: Final = encode(
    attrs.evolve(SNAPSHOT, gpus=tuple(attrs.evolve(GPU, uuid=f"GPU-{n}", containers=USES) for n in range(GPUS)))
)


async def status(_: http.Request) -> http.Response:
    """Answer as a daemon does."""
    return http.Response(200, STATUS, "application/json")


async def keep_silent(stream: trio.SocketStream) -> None:
    """Take a request, and never answer."""
    async with stream:
        await trio.sleep_forever()


async def hand_on(pods: bytes, stream: trio.SocketStream) -> None:
    """Do the API server's part for one connection."""
    async with stream:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += await stream.receive_some()
        path = request.split()[1].decode()
        if "/proxy/" not in path:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(pods), pods))
            return
        port = int(path.partition(":")[2].partition("/")[0])
        async with await trio.open_tcp_stream("127.0.0.1", port) as node:
            await node.send_all(b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            async for chunk in node:
                await stream.send_all(chunk)


def with_port(node: Mapping[str, Any], port: int) -> Mapping[str, Any]:
    """Return the pod with this port."""
    node["spec"]["containers"][0]["ports"][0]["containerPort"] = port
    return node


async def run(nodes: int) -> bool:
    """Print a line for each view. Returns whether all are fast enough, and each node is a row."""
    async with trio.open_nursery() as nursery:
        pods = []
        for number in range(nodes):
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            pods.append(with_port(pod(f"node{number}"), listener.socket.getsockname()[1]))
            if number % ONE_SILENT_OF:
                nursery.start_soon(http.serve, [listener], {"/status": status})
            else:
                nursery.start_soon(trio.serve_listeners, keep_silent, [listener])
        (front,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1000)
        nursery.start_soon(trio.serve_listeners, partial(hand_on, pod_list(*pods)), [front])
        address = f"-address=http://127.0.0.1:{front.socket.getsockname()[1]}"
        answered = f"{nodes - -(-nodes // ONE_SILENT_OF)} of {nodes} nodes answered"
        print(f"{nodes} nodes of {GPUS} GPUs, {nodes // ONE_SILENT_OF} silent; {len(STATUS) >> 10} KiB from each")
        well = True
        for view in VIEWS:
            begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "sgpu", "cluster", view, address]
            done = await trio.run_process(command, capture_stdout=True)
            seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
            processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            well = well and seconds <= AIM and answered in done.stdout.decode()
            last = done.stdout.decode().splitlines()[-1]
            print(f"{view:8} {seconds:5.1f} s, {processor:4.1f} s of a processor  {last}", flush=True)
        nursery.cancel_scope.cancel()
    return well


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=500)
    if not trio.run(run, parser.parse_args().nodes):
        sys.exit(f"slower than {AIM:g} s, or an answer was missed")
