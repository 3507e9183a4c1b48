"""The operator's rules: under which resource each unit is offered, and as how many shares. Pure.

Knows neither trio, nor gRPC, nor NVML.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import attrs

from sgpu.node.gpu import MIG_PREFIX, Gpu, MigInstance, Unit

#: Domain (which may be left out), bus, device and function of a PCI device, in hexadecimal.
BUS_ID: Final = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")


#: Where the name of an instance's profile goes in the name of its resource.
PROFILE: Final = "{profile}"
#: Slices of the largest card. By them an instance's part is judged where the memory of its card is unknown.
_SLICES: Final = 7
#: "3g.20gb", "1c.3g.20gb".
_PROFILE_SLICES: Final = re.compile(r"(\d+)g\.")


class Mig(enum.Enum):
    """How MIG instances are offered: as shares like GPUs, each whole under a resource for its profile, or not."""

    SHARED = "shared"
    PROFILE = "profile"
    OFF = "off"


class OffersRefusedError(Exception):
    """The rules and the node's GPUs together can't be offered. The message says why, and what to change."""


class PolicyConflictError(OffersRefusedError):
    """Two rules match one GPU or MIG instance. The message names it and both places."""


@attrs.frozen
class Rule:
    """One entry of the file: it selects GPUs by one of `uuid`, `pci_bus_id` and `name`, and says how to offer them.

    It selects MIG instances by their `uuid` or their `mig_profile`, or all of a GPU. `name` is a shell pattern
    (`*A100*`) and ignores case. `place` is where the entry stands in the file. Where `shares`, `resource` or
    `limit_factor` is None, the policy's own value applies.
    """

    place: str = attrs.field(eq=False)  # a comment above it makes no other rule of it
    uuid: str = ""
    pci_bus_id: str = ""
    name: str = ""
    mig_profile: str = ""
    shares: int | None = None
    resource: str | None = None
    exclude: bool = False
    limit_factor: float | None = None

    def matches(self, unit: Unit) -> bool:
        """Return whether the rule applies to this unit."""
        if self.selects_instances:
            return unit.instance is not None and self._names(unit.instance)
        if self.uuid:
            return unit.gpu.uuid.lower() == self.uuid.lower()
        if self.pci_bus_id:
            return parse_bus_id(unit.gpu.pci_bus_id) == parse_bus_id(self.pci_bus_id)
        return fnmatch.fnmatchcase(unit.gpu.name.lower(), self.name.lower())

    @property
    def selects_instances(self) -> bool:
        """Return whether it names MIG instances, and not GPUs."""
        return bool(self.mig_profile) or self.uuid.upper().startswith(MIG_PREFIX)

    def _names(self, instance: MigInstance) -> bool:
        return instance.uuid.lower() == self.uuid.lower() or instance.profile.lower() == self.mig_profile.lower()

    def __str__(self) -> str:
        selector = next(
            f"{key}: {value}"
            for key, value in (
                ("uuid", self.uuid),
                ("pci-bus-id", self.pci_bus_id),
                ("name", self.name),
                ("mig-profile", self.mig_profile),
            )
            if value
        )
        return f"`{selector}` ({self.place})"


@attrs.frozen
class Policy:
    """Offer every GPU as `shares` of `resource`, unless a rule says otherwise.

    `mig` says how MIG instances are offered, and `mig_resource` as what, where each profile has a resource of its own.
    `limit_factor` is how many times its fair part of the memory a container may use; 0: there is no limit.
    """

    resource: str
    shares: int
    rules: tuple[Rule, ...] = ()
    mig: Mig = Mig.SHARED
    mig_resource: str = ""
    limit_factor: float = 0.0

    def resources(self) -> tuple[str, ...]:
        """Return the names of all resources but those of MIG profiles, each once, the default first."""
        named = (rule.resource for rule in self.rules if rule.resource and not rule.exclude)
        return tuple(dict.fromkeys((self.resource, *named)))

    def may_offer(self, resource: str) -> bool:
        """Return whether the node's units can be offered as this resource, whatever units there are."""
        before, place, after = self.mig_resource.partition(PROFILE)
        of_profile = place and resource.startswith(before) and resource.endswith(after)
        return resource in self.resources() or bool(self.mig is Mig.PROFILE and of_profile)

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
        if (rule and rule.exclude) or (unit.instance and policy.mig is Mig.OFF):
            continue
        resource = (rule.resource if rule else None) or _resource(policy, unit)
        yield resource, unit, Terms(_shares(policy, unit, rule), _limit_factor(policy, unit, rule))


