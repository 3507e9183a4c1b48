"""Starts the daemon: the driver's process first, which takes about as long to be ready as the rest to be imported.

Knows what is imported when, and not what any of it does.
"""

from __future__ import annotations

import gc
import linecache
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sgpu.config.load import Loaded
from sgpu.config.settings import Settings
from sgpu.config.worker import worker_config
from sgpu.driver.process import Worker, open_worker


async def start(loaded: Loaded, reload: Callable[[], Loaded], alive: int | None) -> None:
    """Run the daemon, as `daemon.run` does."""
    async with _first_worker(loaded) as worker:
        from sgpu import daemon

        linecache.clearcache()  # attrs keeps the source of the methods that it makes, for debuggers: 0.4 MB
        gc.freeze()  # modules are no garbage: to look through them takes 5 ms, in which the kubelet would wait
        await daemon.run(loaded, reload, alive, worker)


@asynccontextmanager
async def _first_worker(loaded: Loaded) -> AsyncIterator[Worker | None]:
    """Start the driver's process, without which the daemon starts one itself, and end it at the latest at the end."""
    worker, settings = None, loaded.settings
    if not (settings.simulate or _may_have_cordons(settings)):
        with suppress(OSError):
            worker = await open_worker(worker_config(settings))
    try:
        yield worker
    finally:
        if worker:
            worker.process.kill()


def _may_have_cordons(settings: Settings) -> bool:
    """Return whether GPUs may be cordoned: then the daemon reads first which ones the driver's process must not open.

    Blocks, when nothing else runs yet: a thread would take memory that the imports need.
    """
    return bool(settings.cordon_file) and Path(settings.cordon_file).exists()
