"""An operator's orders to cordon GPUs: recorded first, then carried out. Knows neither HTTP nor NVML."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import attrs
import trio

from sgpu.driver import cordon_file
from sgpu.lib.limits import explain
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread
from sgpu.node.cordon import NoSuchGpuError, find_gpu
from sgpu.node.gpu import Cordon, Gpu
from sgpu.node.state import NodeState
from sgpu.observe.orders import Done, Order

logger = logging.getLogger(__name__)


class CordonRefusedError(Exception):
    """An order can't be carried out. The message says why, and what to do."""


class Cordons:
    """The cordoned GPUs of the node, and the file that they are in (None: there is none).

    `wall_clock` is in seconds since the epoch.
    """

    def __init__(
        self, node: NodeState, path: Path | None, boot_id: str, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._node = node
        self._path = path
        self._boot_id = boot_id
        self._wall_clock = wall_clock
        self._saved: Mapping[str, Gpu] = {}
        self._one_at_a_time = trio.Lock()

    async def load(self) -> None:
        """Take the cordons that the file has."""
        if self._path:
            self._saved = await run_in_thread(cordon_file.load, self._path, self._boot_id)
            self._node.set_cordoned(self._saved)
            for gpu in self._saved.values():
                logger.warning("GPU %s at %s is %s; `sgpu uncordon` ends that", gpu.uuid, gpu.pci_bus_id, gpu.cordon)

    async def cordon(self, order: Order) -> Done:
        """Cordon a GPU, or give the cordon that it has another reason. Raises CordonRefusedError."""
        async with self._one_at_a_time:
            gpu = self._find(order)
            before = self._node.cordoned.get(gpu.uuid)
            cordon = Cordon(order.reason, self._wall_clock())
            if before and before.cordon:
                cordon = attrs.evolve(before.cordon, reason=order.reason or before.cordon.reason)
            ordered = attrs.evolve(gpu, cordon=cordon)
            await self._change(lambda cordoned: {**cordoned, gpu.uuid: ordered})
            if not before:
                logger.warning("GPU %s at %s is %s; its free shares are withheld", gpu.uuid, gpu.pci_bus_id, cordon)
            self._node.release_free()
            return Done(gpu.uuid, gpu.name, gpu.pci_bus_id, changed=before is None)

    async def uncordon(self, order: Order) -> Done:
        """End the cordon of a GPU. Raises CordonRefusedError."""
        async with self._one_at_a_time:
            gpu = self._find(order)
            changed = gpu.uuid in self._node.cordoned
            if changed:
                await self._change(lambda cordoned: {uuid: cordoned[uuid] for uuid in cordoned if uuid != gpu.uuid})
                logger.warning("GPU %s at %s is no longer cordoned", gpu.uuid, gpu.pci_bus_id)
            return Done(gpu.uuid, gpu.name, gpu.pci_bus_id, changed=changed)

    async def save_releases(self) -> NoReturn:
        """Record which GPUs were released, now and whenever that changes: another daemon must not open them."""
        problem = OnChange(logger, logging.WARNING)
        while True:
            changed = self._node.changed.next
            async with self._one_at_a_time:
                try:
                    await self._save(self._node.cordoned)
                    problem.clear()
                except OSError as error:
                    problem.report(
                        f"cannot write {self._path}: {explain(error)}; a restart of sgpu will open released GPUs again"
                    )
            await changed.wait()

    def _find(self, order: Order) -> Gpu:
        absent = (
            gpu for uuid, gpu in self._node.cordoned.items() if uuid not in {each.uuid for each in self._node.gpus}
        )
        try:
            return find_gpu(order.gpu, [*self._node.gpus, *absent])
        except NoSuchGpuError as error:
            raise CordonRefusedError(str(error)) from error

    async def _change(self, change: Callable[[Mapping[str, Gpu]], Mapping[str, Gpu]]) -> None:
        """Record a change, then make it: meanwhile other GPUs may have been released."""
        if self._path is None:
            raise CordonRefusedError(
                "-cordon-file is empty, so that a restart of sgpu would give pods the GPU again: set it to a file"
            )
        try:
            await self._save(change(self._node.cordoned))
        except OSError as error:
            raise CordonRefusedError(f"nothing is changed: cannot write {self._path}: {explain(error)}") from error
        self._node.set_cordoned(change(self._node.cordoned))

    async def _save(self, cordoned: Mapping[str, Gpu]) -> None:
        if self._path and cordoned != self._saved:
            await run_in_thread(cordon_file.save, self._path, self._boot_id, cordoned)
            self._saved = cordoned
