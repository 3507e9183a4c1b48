"""Starts the daemon: the driver's process first, which takes about as long to be ready as the rest to be imported.

Knows what is imported when, and not what any of it does.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import trio

from sgpu.config.load import Loaded
from sgpu.config.worker import worker_config
from sgpu.driver.process import Worker, open_worker


async def start(loaded: Loaded, reload: Callable[[], Loaded], alive: int | None) -> None:
    """Run the daemon, as `daemon.run` does."""
    async with _first_worker(loaded) as worker:
        from sgpu import daemon

        gc.freeze()  # modules are no garbage: to look through them takes 5 ms, in which the kubelet would wait
        await daemon.run(loaded, reload, alive, worker)


@asynccontextmanager
async def _first_worker(loaded: Loaded) -> AsyncIterator[Worker | None]:
    """Start the driver's process, without which the daemon starts one itself, and end it at the latest at the end."""
    worker, settings = None, loaded.settings
    # Where GPUs may be cordoned, the daemon has to read first which ones this process must not open.
    if not (settings.simulate or (settings.cordon_file and await trio.Path(settings.cordon_file).exists())):
        with suppress(OSError):
            worker = await open_worker(worker_config(settings))
    try:
        yield worker
    finally:
        if worker:
            worker.process.kill()