def mig_notes(policy: Policy, gpus: Iterable[Gpu]) -> list[str]:
    """Return what an operator should know of the GPUs whose MIG mode is on, or will be after a reset."""
    notes = []
    for gpu in gpus:
        if gpu.mig_mode and policy.mig is Mig.OFF:
            notes.append(f"GPU {gpu.uuid} is in MIG mode and left out, because of -mig off")
        elif gpu.mig_mode and not gpu.instances:
            notes.append(
                f"GPU {gpu.uuid} is in MIG mode and has no instances, so nothing of it is offered; create some with "
                f"`nvidia-smi mig -cgi PROFILE -C`, or turn MIG mode off"
            )
        if gpu.mig_mode is not gpu.mig_pending:
            mode = "on" if gpu.mig_pending else "off"
            notes.append(
                f"MIG mode of GPU {gpu.uuid} will be {mode} after its next reset; until then it stays as it is"
            )
    return notes


def profile_resource(pattern: str, profile: str) -> str:
    """Return the name of the resource of a MIG profile. `+` is not legal there."""
    return pattern.replace(PROFILE, profile.replace("+", "."))


def _resource(policy: Policy, unit: Unit) -> str:
    if unit.instance and policy.mig is Mig.PROFILE:
        return profile_resource(policy.mig_resource, unit.instance.profile)
    return policy.resource


def _shares(policy: Policy, unit: Unit, rule: Rule | None) -> int:
    """Return the number of shares. What counts for a card counts for an instance in proportion, if it is shared."""
    shares = policy.shares if rule is None or rule.shares is None else rule.shares
    if unit.instance is None or (rule and rule.selects_instances and rule.shares is not None):
        return shares
    if policy.mig is Mig.PROFILE:
        return 1
    part, whole = _part(unit.instance, unit.gpu)
    return max(shares * part // whole, 1)


def _limit_factor(policy: Policy, unit: Unit, rule: Rule | None) -> float:
    """Return it as in Policy. Within an instance nobody can be limited: the driver refuses its handles."""
    if unit.instance:
        return 0.0
    return policy.limit_factor if rule is None or rule.limit_factor is None else rule.limit_factor


def _part(instance: MigInstance, gpu: Gpu) -> tuple[int, int]:
    """Return an instance's part of its card, by memory where that is known: the part, and the whole."""
    if instance.memory_bytes and gpu.memory_total:
        return min(instance.memory_bytes, gpu.memory_total), gpu.memory_total
    slices = _PROFILE_SLICES.search(instance.profile)
    return min(int(slices[1]), _SLICES) if slices else 1, _SLICES


def _rule(policy: Policy, unit: Unit) -> Rule | None:
    """Return the rule for a unit. One that names an instance counts more than one that names its GPU."""
    matching = [rule for rule in policy.rules if rule.matches(unit)]
    matching = [rule for rule in matching if rule.selects_instances] or matching
    if len(matching) > 1:
        raise PolicyConflictError(
            f"{unit} ({unit.name} at {unit.gpu.pci_bus_id}) is matched by two rules, "
            f"{matching[0]} and {matching[1]}; leave one out"
        )
    return matching[0] if matching else None


def parse_bus_id(text: str) -> tuple[int, ...]:
    """Return the numbers of a bus id, for comparing it with one whose domain is written otherwise or left out.

    Empty: it is none.
    """
    found = BUS_ID.fullmatch(text)
    return tuple(int(part or "0", 16) for part in found.groups()) if found else ()
