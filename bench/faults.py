"""Measure how soon the kubelet sees each fault, and how soon it sees that it is over: `tox -e faults`.

The real process with its default intervals, the stub driver with 8 GPUs of 100 shares, and the tests' kubelet on
grpcio. Times are wall-clock, from the change in the stub to the list in the kubelet. Takes ten minutes.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from typing import Final

import attrs
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from node import RESOURCE, Node, new_node
from stub_driver import StubDriver, StubGpu
from watching import wait_down, wait_listening, wait_polls

from sgpu.driver.nvml import Code, EventType

GPUS: Final = 8
SHARES: Final = 100
ROUNDS: Final = 3
#: Seconds between polls: the default, in place of the tests' own.
INTERVAL: Final = 5
FLAGS: Final = ("-health-interval", INTERVAL, "-sample-interval", INTERVAL)
#: Seconds after which something is taken not to happen: longer than a quarantine and a hang.
TIMEOUT: Final = 120.0
ALL_TYPES: Final = EventType.XID_CRITICAL | EventType.DOUBLE_BIT_ECC | EventType.RECOVERY_ACTION
UNKNOWN: Final = 999


@attrs.define
class Bench:
    """A node under test. `gpu` is the one that things happen to."""

    node: Node
    kubelet: FakeKubelet
    daemon: DaemonProcess
    rounds: int = 0

    @property
    def driver(self) -> StubDriver:
        return self.node.driver

    @property
    def gpus(self) -> tuple[StubGpu, ...]:
        return self.driver.state.gpus

    @property
    def gpu(self) -> StubGpu:
        return self.gpus[1]

    def wait_polled(self) -> None:
        """Wait until the daemon has polled once more since now, for changes that the kubelet does not see."""
        for _ in range(2):  # one may be under way
            wait_polls(self.node, 1)


Step = Callable[[Bench], object]


def xid(number: int) -> Step:
    return lambda bench: bench.driver.xid(bench.gpu, number)


def event(event_type: int) -> Step:
    return lambda bench: bench.driver.event(bench.gpu, event_type)


def facts(**changes: int) -> Step:
    return lambda bench: bench.driver.change(bench.gpu, **changes)


def calls(**changes: int | str) -> Step:
    return lambda bench: bench.driver.set(calls=changes)


def call_for_gpu(how: str) -> Step:
    return lambda bench: bench.driver.set(calls={f"nvmlDeviceGetMemoryInfo.{bench.gpu.uuid}": how})


def both(*steps: Step) -> Step:
    return lambda bench: [step(bench) for step in steps]


def lost(bench: Bench) -> None:
    facts(lost=1)(bench)
    bench.wait_polled()


def asked(bench: Bench) -> None:
    both(facts(recovery_action=1), event(EventType.RECOVERY_ACTION))(bench)
    bench.wait_polled()


def vanish(bench: Bench) -> None:
    bench.driver.set(gpus=(bench.gpus[0], *bench.gpus[2:]))


def appear(bench: Bench) -> None:
    bench.driver.set(gpus=fresh_gpus())


def replace(bench: Bench) -> None:
    bench.rounds += 1
    gpus = bench.gpus
    bench.node.driver = StubDriver(bench.node.host)
    bench.driver.set(gpus=gpus, driver_version=f"{560 + bench.rounds}.1")


def nothing(bench: Bench) -> None:
    pass


@attrs.frozen
class Fault:
    """`strike` is timed until the kubelet has the GPU (or all) down, `mend` until it has it healthy."""

    name: str
    strike: Step
    mend: Step
    #: What is done between the two, untimed.
    between: Step = nothing
    all_gpus: bool = False
    rounds: int = ROUNDS
    over: str = ""


RESET: Final = facts(lost=0)
SETTLED: Final = facts(recovery_action=0)
FAULTS: Final = (
    Fault("critical XID (79)", xid(79), RESET, lost, over="the GPU is back after a reset"),
    Fault(
        "double-bit ECC event",
        event(EventType.DOUBLE_BIT_ECC),
        both(SETTLED, event(EventType.RECOVERY_ACTION)),
        asked,
        over="the recovery action is clear (event)",
    ),
    Fault("transient XID (94)", xid(94), nothing, rounds=1, over="60 s have passed"),
    Fault(
        "recovery action, with its event",
        both(facts(recovery_action=1), event(EventType.RECOVERY_ACTION)),
        both(SETTLED, event(EventType.RECOVERY_ACTION)),
        over="it is clear (event)",
    ),
    Fault("recovery action, polled", facts(recovery_action=1), SETTLED, over="it is clear (poll)"),
    Fault("remapped rows pending", facts(rows_pending=1), facts(rows_pending=0), over="they no longer are"),
    Fault("remapping rows failed", facts(rows_failed=1), facts(rows_failed=0), over="it no longer has"),
    Fault("retired pages pending", facts(pages_pending=1), facts(pages_pending=0), over="they no longer are"),
    Fault("NVSwitch fabric not ready", facts(fabric_state=2), facts(fabric_state=3), over="it is"),
    Fault("GPU lost, no event", facts(lost=1), RESET, over="it answers"),
    Fault("GPU vanished from the list", vanish, appear, over="it is listed again"),
    Fault(
        "driver unloaded",
        calls(nvmlInit=Code.DRIVER_NOT_LOADED, nvmlDeviceGetCount=UNKNOWN),
        calls(),
        all_gpus=True,
        over="it is loaded again",
    ),
    Fault(
        "driver replaced by another version",
        calls(nvmlInit=Code.LIB_RM_VERSION_MISMATCH, nvmlDeviceGetCount=UNKNOWN),
        replace,
        all_gpus=True,
        over="the new library is in place",
    ),
    Fault("a call for one GPU hangs", call_for_gpu("hang"), calls(), rounds=2, over="it returns"),
    Fault("a call for the driver hangs", calls(nvmlDeviceGetCount="hang"), calls(), all_gpus=True, over="it returns"),
    Fault("library aborts in a call for one GPU", call_for_gpu("crash"), calls(), over="it no longer does"),
    Fault("library aborts in every poll", calls(nvmlDeviceGetCount="crash"), calls(), all_gpus=True, over="likewise"),
)


def fresh_gpus() -> list[StubGpu]:
    return [
        StubGpu(number, event_types=ALL_TYPES, recovery_action=0, pages_pending=0, fabric_state=3)
        for number in range(GPUS)
    ]


def measure(bench: Bench, fault: Fault) -> tuple[list[float], list[float]]:
    """Milliseconds until the kubelet saw it, and until it saw that it was over, round by round."""
    down, up = [], []
    for _ in range(fault.rounds):
        wait_listening(bench.node)
        time.sleep(random.uniform(0, INTERVAL))  # at any time between two polls
        targets = bench.gpus if fault.all_gpus else (bench.gpu,)
        began = time.monotonic()
        fault.strike(bench)
        down.append(1000 * (wait_down(bench.kubelet, *targets, timeout=TIMEOUT) - began))
        fault.between(bench)
        if fault.mend is not nothing:  # else time alone does it, since it happened
            time.sleep(random.uniform(0, INTERVAL))
            began = time.monotonic()
            fault.mend(bench)
        up.append(1000 * (wait_down(bench.kubelet, timeout=TIMEOUT) - began))
    return down, up


def appearance(bench: Bench) -> list[float]:
    """Milliseconds until a GPU that was never there before is listed."""
    bench.driver.set(gpus=[*fresh_gpus(), StubGpu(GPUS)])
    bench.node.make_nodes(f"nvidia{GPUS}")
    began = time.monotonic()
    bench.kubelet.wait_devices((GPUS + 1) * SHARES, TIMEOUT)
    return [1000 * (bench.kubelet.lists[RESOURCE][-1].time - began)]


def blindness(bench: Bench) -> list[float]:
    """Milliseconds from the end of the driver's process to the next one waiting for events."""
    series = []
    for _ in range(ROUNDS):
        wait_listening(bench.node)
        (child,) = bench.daemon.children()
        began = time.monotonic()
        os.kill(child, signal.SIGKILL)
        wait_listening(bench.node)
        series.append(1000 * (time.monotonic() - began))
        time.sleep(1)
    return series


def words(series: list[float]) -> str:
    """Median and worst."""
    median, worst = statistics.median(series), max(series)
    return f"{median:,.0f} / {worst:,.0f}" if len(series) > 1 else f"{median:,.0f}"


def main() -> None:
    print("| fault | seen by the kubelet after, median / worst (ms) | healthy again when | after (ms) |")
    print("|---|--:|---|--:|")
    with new_node() as node:
        node.driver.set(gpus=fresh_gpus())
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*FLAGS) as daemon:
            kubelet.wait_devices(GPUS * SHARES)
            bench = Bench(node, kubelet, daemon)
            for fault in FAULTS:
                down, up = measure(bench, fault)
                print(f"| {fault.name} | {words(down)} | {fault.over} | {words(up)} |", flush=True)
            print(f"| driver's process killed: events are heard again | | | {words(blindness(bench))} |", flush=True)
            print(f"| GPU that appears: listed | {words(appearance(bench))} | | |", flush=True)
            assert len(kubelet.registrations) == 1


if __name__ == "__main__":
    main()
