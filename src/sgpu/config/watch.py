"""Reads the settings again while the daemon runs: when the file changes, and on SIGHUP.

What each GPU is offered as takes effect at once; the rest at the next start, which the log says.
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

from sgpu.config.flags import UsageError
from sgpu.config.load import Loaded
from sgpu.config.settings import SETTINGS, Settings
from sgpu.lib.concurrency import Broadcast, race
from sgpu.lib.files import content_identity
from sgpu.lib.inotify import open_directory
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread
from sgpu.node.policy import OffersRefusedError, Policy

logger = logging.getLogger(__name__)

#: Seconds between looks for a directory that is gone.
RETRY: Final = 1.0
#: Seconds for which a file must stay as it is before it is read: one that is just being written can be valid, too.
SETTLING_TIME: Final = 0.1
#: The settings that the policy is made of, which takes effect at once.
LIVE: Final = frozenset({"resource-name", "gpu-duplication-factor", "memory-limits", "mig", "mig-resource-name"})


async def watch_settings(
    loaded: Loaded,
    reload: Callable[[], Loaded],
    apply: Callable[[Policy], str],
    reloaded: Callable[[bool], None] = lambda usable: None,
) -> NoReturn:
    """Read the settings again whenever they may have changed, and apply the policy.

    `reload` is `load` with the same command line and environment; it may block. `apply` returns what is offered now, in
    words, and raises OffersRefusedError. `reloaded` is called each time but the first: were the settings usable?
    """
    policy = loaded.policy
    warning = OnChange(logger, logging.WARNING)
    pending = OnChange(logger, logging.WARNING)
    with _hangups() as hangups:
        first = True
        while True:
            # Taken before anything is read, so that a change meanwhile is one more. And it is read once right away:
            # it can have changed since the process started.
            hangup, seen = hangups.next, content_identity(Path(loaded.file))
            try:
                new = await run_in_thread(reload, abandon_on_cancel=True)
                offered = apply(new.policy)
                usable = True
            except (UsageError, OffersRefusedError) as error:
                usable = False
                logger.error("cannot use the new settings, the old ones stay: %s", error)
            else:
                warning.update("; ".join(new.warnings))
                if new.policy != policy:
                    logger.info("offered resources changed: now %s", offered)
                policy = new.policy
                later = ", ".join(f"-{name}" for name in _different(loaded.settings, new.settings))
                pending.update(later and f"takes effect at the next start: {later}")
            if not first:
                reloaded(usable)
            first = False
            await race(hangup.wait, partial(_file_changed, loaded.file, seen))


def _different(running: Settings, new: Settings) -> list[str]:
    """Return the settings, except LIVE, that differ from those the daemon runs with."""
    fields = {name: name.replace("-", "_") for name in SETTINGS if name not in LIVE}
    return [name for name, field in fields.items() if getattr(running, field) != getattr(new, field)]


async def _file_changed(file: str, seen: tuple[int, ...] | None) -> None:
    """Wait until the path leads to another file, or the file's content changed. A ConfigMap swaps a link beside it."""
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
    """Wait until it is enough, or names came or went: by then `path` can be another directory, to be watched instead.

    Raises OSError.
    """
    before = content_identity(path)
    with open_directory(path) as directory:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(directory.watch)
            await directory.wait_until(lambda: enough() or content_identity(path) != before)
            nursery.cancel_scope.cancel()


@contextmanager
def _hangups() -> Iterator[Broadcast]:
    """Notified at each SIGHUP."""
    hangups = Broadcast()
    token = trio.lowlevel.current_trio_token()

    def handler(number: int, _: object) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(hangups.notify)

    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield hangups
    finally:
        signal.signal(signal.SIGHUP, before)
