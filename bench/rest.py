"""Measures a plugin while nothing happens, before and after an hour's work of a busy node, done as fast as it goes.

Everything is switched on: health and samples at their default intervals, a kubelet that tells who has which share, a
scrape every 15 s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from plugins import Running
from table import Aim, Figure

from sgpu.driver.nvml import EventType

#: Seconds between scrapes.
SCRAPE_INTERVAL: Final = 15
#: Pods that stay, with a share each.
PODS: Final = 20
#: What comes to pass in an hour: pods that start and end, scrapes every 15 s, probes (as k8s/ has them),
#: kubelet restarts, GPUs that fail and come back.
STARTED: Final = 240
SCRAPES: Final = 240
PROBES: Final = {"/healthz": 360, "/readyz": 720}
RESTARTS: Final = 3
FAULTS: Final = 4
PROCESSOR: Final = Aim(60)
WAKE_UPS: Final = Aim(100)


def settle(run: Running, seconds: float) -> None:
    """As on a node that is in use, and has been scraped."""
    for number, share in enumerate(run.shares[:PODS]):
        run.pods.assign("default", f"pod-{number}", "main", [share], run.plugin.resource)
    if run.plugin.is_scraped:
        run.scrape()
    time.sleep(seconds)


def at_rest(run: Running, when: str, seconds: float) -> Iterator[Figure]:
    """Processor time and wake-ups of a minute, and memory at its end."""
    began, before, awake = time.monotonic(), run.process.cpu_seconds(), run.process.wake_ups()
    for due in range(0, int(seconds), SCRAPE_INTERVAL):
        time.sleep(max(0.0, began + due - time.monotonic()))
        if run.plugin.is_scraped:
            run.scrape()
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    minutes = (time.monotonic() - began) / 60
    took = 1000 * (run.process.cpu_seconds() - before) / minutes
    yield Figure(f"processor time {when}", "ms a minute", {run.plugin.name: took}, PROCESSOR)
    wake_ups = (run.process.wake_ups() - awake).total() / minutes
    yield Figure(f"wake-ups {when}", "a minute", {run.plugin.name: wake_ups}, WAKE_UPS)
    yield from memory(run, when)


def memory(run: Running, when: str) -> Iterator[Figure]:
    """Of all its processes."""
    taken = run.process.memory()
    for name, size in (
        ("resident memory", taken.resident),
        ("proportional memory", taken.proportional),
        ("memory if nothing else ran Python,", taken.alone),
        ("anonymous memory", taken.anonymous),
    ):
        yield Figure(f"{name} {when}", "MB", {run.plugin.name: size / 1e6})


def hour(run: Running, part: float = 1.0) -> None:
    """An hour's work, or a part of it; after it, everything is as before."""
    for number in range(max(1, int(STARTED * part))):
        _pod(run, f"guest-{number}")
    if run.plugin.is_scraped:
        for _ in range(int(SCRAPES * part)):
            run.scrape()
        for page, number in PROBES.items():
            for _ in range(int(number * part)):
                run.scrape(page)
    for number in range(FAULTS if run.hears_events() else 0):
        _fault(run, number % run.size.gpus)
    for _ in range(RESTARTS):
        registrations = len(run.kubelet.registrations)
        run.kubelet.restart()
        run.kubelet.wait_registrations(registrations + 1)
        run.wait_listed()


def _pod(run: Running, name: str) -> None:
    free = run.shares[PODS:]
    share = run.kubelet.preferred(free, resource=run.plugin.resource)
    run.kubelet.allocate(share, resource=run.plugin.resource)
    run.pods.assign("default", name, "main", share, run.plugin.resource)
    run.pods.release(name)


def _fault(run: Running, number: int) -> None:
    driver = run.node.driver
    for action, down in ((1, 1), (0, 0)):
        gpu = driver.change(driver.state.gpus[number], recovery_action=action)
        driver.event(gpu, EventType.RECOVERY_ACTION)
        run.wait_unhealthy(down)
