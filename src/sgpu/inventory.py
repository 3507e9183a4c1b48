"""The one piece of changing state: the node's GPUs, and an event for when they change. Knows neither NVML nor gRPC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
import trio

from sgpu.device import Device, Share


class Inventory:
    """The GPUs as last seen. Read `changed` before `devices`, then await it: no change is missed."""

    def __init__(self, devices: Iterable[Device] = ()) -> None:
        self.devices: tuple[Device, ...] = tuple(devices)
        self.changed = trio.Event()
        self._by_uuid = {device.uuid: device for device in self.devices}
        self._withheld: Mapping[str, frozenset[int]] = {}

    def replace(self, devices: Iterable[Device]) -> None:
        """Swap in a new list. Readers are woken only if it differs, so that an idle node sends nothing."""
        new = tuple(map(self._with_withheld, devices))
        if new == self.devices:
            return
        self.devices = new
        self._by_uuid = {device.uuid: device for device in new}
        self.changed.set()
        self.changed = trio.Event()

    def withhold(self, numbers: Mapping[str, frozenset[int]]) -> None:
        """List these shares, by UUID, as unhealthy from now on, and no others for that reason."""
        self._withheld = numbers
        self.replace(self.devices)

    def give(self, share_ids: Iterable[str]) -> None:
        """A container gets these shares: from now on they are in use, and those are never withheld."""
        if not self._withheld:
            return
        given = [share for share_id in share_ids if (share := Share.parse(share_id))]
        if any(share.number in self._withheld.get(share.uuid, ()) for share in given):
            self.withhold(
                {
                    uuid: numbers - {share.number for share in given if share.uuid == uuid}
                    for uuid, numbers in self._withheld.items()
                }
            )

    def find(self, share_id: str) -> Device | None:
        """The GPU that a share id names, or None when there is no such GPU or it has no such share."""
        share = Share.parse(share_id)
        device = self.find_device(share.uuid) if share else None
        if share is None or device is None:
            return None
        return device if share.number < device.shares or share.number in device.kept else None

    def find_device(self, uuid: str) -> Device | None:
        """The GPU with that UUID, or None."""
        return self._by_uuid.get(uuid)

    async def wait_filled(self) -> None:
        """Until there is a GPU."""
        while not self.devices:
            await self.changed.wait()

    def _with_withheld(self, device: Device) -> Device:
        numbers = self._withheld.get(device.uuid, frozenset())
        return device if device.withheld == numbers else attrs.evolve(device, withheld=numbers)
