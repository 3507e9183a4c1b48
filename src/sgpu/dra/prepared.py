"""The claims that are prepared: in memory, in the checkpoint and as CDI files, changed together.

Each step can be the last one of this process. The checkpoint is written first, so that what it names is at least what
there is; to prepare or unprepare once more does the rest. While one daemon hands over to another, both change them:
each change is made under a lock, to what the checkpoint has by then.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio

from sgpu.dra import cdi, checkpoint
from sgpu.dra.claims import Claim, Grant, grant
from sgpu.lib.files import content_identity, make_private_directory
from sgpu.lib.inotify import open_directory
from sgpu.lib.locks import locked
from sgpu.lib.threads import run_in_thread
from sgpu.node.claims import UNLIMITED, Pod, PreparedClaim
from sgpu.node.edits import AllocationOptions, ContainerEdits, claim_edits
from sgpu.node.limits import allowed_memory
from sgpu.node.state import NodeState

logger = logging.getLogger(__name__)

#: Held by the daemon that changes the checkpoint, for milliseconds.
LOCK: Final = "claims.lock"


@attrs.frozen
class Places:
    """Directories: the driver's own, for the checkpoint, and the container runtime's, for CDI files."""

    plugin: Path
    cdi: Path


class PreparedClaims:
    """Changes them one after the other; each change is whole before the next begins, here or in another daemon."""

    def __init__(self, node: NodeState, places: Places, boot_id: str, options: AllocationOptions) -> None:
        self._node = node
        self._places = places
        self._boot_id = boot_id
        self._options = options
        self._changing = trio.Lock()
        self._seen: tuple[int, ...] | None = None  # the checkpoint that was read or written last

    async def load(self) -> None:
        """Take what an earlier sgpu prepared in this boot, and remove the files that it left over.

        Raises OSError.
        """
        await run_in_thread(make_private_directory, self._places.plugin)
        async with self._changing, locked(self._places.plugin / LOCK):
            if not await self._read():  # files of claims that this sgpu can't know may be in use
                return
            left = await run_in_thread(cdi.remove_others, self._places.cdi, self._node.claims.keys())
        if left:
            logger.info("removed the CDI files of claims that are not prepared: %s", ", ".join(left))

    async def follow(self) -> NoReturn:
        """Take what another daemon prepares, which hands over to this one and is not done yet. Raises OSError."""
        with open_directory(self._places.plugin) as directory:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(directory.watch)
                while True:
                    await directory.wait_until(lambda: self._identity() not in (None, self._seen))
                    async with self._change():
                        pass

    async def prepare(self, claim: Claim) -> Sequence[Grant]:
        """Prepare a claim, be it once more. Raises ClaimError or OSError."""
        async with self._change():
            claims = self._node.claims
            prepared, grants = grant(claim, self._node.offers, claims.values())
            changed = claims.get(claim.uid) != prepared
            claims = {**claims, claim.uid: prepared}
            edits = {device_name(claim, each): self._edits(each, len(claim.results)) for each in grants}
            if changed:
                await self._save(claims)
            await run_in_thread(cdi.write, self._places.cdi, claim.uid, edits)
            self._node.set_claims(claims)
            return grants

    async def set_pods(self, uid: str, pods: tuple[Pod, ...]) -> None:
        """Take the pods that have a claim by now. Raises OSError."""
        async with self._change():
            claim = self._node.claims.get(uid)
            if claim and claim.pods != pods:
                claims = {**self._node.claims, uid: attrs.evolve(claim, pods=pods)}
                await self._save(claims)
                self._node.set_claims(claims)

    async def unprepare(self, uid: str) -> bool:
        """Forget a claim and remove its file. Returns whether it was prepared. Raises OSError."""
        async with self._change():
            claims = {key: claim for key, claim in self._node.claims.items() if key != uid}
            await run_in_thread(cdi.remove, self._places.cdi, uid)
            if len(claims) == len(self._node.claims):
                return False
            await self._save(claims)
            self._node.set_claims(claims)
            return True

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """Change the claims in here. Raises OSError."""
        async with self._changing, locked(self._places.plugin / LOCK):
            if self._identity() not in (None, self._seen):
                await self._read()
            yield

    async def _read(self) -> bool:
        """Take the claims of the checkpoint. Returns whether it could be used."""
        self._seen = self._identity()
        claims = await run_in_thread(checkpoint.load, self._places.plugin, self._boot_id)
        if claims is not None and claims != self._node.claims:
            self._node.set_claims(claims)
        return claims is not None

    def _identity(self) -> tuple[int, ...] | None:
        return content_identity(self._places.plugin / checkpoint.NAME)

    async def _save(self, claims: Mapping[str, PreparedClaim]) -> None:
        save = partial(checkpoint.save, self._places.plugin, self._boot_id, claims.values())
        await run_in_thread(save)
        self._seen = self._identity()

    def _edits(self, grant: Grant, devices: int) -> ContainerEdits:
        result, config = grant.result, grant.result.config
        promised = result.memory if config.limited else UNLIMITED
        memory = allowed_memory(grant.offer, 0 if promised else result.shares, promised)
        hints = self._options.framework_hints if config.framework_hints is None else config.framework_hints
        edits = claim_edits(
            grant.offer, result.shares, None if result.admin else memory, self._options, hints=hints, only=devices == 1
        )
        return attrs.evolve(edits, environment={**edits.environment, **config.environment})


def device_name(claim: Claim, grant: Grant) -> str:
    """Return the name of an allocated device in CDI: the scheduler never uses a claim's uid or a share's id again."""
    return f"{claim.uid}-{grant.result.share_id}"
