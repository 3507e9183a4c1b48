"""The one piece of changing state: the node's GPUs, and an event for when they change. Knows neither NVML nor gRPC."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from sgpu.device import Device, Share


class Inventory:
    """The GPUs as last seen. Read `changed` before `devices`, then await it: no change is missed."""

    def __init__(self, devices: Iterable[Device] = ()) -> None:
        self.devices: tuple[Device, ...] = tuple(devices)
        self.changed = trio.Event()
        self._by_uuid = {device.uuid: device for device in self.devices}

    def replace(self, devices: Iterable[Device]) -> None:
        """Swap in a new list. Readers are woken only if it differs, so that an idle node sends nothing."""
        new = tuple(devices)
        if new == self.devices:
            return
        self.devices = new
        self._by_uuid = {device.uuid: device for device in new}
        self.changed.set()
        self.changed = trio.Event()

    def find(self, share_id: str) -> Device | None:
        """The GPU that a share id names, or None when there is no such GPU or it has no such share."""
        share = Share.parse(share_id)
        device = self._by_uuid.get(share.uuid) if share else None
        return device if share and device and share.number < device.shares else None
