"""Follows the kubelet's checkpoint: adds the holders that only it has, and finds stored answers that are not right.

Knows neither NVML nor the PodResources API.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu.lib.concurrency import Broadcast
from sgpu.lib.files import content_identity
from sgpu.lib.inotify import open_directory
from sgpu.lib.limits import explain
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread
from sgpu.node.container import STALE_ADVICE, StaleAnswer
from sgpu.node.gpu import Gpu
from sgpu.pods.checkpoint import FILE
from sgpu.pods.held import Held
from sgpu.pods.processes import Places
from sgpu.pods.stale import stale_answers
from sgpu.pods.unlisted import Unlisted

logger = logging.getLogger(__name__)

#: Seconds between looks for a plugin directory that is not there.
RETRY: Final = 1.0


class Recorded:
    """What the checkpoint has. `changed` notifies of a new one, if `watch` runs."""

    def __init__(self, plugin_directory: Path, places: Places) -> None:
        self.changed = Broadcast()
        self._directory = plugin_directory
        self._seen = content_identity(plugin_directory / FILE)
        self._unlisted = Unlisted(plugin_directory, places)
        self._unlisted.outdated = self._seen is not None  # there may be nothing to read yet
        self._readable = False
        self._found = OnChange(logger, logging.INFO)
        self._problem = OnChange(logger, logging.WARNING)
        self._stale = OnChange(logger, logging.WARNING)

    async def watch(self) -> NoReturn:
        """Notify of each change of the file, until cancelled. The kubelet renames a new one at each Allocate."""
        while True:
            try:
                with open_directory(self._directory) as directory:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(directory.watch)
                        while True:
                            change = directory.changed.next
                            directory.renew()  # it may be another one
                            self._look()
                            await change.wait()
            except* OSError:  # it is not there, or no longer
                self._look()
                await trio.sleep(RETRY)

    def _look(self) -> None:
        before, self._seen = self._seen, content_identity(self._directory / FILE)
        if self._seen != before:
            self._unlisted.outdated = True
            self.changed.notify()

    async def add(self, listed: Held) -> Held:
        """Return what the kubelet lists, and what it does not list and its checkpoint has."""
        try:
            missing = self._unlisted.may_find(listed)
            found = Held({})
            if missing:
                found = await run_in_thread(self._unlisted.find, listed, abandon_on_cancel=True)
        except (OSError, ValueError) as error:
            self._readable = False
            reason = f"cannot read the kubelet's checkpoint: {explain(error)}"
            self._problem.report(f"{reason}; shares that init containers have may be withheld")
            return listed
        self._readable = True
        self._problem.clear()
        pods = ", ".join(sorted({str(container) for each in found.shares.values() for container in each.values()}))
        reason = "they are of init containers, or it has just started"
        self._found.update(f"the kubelet does not list the shares of {pods}; {reason}" if pods else "")
        return listed.merge(found) if missing else listed

    def stale(self, held: Held, gpus: Iterable[Gpu]) -> tuple[StaleAnswer, ...] | None:
        """Return the pods to which the kubelet would give other GPUs than those of their shares, and log them.

        None where the checkpoint can't be read.
        """
        if not self._readable:
            return None
        stale = stale_answers(self._unlisted.checkpoint, held.shares, gpus)
        pods = ", ".join(map(str, stale))
        self._stale.update(
            f"GPUs have other device nodes than in the kubelet's stored answers: containers that start again get the "
            f"wrong GPU in {pods}; {STALE_ADVICE}"
            if stale
            else ""
        )
        return tuple(stale)
