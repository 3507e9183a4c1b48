"""The node's GPUs, divided into resources: an inventory for each. Decides at once; knows neither gRPC nor NVML."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Final

import trio

from sgpu import listing
from sgpu.device import Device
from sgpu.inventory import Inventory
from sgpu.logs import OnChange
from sgpu.policy import Policy, PolicyConflictError, divide

logger = logging.getLogger(__name__)

#: What rules and GPUs together can be refused for.
REFUSALS: Final = (listing.TooManySharesError, PolicyConflictError)


class Catalog:
    """What is offered, by the name of the resource. `changed` is set, and replaced, when resources come or go.

    A resource that the policy has no longer stays, without devices, until it is dropped.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.inventories: dict[str, Inventory] = {}
        self.changed = trio.Event()
        self._devices: tuple[Device, ...] = ()
        self._offerable: Set[str] = frozenset()  # the UUIDs that were last divided
        self._kept: Mapping[str, Set[str]] = {}
        self._refused = OnChange(logger, logging.ERROR)
        self._unmatched = OnChange(logger, logging.WARNING)

    def replace(self, devices: tuple[Device, ...]) -> None:
        """The node has these GPUs now.

        Raises listing.TooManySharesError or PolicyConflictError for the first ones; later they are logged, and only
        those from before stay offered: a GPU that was added must not end the daemon.
        """
        self._devices = devices
        self._update()

    def apply(self, policy: Policy) -> None:
        """The operator has other rules now. Raises as `replace` does, and then keeps the old ones."""
        self._divide(policy, self._devices)
        self.policy = policy
        self._refused.clear()

    def keep(self, allocated: Mapping[str, Set[str]]) -> None:
        """Containers have these shares, by resource: they stay known, even if there are fewer now."""
        if allocated != self._kept:
            self._kept = allocated
            if self._devices:
                self._update()

    def drop(self, resource: str) -> None:
        """Forget a resource that is no longer offered."""
        del self.inventories[resource]

    def _update(self) -> None:
        try:
            self._divide(self.policy, self._devices)
        except REFUSALS as error:
            if not self._offerable:
                raise
            self._refused.report(f"GPUs that were added are not offered: {error}")
            with suppress(*REFUSALS):
                self._divide(self.policy, tuple(each for each in self._devices if each.uuid in self._offerable))
        else:
            self._refused.clear()

    def _divide(self, policy: Policy, devices: tuple[Device, ...]) -> None:
        divided = divide(policy, devices, self._kept)
        for offered in divided.values():
            listing.check_size(offered)
        if devices:
            unmatched = "; ".join(f"{rule} is about no GPU of this node" for rule in policy.unmatched(devices))
            self._unmatched.report(unmatched) if unmatched else self._unmatched.clear()
        self._offerable = frozenset(device.uuid for device in devices)
        self._offer(divided)

    def _offer(self, divided: Mapping[str, tuple[Device, ...]]) -> None:
        new = divided.keys() - self.inventories.keys()
        gone = [resource for resource in self.inventories if resource not in divided]
        for resource in gone:
            self.inventories[resource].replace(())
        for resource, offered in divided.items():
            self.inventories.setdefault(resource, Inventory()).replace(offered)
        if new or gone:
            self.changed.set()
            self.changed = trio.Event()
