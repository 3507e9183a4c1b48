"""Measures a large and crowded node: choices while pods come and go, and scrapes with a pod for each share."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from typing import Final

from plugins import Running, Size, running, sgpu
from table import Aim, Figure, median_and, percentile

#: As many as large nodes are set up for; the kubelet's default is 110.
PODS: Final = 250
#: Seconds between two looks at the pods: more often than by default, so that a call often finds the daemon busy with
#: them.
INTERVAL: Final = 0.5
#: Seconds between scrapes while allocating, and between allocations: enough of them to meet a scrape.
SCRAPED_EACH: Final = 1.0
PAUSE: Final = 0.002
#: Shares of one container.
WANTED: Final = 16


def churn(size: Size, calls: int) -> Iterator[Figure]:
    """GetPreferredAllocation while every other share is taken, and pods come and go."""
    times = []
    with running(sgpu(INTERVAL), size) as run:
        run.wait_listed()
        devices = run.shares
        for number in range(PODS):
            run.pods.assign("team", f"pod-{number}", "main", devices[1::2][number::PODS])
        run.pods.wait_heeded(60)
        free = devices[:-1:2]
        for number in range(calls):
            if number % 2:
                run.pods.release("guest", "team")
            else:
                run.pods.assign("team", "guest", "main", devices[-1:])
            started = time.perf_counter()
            assert len(run.kubelet.preferred(free, size=WANTED)) == WANTED
            times.append(1000 * (time.perf_counter() - started))
    name = f"`GetPreferredAllocation` of {WANTED}, {size}, half of them taken"
    yield from median_and(name, {"sgpu": times}, "worst", 1, (Aim(10), None))


def scrapes(size: Size, number: int, calls: int) -> Iterator[Figure]:
    """Scrapes where each share has a pod: after a change on each GPU, and once more; and Allocates beside them."""
    new: list[float] = []
    same: list[float] = []
    with running(sgpu(INTERVAL), size) as run:
        run.wait_listed()
        for index, share in enumerate(run.shares):
            run.pods.assign("team", f"inference-server-{index}", "main", [share])
        run.pods.wait_heeded(60)
        run.scrape()  # the first one loads what makes metrics
        for turn in range(number):
            run.pods.assign("guest", f"pod-{turn}", "main", run.shares[:: size.shares])  # one more on each GPU
            run.pods.wait_heeded(60)
            for times in (new, same):
                started = time.perf_counter()
                page = run.scrape()
                times.append(1000 * (time.perf_counter() - started))
            assert gzip.decompress(page).count(b"sgpu_container_shares{") >= size.devices - size.gpus
        quiet, busy = (_allocations(run, calls, scraped) for scraped in (False, True))
    pods = f"{size.devices} pods"
    yield from median_and(f"scrape of {pods}, new on each GPU", {"sgpu": new}, "worst", 1, (Aim(40), None))
    yield from median_and(f"scrape of {pods}, nothing new", {"sgpu": same}, "worst", 1, (Aim(3), None))
    yield from median_and(f"`Allocate` with {pods}", {"sgpu": quiet}, "99th percentile", 0.99)
    most = Aim(2 * percentile(quiet, 0.99))
    name = f"`Allocate` with {pods}, scraped each second"
    yield from median_and(name, {"sgpu": busy}, "99th percentile", 0.99, (None, most))


def _allocations(run: Running, calls: int, scraped: bool) -> list[float]:
    """Milliseconds of so many Allocates, while it is scraped by another thread or not."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(SCRAPED_EACH):
            run.scrape()

    scraping = threading.Thread(target=scrape)
    if scraped:
        scraping.start()
    try:
        took = []
        for _ in range(calls):
            time.sleep(PAUSE)
            started = time.perf_counter()
            run.kubelet.allocate(run.shares[:1])
            took.append(1000 * (time.perf_counter() - started))
        return took
    finally:
        ended.set()
        if scraped:
            scraping.join()
