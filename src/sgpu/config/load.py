"""Flags, environment and file → Settings, and where each value came from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import attrs

from sgpu.config.flags import ENVIRONMENT_PREFIX, UsageError, check, kind_of, quote
from sgpu.config.settings import SETTINGS, Settings, endpoint
from sgpu.config.values import (
    BOOLEAN,
    LONGEST_PROFILE,
    MEMORY_LIMITS,
    MIG_PROFILE,
    NAMESPACES,
    NUMBERS,
    RESOURCE,
    SHARES,
    Kind,
    parse_limits,
)
from sgpu.driver.xids import XidPolicy, parse_numbers
from sgpu.lib.files import MAX_SOCKET_PATH_BYTES
from sgpu.node.policy import BUS_ID, Mig, Policy, Rule, profile_resource

if TYPE_CHECKING:
    from sgpu.config.file import Entry

#: What an entry of `gpus` in the file names GPUs by, and all that it takes.
SELECTORS: Final = ("uuid", "pci-bus-id", "name", "mig-profile")
RULE_KINDS: Final = {
    "uuid": Kind(
        "the UUID of a GPU or a MIG instance, as `nvidia-smi -L` shows it (MIG-GPU-… of drivers before R470 is none: "
        "an instance that is created later gets the name of another)",
        str,
        lambda value: value.upper().startswith(("GPU-", "MIG-")) and not value.upper().startswith("MIG-GPU-"),
    ),
    "pci-bus-id": Kind("a PCI bus id, as in 0000:3b:00.0", str, lambda value: bool(BUS_ID.fullmatch(value))),
    "name": Kind("a pattern of product names, as in *A100*", str, bool),
    "mig-profile": MIG_PROFILE,
    "shares": SHARES,
    "resource": RESOURCE,
    "memory-limits": MEMORY_LIMITS,
    "exclude": BOOLEAN,
}
#: What an entry may say of the GPUs that it selects, apart from excluding them.
TERMS: Final = ("shares", "resource", "memory-limits")
#: From which likeness on a variable counts as a misspelt setting. Kubernetes' own variables for a Service named sgpu
#: (SGPU_PORT_80_TCP_ADDR) are below it.
_NEAR: Final = 0.85
#: Two names of one setting: the daemon polls the driver and looks at pods together.
INTERVALS: Final = ("sample-interval", "health-interval")
#: Where a kubelet with its default root directory connects to plugins.
KUBELET_DIRECTORY: Final = PurePosixPath("/var/lib/kubelet/device-plugins")
NVIDIA_RESOURCES: Final = frozenset({"nvidia.com/gpu", "nvidia.com/gpu.shared"})


@attrs.frozen
class Loaded:
    """The effective settings, for each the place that it came from, and what each GPU is offered as."""

    settings: Settings
    origins: Mapping[str, str]
    policy: Policy
    file: str = ""  # the -config file, if there is one
    xids: XidPolicy = attrs.Factory(XidPolicy)
    warnings: tuple[str, ...] = ()  # what was set and is not used as it was


def load(flags: Mapping[str, str], environment: Mapping[str, str]) -> Loaded:
    """Return the effective settings: flag beats environment beats file beats default. Raises UsageError.

    Variables with our prefix that name no setting are left alone: Kubernetes makes some for a Service named `sgpu`.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(SETTINGS, "default")

    def take(name: str, value: object, origin: str) -> None:
        values[name], origins[name] = value, origin

    config, config_origin = _config_path(flags, environment)
    rules: tuple[Rule, ...] = ()
    for name, entry in _read_file(config, config_origin).items() if config else ():
        if name == "gpus":
            rules = _rules(entry, config)
        elif name in SETTINGS:
            kind = kind_of(name)
            take(name, check(name, _plain(kind, entry.value), f"{config}:{entry.line}", kind, kind.from_file), config)
        else:
            raise UsageError(
                f"unknown key {quote(name)} ({config}:{entry.line}); the file takes: {', '.join(SETTINGS)}, gpus"
            )
    for name in SETTINGS:
        variable = _variable(name)
        if variable in environment:
            take(name, _from_text(name, environment[variable], variable), variable)
    for name, text in flags.items():
        if name in SETTINGS:
            take(name, _from_text(name, text, "command line"), "command line")
    warnings = (*_merge_intervals(values, origins), *_unknown_variables(environment))
    settings = Settings(**{name.replace("-", "_"): value for name, value in values.items()})
    policy = _policy(settings, rules)
    warnings = (*warnings, *_foreign_resources(policy))
    _check_socket_path(settings, settings.resource_name, f"-resource-name ({origins['resource-name']})", origins)
    if policy.mig is Mig.PROFILE:
        longest = profile_resource(policy.mig_resource, LONGEST_PROFILE)
        _check_socket_path(settings, longest, f"-mig-resource-name ({origins['mig-resource-name']})", origins)
    for rule in rules:
        if rule.resource:
            _check_socket_path(settings, rule.resource, f"gpus: resource ({rule.place})", origins)
    return Loaded(settings, origins, policy, config, _xid_policy(settings, origins), warnings)


def _policy(settings: Settings, rules: tuple[Rule, ...]) -> Policy:
    mig, name = Mig(settings.mig), settings.mig_resource_name
    if "/" not in name:
        name = f"{settings.resource_name.partition('/')[0]}/{name}"
    pattern = name if mig is Mig.PROFILE else ""
    factor = parse_limits(settings.memory_limits)
    return Policy(settings.resource_name, settings.gpu_duplication_factor, rules, mig, pattern, factor)


