"""Measures a large and crowded node: choices while pods come and go, and scrapes with a pod for each share."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from typing import Final

from plugins import Size, running, sgpu
from table import Aim, Figure, median_and

#: As many as large nodes are set up for; the kubelet's default is 110.
PODS: Final = 250
#: Seconds between two looks at the pods: more often than by default, so that a call often finds the daemon busy with
#: them.
INTERVAL: Final = 0.5
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


def scrapes(size: Size, number: int) -> Iterator[Figure]:
    """A scrape where every share has a pod of its own."""
    times = []
    with running(sgpu(INTERVAL), size) as run:
        run.wait_listed()
        for index, share in enumerate(run.shares):
            run.pods.assign("team", f"inference-server-{index}", "main", [share])
        run.pods.wait_heeded(60)
        run.scrape()  # the first one loads what makes metrics
        for _ in range(number):
            started = time.perf_counter()
            page = run.scrape()
            times.append(1000 * (time.perf_counter() - started))
            assert gzip.decompress(page).count(b"sgpu_container_shares{") == size.devices
    yield from median_and(f"scrape of {size.devices} pods", {"sgpu": times}, "worst", 1, (Aim(100), None))
