"""The memory limits that sgpu has set, on disk: after a restart it knows its own, and leaves others alone.

Written before a limit is set. Reading and writing block as files do. Knows nothing of NVML.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import trio

from sgpu.driver.messages import encode_limits
from sgpu.lib.concurrency import race
from sgpu.lib.files import make_private_directory, read_regular_file, write_private_file
from sgpu.lib.limits import explain
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread
from sgpu.node.cgroup_limit import Target, WantedLimit
from sgpu.node.enforcement import Enforcement

logger = logging.getLogger(__name__)

VERSION: Final = 1
#: Limits as they stand in the file.
Entries = Mapping[Target, str]
NO_ENTRIES: Final[Entries] = {}
#: Beside the state file.
NAME: Final = "limits.json"


def load(path: Path, boot_id: str) -> tuple[Target, ...]:
    """Return the limits that were set in this boot, of cgroups that are still there. What can't be used is none."""
    try:
        content = json.loads(read_regular_file(path))
        if content["version"] != VERSION or content["boot_id"] != boot_id:
            return ()
        recorded = [(Target(str(uuid), str(cgroup)), inode) for uuid, cgroup, inode in content["limits"]]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("cannot read %s: %s; limits that it names count as somebody else's", path, error)
        return ()
    return tuple(target for target, inode in recorded if inode is not None and _inode(target.cgroup) == inode)


def save(path: Path, boot_id: str, targets: Iterable[Target], known: Entries = NO_ENTRIES) -> Entries:
    """Write them in one step, each with the inode of its cgroup: another one can get its name. Raises OSError.

    `known`: what this returned before. Of hundreds, mostly one is new.
    """
    entries = {target: known.get(target) or json.dumps((*target, _inode(target.cgroup))) for target in targets}
    head = json.dumps({"version": VERSION, "boot_id": boot_id})
    make_private_directory(path.parent)
    write_private_file(path, f'{head[:-1]}, "limits": [{", ".join(entries.values())}]}}'.encode())
    return entries


class LimitSender:
    """Sends the table of limits to a worker, each time after it was recorded. `path` None: it is recorded nowhere."""

    def __init__(self, enforcement: Enforcement, path: Path | None, boot_id: str) -> None:
        self._enforcement = enforcement
        self._path = path
        self._boot_id = boot_id
        self._recorded: tuple[Target, ...] = ()
        self._entries = NO_ENTRIES
        self._problem = OnChange(logger, logging.WARNING)

    async def load(self) -> None:
        """Adopt what an earlier sgpu set."""
        if self._path:
            self._recorded = await run_in_thread(load, self._path, self._boot_id)
            self._enforcement.adopt(self._recorded)

    async def feed(self, stream: trio.abc.SendStream) -> None:
        """Send the table to a new worker, and then what changes in it."""
        enforcement = self._enforcement
        sent: Mapping[Target, WantedLimit] = {}
        while True:
            changed, answered = enforcement.changed.next, enforcement.answered.next
            await self._record()
            table = enforcement.table()
            if table != sent:
                new = [wanted for target, wanted in table.items() if wanted != sent.get(target)]
                await stream.send_all(encode_limits(new, sent.keys() - table.keys()))
                sent = table
            await race(changed.wait, answered.wait)

    async def _record(self) -> None:
        targets = self._enforcement.recorded()
        if self._path is None or targets == self._recorded:
            return
        try:
            self._entries = await run_in_thread(save, self._path, self._boot_id, targets, self._entries)
            self._recorded = targets
            self._problem.clear()
        except OSError as error:
            reason = f"cannot write {self._path}: {explain(error)}"
            self._problem.report(f"{reason}; after a restart sgpu will take its limits for somebody else's")


def _inode(directory: str) -> int | None:
    try:
        return os.stat(directory).st_ino
    except OSError:
        return None
