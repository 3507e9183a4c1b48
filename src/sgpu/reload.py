"""Reading the settings again while the daemon runs: when the file changes, and on SIGHUP.

What each GPU is offered as takes effect at once; the rest at the next start, and is said so.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu.catalog import REFUSALS, Catalog
from sgpu.directory import open_directory
from sgpu.files import content_identity
from sgpu.load import Loaded, UsageError
from sgpu.logs import OnChange
from sgpu.nurseries import race
from sgpu.settings import KNOBS, Settings

logger = logging.getLogger(__name__)

#: Seconds between looks for a directory that is gone.
RETRY: Final = 1.0
#: Seconds for which a file must stay as it is before it is read: one that is just being written can be valid, too.
SETTLING_TIME: Final = 0.1
#: The settings that the policy is made of, which takes effect at once.
LIVE: Final = frozenset({"resource-name", "gpu-duplication-factor"})


class Hangups:
    """SIGHUP, as an event that is replaced each time."""

    def __init__(self) -> None:
        self.changed = trio.Event()

    def ring(self) -> None:
        """The process was sent one."""
        self.changed.set()
        self.changed = trio.Event()


async def keep_configured(
    loaded: Loaded,
    reload: Callable[[], Loaded],
    catalog: Catalog,
    reloaded: Callable[[bool], None] = lambda usable: None,
) -> NoReturn:
    """Apply what changes, for ever. `reload` is `load` with the same command line and environment; it may block.

    `reloaded` is told of each time but the first whether the settings could be used.
    """
    policy = loaded.policy
    pending = OnChange(logger, logging.WARNING)
    with _hangups() as hangups:
        first = True
        while True:
            # Taken before anything is read, so that a change meanwhile is one more. And it is read once right away:
            # it can have changed since the process started.
            hung_up, seen = hangups.changed, content_identity(Path(loaded.file))
            try:
                new = await trio.to_thread.run_sync(reload, abandon_on_cancel=True)
                catalog.apply(new.policy)
                usable = True
            except (UsageError, *REFUSALS) as error:
                usable = False
                logger.error("the settings stay as they were: %s", error)
            else:
                if new.policy != policy:
                    logger.info("what GPUs are offered as has changed: now %s", _offered(catalog))
                policy = new.policy
                later = ", ".join(f"-{name}" for name in _different(loaded.settings, new.settings))
                pending.report(f"takes effect at the next start: {later}") if later else pending.clear()
            if not first:
                reloaded(usable)
            first = False
            await race(hung_up.wait, partial(_file_changed, loaded.file, seen))


def _offered(catalog: Catalog) -> str:
    """Shares by resource, as they are listed from now on."""
    shares = {
        resource: sum(device.shares for device in catalog.inventories[resource].devices)
        for resource in catalog.policy.resources()
        if resource in catalog.inventories
    }
    return ", ".join(f"{count} x {resource}" for resource, count in shares.items()) or "nothing, as there is no GPU yet"


def _different(running: Settings, new: Settings) -> list[str]:
    """The settings, but for LIVE, that are others than the daemon runs with."""
    fields = {name: name.replace("-", "_") for name in KNOBS if name not in LIVE}
    return [name for name, field in fields.items() if getattr(running, field) != getattr(new, field)]


async def _file_changed(file: str, seen: tuple[int, ...] | None) -> None:
    """Until the path leads to another file, or the file has other content. A ConfigMap swaps a link beside it."""
    if not file:
        await trio.sleep_forever()
    path = Path(file)

    def changed() -> bool:
        return content_identity(path) not in (None, seen)

    while not changed():
        try:
            await _directory_changed(path.parent, changed)
        except OSError:  # it is gone; it may come back
            await trio.sleep(RETRY)
    last = None
    while last != (last := content_identity(path)):  # noqa: ASYNC110  # what ends is that nothing happens
        await trio.sleep(SETTLING_TIME)


async def _directory_changed(path: Path, enough: Callable[[], bool]) -> None:
    """Until it is enough, or names came or went: by then `path` can be another directory, to be watched in its place.

    Raises OSError.
    """
    before = content_identity(path)
    with open_directory(path) as directory:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(directory.watch)
            await directory.wait_until(lambda: enough() or content_identity(path) != before)
            nursery.cancel_scope.cancel()


@contextmanager
def _hangups() -> Iterator[Hangups]:
    hangups = Hangups()
    token = trio.lowlevel.current_trio_token()

    def handler(number: int, _: object) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(hangups.ring)

    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield hangups
    finally:
        signal.signal(signal.SIGHUP, before)
