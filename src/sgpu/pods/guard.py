"""The memory guard: names containers that use more of a full GPU's memory than they may, and ends them if told to.

Knows neither NVML nor how a choice is made.
"""

from __future__ import annotations

import logging
from collections import Counter
from signal import SIGKILL, SIGTERM
from typing import Final

import attrs
import trio

from sgpu.lib.logs import OnChange
from sgpu.lib.sizes import GIB, part_of
from sgpu.node.claims import promised
from sgpu.node.gpu import label
from sgpu.node.guard import GuardPolicy, OverUse, OverUsers, Sample
from sgpu.node.limits import allowed_by_container
from sgpu.node.notices import Notice, Reason
from sgpu.node.state import NodeState
from sgpu.pods.processes import Places
from sgpu.pods.signals import OpenProcess, ProcessGoneError, SignalRefusedError, open_process

logger = logging.getLogger(__name__)

#: Seconds from SIGKILL until a process counts as stuck. One in the middle of a kernel that filled an H200 was gone
#: after 0.1 s; to free hundreds of GiB of the host's memory takes some seconds.
KILL_TIME: Final = 15.0


@attrs.frozen
class GuardOptions:
    """`terminate`: over-users are ended, and not only named. `grace`: seconds from SIGTERM to SIGKILL."""

    policy: GuardPolicy
    terminate: bool
    grace: float


class Guard:
    """Looks at each sample. `actions` counts by UUID, namespace, pod, container and action."""

    def __init__(
        self,
        options: GuardOptions,
        places: Places,
        node: NodeState,
        actions: Counter[tuple[str, ...]],
        nursery: trio.Nursery,
    ) -> None:
        self._options = options
        self._places = places
        self._node = node
        self._actions = actions
        self._nursery = nursery
        self._over = OverUsers(options.policy)
        self._refused = OnChange(logger, logging.ERROR)

    def look(self, sample: Sample | None) -> None:
        """Name the over-users of a sample, and begin to end those that are to be. None: it is unknown who uses what."""
        offers = (offer for each in self._node.offers.values() for offer in each)
        allowed = allowed_by_container(offers, self._node.usage.holders or {}, promised(self._node.claims.values()))
        for use in self._over.take(sample, allowed):
            self._count(use, "warn")
            self._report(Reason.MEMORY_EXCEEDED, use, self._consequence(use))
        self._node.usage.set_exceeded(
            {uuid: {use.container: use.allowed for use in uses} for uuid, uses in self._over.named().items()}
        )
        if self._options.terminate:
            for use in self._over.choose():
                self._nursery.start_soon(self._end, use)

    async def _end(self, use: OverUse) -> None:
        give_up = False
        try:
            async with open_process(self._places, use.process, use.container) as process:
                give_up = not await self._signal(process, use)
            self._refused.clear()
        except ProcessGoneError as error:
            logger.info("process %d of %s is left alone: %s", use.process.pid, use.container, error)
        except SignalRefusedError as error:
            give_up = True
            self._refused.report(f"the memory guard cannot end processes: {error}")
        self._over.done(use, trio.current_time(), give_up=give_up)

    async def _signal(self, process: OpenProcess, use: OverUse) -> bool:
        """Send SIGTERM, and SIGKILL if the process still runs after the grace. Returns False if it survives that."""
        name = f"process {use.process.pid} of {use.container} ({use.process_memory / GIB:.1f} GiB)"
        for number, action, reason, seconds in (
            (SIGTERM, "terminate", Reason.PROCESS_TERMINATED, self._options.grace),
            (SIGKILL, "kill", Reason.PROCESS_KILLED, KILL_TIME),
        ):
            now = self._over.last(use.uuid, use.container)
            if now is None:
                logger.info("%s is left alone: its container does not use too much any more", name)
                return True
            process.send(number)
            self._count(use, action)
            self._report(reason, now, f"sent {number.name} to {name}, which has {seconds:g} s to end")
            if await process.ends_within(seconds):
                logger.info("%s ended after %s", name, number.name)
                return True
        logger.error(
            "%s still runs %g s after SIGKILL, so it hangs in the kernel, probably in the driver, and is left alone: "
            "see `dmesg`, reset the GPU or reboot the node",
            name,
            KILL_TIME,
        )
        return False

    def _count(self, use: OverUse, action: str) -> None:
        container = use.container
        self._actions[use.uuid, container.namespace, container.pod, container.container, action] += 1

    def _report(self, reason: Reason, use: OverUse, what: str) -> None:
        message = f"{_describe(use)}; {what}"
        logger.warning("%s", message)
        self._node.notices.add(Notice(reason, use.uuid, message, str(use.container), use.container.container))

    def _consequence(self, use: OverUse) -> str:
        if not self._options.terminate:
            return "-memory-guard warn leaves it running"
        if use.mps:
            return "it is left running, because an MPS server uses the GPU, and the end of one client can end others"
        return "-memory-guard terminate ends the one that is furthest above its part"


def _describe(use: OverUse) -> str:
    """Return who uses how much of what it may use, and how full the GPU is."""
    return (
        f"{label(use.uuid)}: container {use.container.container} of {use.container} uses {use.used / GIB:.1f} GiB and "
        f"may use {use.allowed / GIB:.1f} (tolerance {use.tolerance / GIB:.1f}); of the GPU's memory, "
        f"{part_of(use.gpu_used, use.gpu_total)} are used"
    )
