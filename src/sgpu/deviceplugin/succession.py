"""From one daemon to the next: the old one withdraws and goes on answering until the new one has registered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from sgpu.deviceplugin.place import Place
from sgpu.lib.concurrency import Broadcast, wait_until
from sgpu.node.state import NodeState
from sgpu.observe.registrations import Registrations

#: Seconds that all sessions get to withdraw. Each takes milliseconds.
TIMEOUT: Final = 1.0
#: Seconds for the kubelet to see that the streams have ended: a registration before would be disconnected with them.
#: Nobody waits for it, because the devices stay listed and the calls are answered meanwhile.
SETTLING_TIME: Final = 0.25
#: Seconds for calls that the kubelet began before the successor registered.
LINGERING_TIME: Final = 0.1
#: Seconds that handing over takes at most; Kubernetes kills the container after 10 (terminationGracePeriodSeconds).
HANDOVER_TIMEOUT: Final = 6.0


class Succession:
    """The way from one daemon to the next.

    `took_over`: this one has a predecessor, whose streams have only just ended. `leaving` is set when the sessions
    should withdraw and go on answering, `staying` when they should register again: nobody took over.
    """

    def __init__(self) -> None:
        self.took_over = False
        self.leaving = trio.Event()
        self.staying = trio.Event()
        self._registered = 0
        self._changed = Broadcast()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Count a session that has not withdrawn."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    async def withdraw(self) -> None:
        """Let all sessions withdraw, and return once the kubelet has seen it."""
        self.leaving.set()
        with trio.move_on_after(TIMEOUT):
            await wait_until(lambda: not self._registered, self._changed)
        await trio.sleep(SETTLING_TIME)

    def stay(self) -> None:
        """Let all sessions register again."""
        self.leaving = trio.Event()
        self.staying.set()

    def _count(self, difference: int) -> None:
        self._registered += difference
        self._changed.notify()


async def hand_over(place: Place, succession: Succession, node: NodeState, registrations: Registrations) -> None:
    """Leave the place to a daemon that stands by, if there is one."""
    with trio.move_on_after(HANDOVER_TIMEOUT):
        if await place.offer(succession.withdraw):
            await trio.sleep(LINGERING_TIME)
        elif succession.leaving.is_set():  # the kubelet would keep the devices of nobody
            succession.stay()
            await _wait_served(node, registrations)


async def confirm(place: Place, node: NodeState, registrations: Registrations) -> None:
    """Tell the daemon that offered its place when the kubelet has all resources from this one."""
    await place.taken.wait()
    await _wait_served(node, registrations)
    await place.confirm()


async def _wait_served(node: NodeState, registrations: Registrations) -> None:
    def is_served() -> bool:
        offered = [resource for resource in node.resources() if node.offered(resource)]
        return bool(offered) and all(map(registrations.serves, offered))

    await wait_until(is_served, registrations.changed)
