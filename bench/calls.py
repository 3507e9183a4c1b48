"""Measures what the kubelet waits for: starts, restarts, calls, lists and faults, of several plugins in turn.

Times are wall-clock, in the kubelet, which is grpcio in Python: its own part of an `Allocate` is about 0.3 ms. The
processor time of a call is the plugin's own, with what else it does meanwhile.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Final

import attrs
import grpc
from plugins import TIMEOUT, Plugin, Running, Size, running
from table import Aim, Figure, median_and
from watching import wait_listening

from sgpu.api import v1beta1_pb2

#: Shares that a container prefers to have.
WANTED: Final = 4
#: Of the median and the 99th percentile, and of the plugin's processor time; by method, and by devices.
AIMS: Final[dict[tuple[str, int], tuple[Aim | None, Aim | None, Aim | None]]] = {
    ("Allocate", 400): (Aim(0.8, "grpcio"), Aim(1.0, "grpcio"), Aim(200)),
    ("GetPreferredAllocation", 400): (Aim(1.0, "grpcio"), None, None),
    ("GetPreferredAllocation", 16_000): (Aim(1.5, "grpcio"), None, None),
    ("list", 16_000): (None, None, Aim(1.2, "grpcio")),
}
NO_AIMS: Final = (None, None, None)


@attrs.frozen
class Extent:
    """The number of measurements of each kind."""

    starts: int = 7
    restarts: int = 20
    rounds: int = 8
    #: In each round, of every plugin: calls of each method, and lists.
    calls: int = 250
    lists: int = 6
    #: Seconds at rest.
    rest: float = 60.0


def starts(plugins: Sequence[Plugin], size: Size, extent: Extent) -> Iterator[Figure]:
    """From starting the process to the kubelet having all devices."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    processor: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(extent.starts):
        for plugin in plugins:
            with running(plugin, size) as run:
                run.wait_listed()
                processor[plugin.name].append(1000 * run.process.cpu_seconds())
                listed = run.kubelet.lists[plugin.resource][0].time
                times[plugin.name].append(1000 * (listed - run.process.started))
    yield from median_and(f"start → {size} listed", times, "worst", 1, (Aim(230), None))
    yield next(iter(median_and("the same in processor time", processor, "worst", 1)))


def restarts(runs: Sequence[Running], extent: Extent) -> Iterator[Figure]:
    """From `kubelet.sock` being there again to the kubelet having all devices again."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(extent.restarts):
        for run in runs:
            times[run.plugin.name].append(_restart(run))
    yield from median_and("`kubelet.sock` created → listed again", times, "worst", 1, (Aim(5), None))


def _restart(run: Running) -> float:
    time.sleep(0.2)  # a restart right after a registration waits for grpcio, not for the plugin
    lists = run.kubelet.lists[run.plugin.resource]
    before = len(lists)
    run.kubelet.restart()
    run.kubelet.wait_for(lambda: len(lists) > before, TIMEOUT)
    run.wait_listed()
    return 1000 * (lists[-1].time - run.kubelet.bound)


def calls(runs: Sequence[Running], extent: Extent) -> Iterator[Figure]:
    """Allocate and GetPreferredAllocation, and the whole list on a new stream."""
    size = runs[0].size
    methods = ("Allocate", "GetPreferredAllocation", "list")
    aims = {method: AIMS.get((method, size.devices), NO_AIMS) for method in methods}
    yield from _method(f"`Allocate`, {size}", runs, _allocate, extent.calls, extent.rounds, aims["Allocate"])
    yield from _method(
        f"`GetPreferredAllocation` of {WANTED}, {size}",
        runs,
        _preferred,
        max(1, extent.calls * 400 // max(size.devices, 1600)),
        extent.rounds,
        aims["GetPreferredAllocation"],
    )
    yield from _method(f"whole list, {size}", runs, _list, extent.lists, extent.rounds, aims["list"])


def _method(
    name: str,
    runs: Sequence[Running],
    make: Callable[[Running, ExitStack], Callable[[], object]],
    number: int,
    rounds: int,
    aims: tuple[Aim | None, Aim | None, Aim | None],
) -> Iterator[Figure]:
    """So many calls of each plugin in turn, so many times; where a plugin has no such method, none of it."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    processor: defaultdict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        callers = [(run, make(run, stack)) for run in runs]
        for turn in range(rounds + 1):  # the first one warms up
            for run, call in callers:
                before = run.process.cpu_seconds()
                with suppress(grpc.RpcError):
                    took = [_timed(call) for _ in range(number)]
                    if turn:
                        times[run.plugin.name] += took
                        processor[run.plugin.name] += 1e6 * (run.process.cpu_seconds() - before)
    yield from median_and(name, times, "99th percentile", 0.99, aims[:2])
    each = {plugin: processor[plugin] / len(took) for plugin, took in times.items()}
    yield Figure(f"{name}, processor time of the plugin", "µs", each, aims[2])


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def _allocate(run: Running, _: ExitStack) -> Callable[[], object]:
    share = run.shares[:1]
    return lambda: run.kubelet.allocate(share, resource=run.plugin.resource)


def _preferred(run: Running, _: ExitStack) -> Callable[[], object]:
    shares = run.shares
    return lambda: run.kubelet.preferred(shares, size=WANTED, resource=run.plugin.resource)


def _list(run: Running, stack: ExitStack) -> Callable[[], object]:
    watch = stack.enter_context(run.channel()).unary_stream(
        "/v1beta1.DevicePlugin/ListAndWatch",
        v1beta1_pb2.Empty.SerializeToString,
        v1beta1_pb2.ListAndWatchResponse.FromString,
    )

    def call() -> None:
        stream = watch(v1beta1_pb2.Empty())
        assert len(next(stream).devices) == run.size.devices
        stream.cancel()

    return call


def faults(runs: Sequence[Running]) -> Iterator[Figure]:
    """From a critical XID of one GPU after the other to its shares being unhealthy in the kubelet. They stay that."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for run in runs:
        if run.hears_events():
            wait_listening(run.node)
            for number, gpu in enumerate(run.node.driver.state.gpus, start=1):
                began = time.monotonic()
                run.node.driver.xid(gpu, 79)
                times[run.plugin.name].append(1000 * (run.wait_unhealthy(number) - began))
    yield from median_and("critical XID → unhealthy in the kubelet", times, "worst", 1)
