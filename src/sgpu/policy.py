"""Which GPU is offered as what: the operator's rules per GPU, and the GPUs divided by them. Pure.

Knows neither trio, nor gRPC, nor NVML.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Final

import attrs

from sgpu.device import Device, Share

#: Domain (which may be left out), bus, device and function of a PCI device, in hexadecimal.
BUS_ID: Final = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")


class PolicyConflictError(Exception):
    """Two rules claim one GPU. The message names it and both places."""


@attrs.frozen
class Rule:
    """What is to become of the GPUs that one entry of the file names, by one of three things.

    `name` is a pattern as in a shell (`*A100*`), case not minded. `place` is where the entry stands. What is None
    stays as it is for other GPUs.
    """

    place: str = attrs.field(eq=False)  # a comment above it makes no other rule of it
    uuid: str = ""
    pci_bus_id: str = ""
    name: str = ""
    shares: int | None = None
    resource: str | None = None
    exclude: bool = False

    def matches(self, device: Device) -> bool:
        """Whether the rule is about this GPU."""
        if self.uuid:
            return device.uuid.lower() == self.uuid.lower()
        if self.pci_bus_id:
            return _bus_id(device.pci_bus_id) == _bus_id(self.pci_bus_id)
        return fnmatch.fnmatchcase(device.name.lower(), self.name.lower())

    def __str__(self) -> str:
        selector = next(
            f"{key}: {value}"
            for key, value in (("uuid", self.uuid), ("pci-bus-id", self.pci_bus_id), ("name", self.name))
            if value
        )
        return f"`{selector}` ({self.place})"


@attrs.frozen
class Policy:
    """What every GPU is offered as, unless a rule says otherwise."""

    resource: str
    shares: int
    rules: tuple[Rule, ...] = ()

    def resources(self) -> tuple[str, ...]:
        """All names that GPUs can be offered under, each once; the one for all others first."""
        named = (rule.resource for rule in self.rules if rule.resource and not rule.exclude)
        return tuple(dict.fromkeys((self.resource, *named)))

    def unmatched(self, devices: Sequence[Device]) -> list[Rule]:
        """The rules that are about no GPU of the node."""
        return [rule for rule in self.rules if not any(rule.matches(device) for device in devices)]


def divide(policy: Policy, devices: Iterable[Device], kept: Mapping[str, Set[str]]) -> Mapping[str, tuple[Device, ...]]:
    """The GPUs by the resource that they are offered as, each with its shares. Every resource of the policy is there.

    `kept` are, by resource, the ids of shares that must stay known although there are fewer shares now: containers
    have them. By resource, because a share that is in use as one would be free as another. Raises PolicyConflictError.
    """
    numbers = {resource: _numbers(share_ids) for resource, share_ids in kept.items()}
    divided: dict[str, list[Device]] = {resource: [] for resource in policy.resources()}
    for device in devices:
        rule = _rule(policy, device)
        if rule and rule.exclude:
            continue
        resource = (rule.resource if rule else None) or policy.resource
        shares = policy.shares if rule is None or rule.shares is None else rule.shares
        held = numbers.get(resource, {}).get(device.uuid, [])
        beyond = tuple(sorted(number for number in held if number >= shares))
        divided[resource].append(attrs.evolve(device, shares=shares, kept=beyond))
    return {resource: tuple(offered) for resource, offered in divided.items()}


def _rule(policy: Policy, device: Device) -> Rule | None:
    matching = [rule for rule in policy.rules if rule.matches(device)]
    if len(matching) > 1:
        raise PolicyConflictError(
            f"GPU {device.uuid} ({device.name} at {device.pci_bus_id}) is claimed twice: "
            f"by {matching[0]} and by {matching[1]}"
        )
    return matching[0] if matching else None


def _numbers(share_ids: Set[str]) -> Mapping[str, list[int]]:
    """The numbers of the shares, by the UUID of their GPU."""
    numbers: dict[str, list[int]] = {}
    for share_id in share_ids:
        if share := Share.parse(share_id):
            numbers.setdefault(share.uuid, []).append(share.number)
    return numbers


def _bus_id(text: str) -> tuple[int, ...]:
    """Comparable, whether the domain is written with four digits or eight, or left out."""
    found = BUS_ID.fullmatch(text)
    return tuple(int(part or "0", 16) for part in found.groups()) if found else ()