def _unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable with our prefix that is nearly the name of a setting."""
    known = {_variable(name) for name in (*SETTINGS, "config")}
    unknown = [name for name in sorted(environment) if name.startswith(ENVIRONMENT_PREFIX) and name not in known]
    if unknown:
        import difflib  # here, because mostly there are none

        for name in unknown:
            if near := difflib.get_close_matches(name, known, n=1, cutoff=_NEAR):
                yield f"the variable {name} is no setting and is ignored; did you mean {near[0]}?"


def _merge_intervals(values: dict[str, Any], origins: dict[str, str]) -> tuple[str, ...]:
    """Give the two names of the one interval the same value, and return a warning where they were set to two."""
    given = {name: values[name] for name in INTERVALS if name in values}
    if not given:
        return ()
    winner = min(given, key=lambda name: given[name])
    for name in INTERVALS:
        values[name], origins[name] = values[winner], origins[winner]
    if len(set(given.values())) == 1:
        return ()
    both = " and ".join(f"-{name} {value:g}" for name, value in given.items())
    return (f"{both} are one setting: the smaller counts, {values[winner]:g} s; leave one out",)


def _xid_policy(settings: Settings, origins: Mapping[str, str]) -> XidPolicy:
    try:
        return XidPolicy(parse_numbers(settings.ignore_xids), parse_numbers(settings.critical_xids))
    except ValueError as error:
        places = f"-ignore-xids ({origins['ignore-xids']}) and -critical-xids ({origins['critical-xids']})"
        raise UsageError(f"{places} contradict each other: {error}") from error


def _config_path(flags: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, str]:
    if "config" in flags:
        return flags["config"], "command line"
    return environment.get(_variable("config"), ""), _variable("config")


def _read_file(path: str, origin: str) -> Mapping[str, Entry]:
    from sgpu.config import file  # here, because a daemon without a file should not pay for YAML

    try:
        return file.read(Path(path))
    except file.ConfigFileError as error:
        raise UsageError(f"-config {path} ({origin}) {error}") from error


def _rules(entry: Entry, path: str) -> tuple[Rule, ...]:
    """Return the rules per GPU, the value of the file's key `gpus`."""
    if not isinstance(entry.value, list):
        raise UsageError(f"gpus ({path}:{entry.line}) takes a list of entries, as in `- uuid: …`")
    rules = tuple(_rule(item.value, f"{path}:{item.line}") for item in entry.value)
    seen: dict[tuple[str, ...], Rule] = {}
    for rule in rules:
        other = seen.setdefault((rule.uuid, rule.pci_bus_id, rule.name, rule.mig_profile), rule)
        if other is not rule:
            raise UsageError(f"gpus: {other} and {rule} select the same GPUs")
    return rules


def _rule(fields: object, place: str) -> Rule:
    if not isinstance(fields, dict):
        raise UsageError(f"gpus: an entry ({place}) is a mapping, as in `uuid: …`")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(name, str) or name not in RULE_KINDS:
            raise UsageError(f"gpus: unknown key {quote(name)} ({place}); an entry takes {', '.join(RULE_KINDS)}")
        kind = RULE_KINDS[name]
        try:
            values[name] = kind.from_file(value)
        except ValueError:
            raise UsageError(f"gpus: {name}: {quote(value)} ({place}) is not {kind.takes}") from None
    if sum(name in fields for name in SELECTORS) != 1:
        raise UsageError(f"gpus: an entry ({place}) takes exactly one of {', '.join(SELECTORS)}")
    if not values.keys() & set(TERMS) and not values.get("exclude"):
        raise UsageError(f"gpus: an entry ({place}) says nothing: it takes {', '.join(TERMS)} or exclude too")
    if values.get("exclude") and len(values) > 2:  # the selector and exclude
        raise UsageError(f"gpus: an entry ({place}) that excludes takes none of {', '.join(TERMS)}")
    limits = values.pop("memory-limits", None)
    factor = None if limits is None else parse_limits(limits)
    return Rule(place=place, limit_factor=factor, **{name.replace("-", "_"): value for name, value in values.items()})


def _from_text(name: str, text: str, origin: str) -> object:
    kind = kind_of(name)
    return check(name, text, origin, kind, kind.from_text)


def _plain(kind: Kind, value: object) -> object:
    """Return the value without the lines that it stands in. A list is what YAML has for values with commas between."""
    if not isinstance(value, list):
        return value
    items = [entry.value for entry in value]
    item_type = {NUMBERS: int, NAMESPACES: str}.get(kind)
    if items and all(type(item) is item_type for item in items):
        return ",".join(map(str, items))
    return items


def _check_socket_path(settings: Settings, resource: str, named: str, origins: Mapping[str, str]) -> None:
    path = PurePosixPath(settings.plugin_directory) / endpoint(resource)
    kubelets_path = KUBELET_DIRECTORY / endpoint(resource)
    limit = f"the path of a socket takes at most {MAX_SOCKET_PATH_BYTES} bytes"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            f"-plugin-directory ({origins['plugin-directory']}) and {named} are too long together: {path}; {limit}"
        )
    if len(os.fsencode(kubelets_path)) > MAX_SOCKET_PATH_BYTES:  # the kubelet could never connect
        raise UsageError(f"{named} is too long: the kubelet connects to {kubelets_path}; {limit}")


def _foreign_resources(policy: Policy) -> Iterator[str]:
    """Yield a warning for each resource that NVIDIA's plugin offers by default."""
    for resource in policy.resources():
        if resource in NVIDIA_RESOURCES:
            yield (
                f"{resource} is the name that NVIDIA's device plugin registers: where both run on a node, they replace "
                f"each other; remove it there, or choose another name"
            )


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.replace("-", "_").upper()
