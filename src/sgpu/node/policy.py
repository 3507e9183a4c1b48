"""The operator's rules: under which resource each unit is offered, and as how many shares. Pure.

Knows neither trio, nor gRPC, nor NVML.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import attrs

from sgpu.node.gpu import Unit

#: Domain (which may be left out), bus, device and function of a PCI device, in hexadecimal.
BUS_ID: Final = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")


class OffersRefusedError(Exception):
    """The rules and the node's GPUs together can't be offered. The message says why, and what to change."""


class PolicyConflictError(OffersRefusedError):
    """Two rules match one GPU. The message names it and both places."""


@attrs.frozen
class Rule:
    """One entry of the file: it selects GPUs by one of `uuid`, `pci_bus_id` and `name`, and says how to offer them.

    `name` is a shell pattern (`*A100*`) and ignores case. `place` is where the entry stands in the file. Where
    `shares`, `resource` or `limit_factor` is None, the policy's own value applies.
    """

    place: str = attrs.field(eq=False)  # a comment above it makes no other rule of it
    uuid: str = ""
    pci_bus_id: str = ""
    name: str = ""
    shares: int | None = None
    resource: str | None = None
    exclude: bool = False
    limit_factor: float | None = None

    def matches(self, unit: Unit) -> bool:
        """Return whether the rule applies to this unit."""
        if self.uuid:
            return unit.uuid.lower() == self.uuid.lower()
        if self.pci_bus_id:
            return _bus_id(unit.gpu.pci_bus_id) == _bus_id(self.pci_bus_id)
        return fnmatch.fnmatchcase(unit.name.lower(), self.name.lower())

    def __str__(self) -> str:
        selector = next(
            f"{key}: {value}"
            for key, value in (("uuid", self.uuid), ("pci-bus-id", self.pci_bus_id), ("name", self.name))
            if value
        )
        return f"`{selector}` ({self.place})"


@attrs.frozen
class Policy:
    """Offer every GPU as `shares` of `resource`, unless a rule says otherwise.

    `limit_factor` is how many times its fair part of the memory a container may use; 0: there is no limit.
    """

    resource: str
    shares: int
    rules: tuple[Rule, ...] = ()
    limit_factor: float = 0.0

    def resources(self) -> tuple[str, ...]:
        """Return the names of all resources, each once, the default first."""
        named = (rule.resource for rule in self.rules if rule.resource and not rule.exclude)
        return tuple(dict.fromkeys((self.resource, *named)))

    def unmatched(self, candidates: Collection[Unit]) -> list[Rule]:
        """Return the rules that match none of these units."""
        return [rule for rule in self.rules if not any(rule.matches(unit) for unit in candidates)]


@attrs.frozen
class Terms:
    """How a unit is offered: as how many shares, and with what limit, as in Policy."""

    shares: int
    limit_factor: float


def assign(policy: Policy, candidates: Iterable[Unit]) -> Iterator[tuple[str, Unit, Terms]]:
    """Yield each unit that the policy offers, with its resource and the terms.

    Raises PolicyConflictError.
    """
    for unit in candidates:
        rule = _rule(policy, unit)
        if rule and rule.exclude:
            continue
        resource = (rule.resource if rule else None) or policy.resource
        yield (
            resource,
            unit,
            Terms(
                policy.shares if rule is None or rule.shares is None else rule.shares,
                policy.limit_factor if rule is None or rule.limit_factor is None else rule.limit_factor,
            ),
        )


def _rule(policy: Policy, unit: Unit) -> Rule | None:
    matching = [rule for rule in policy.rules if rule.matches(unit)]
    if len(matching) > 1:
        raise PolicyConflictError(
            f"GPU {unit.uuid} ({unit.name} at {unit.gpu.pci_bus_id}) is matched by two rules, "
            f"{matching[0]} and {matching[1]}; leave one out"
        )
    return matching[0] if matching else None


def _bus_id(text: str) -> tuple[int, ...]:
    """Return the numbers of a bus id, for comparing it with one whose domain is written otherwise or left out."""
    found = BUS_ID.fullmatch(text)
    return tuple(int(part or "0", 16) for part in found.groups()) if found else ()
