"""SharingConfig: what a claim or a device class may say to sgpu about how a GPU is shared. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from sgpu.dra.slices import DRIVER

API_VERSION: Final = f"{DRIVER}/v1alpha1"
KIND: Final = "SharingConfig"
#: `Claimed`: a container is held to what its claim has, where the node has memory limits. `Off`: it is not.
LIMITS: Final = ("Claimed", "Off")
#: Variables that sgpu sets, or that NVIDIA's container runtime reads: a claim must not get another GPU by them.
_RESERVED: Final = ("SGPU_", "NVIDIA_")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Where a configuration comes from, as the API has it.
FROM_CLASS: Final = "FromClass"


class SharingConfigError(Exception):
    """A configuration says what it may not. The message says where and what it takes."""


@attrs.frozen
class SharingConfig:
    """`framework_hints` None: as the node has it."""

    framework_hints: bool | None = None
    limited: bool = True
    environment: Mapping[str, str] = attrs.Factory(dict)


def read_configs(configs: Iterable[Mapping[str, Any]], request: str) -> SharingConfig:
    """Return what an allocation's `config` says for a request (`main` or, of a list of alternatives, `main/sub`).

    Later entries beat earlier ones, each field and variable by itself. Raises SharingConfigError.
    """
    config = SharingConfig()
    for entry in configs:
        opaque = entry.get("opaque") or {}
        requests = entry.get("requests") or ()
        if opaque.get("driver") == DRIVER and (not requests or {request, request.partition("/")[0]} & set(requests)):
            config = _read(opaque.get("parameters"), config, str(entry.get("source", "")))
    return config


def _read(parameters: object, before: SharingConfig, source: str) -> SharingConfig:
    if not isinstance(parameters, dict):
        raise SharingConfigError(f"the parameters for {DRIVER} are no object: {parameters!r}")
    fields = dict(parameters)
    found = fields.pop("apiVersion", None), fields.pop("kind", None)
    if found != (API_VERSION, KIND):
        raise SharingConfigError(
            f"parameters of apiVersion {found[0]!r} and kind {found[1]!r}: this sgpu takes {API_VERSION} {KIND}"
        )
    hints = fields.pop("frameworkHints", before.framework_hints)
    limit = fields.pop("memoryLimit", "Claimed" if before.limited else "Off")
    environment = fields.pop("environment", {})
    if fields:
        raise SharingConfigError(
            f"{KIND} has no field {sorted(fields)[0]!r}; it takes frameworkHints, memoryLimit and environment"
        )
    if hints is not None and not isinstance(hints, bool):
        raise SharingConfigError(f"frameworkHints: {hints!r} is not true or false")
    if limit not in LIMITS:
        raise SharingConfigError(f"memoryLimit: {limit!r} is not {' or '.join(LIMITS)}")
    if limit == "Off" and before.limited and source != FROM_CLASS:
        raise SharingConfigError("memoryLimit: Off is for a DeviceClass to say, not for a claim")
    return SharingConfig(hints, limit == "Claimed", {**before.environment, **_environment(environment)})


def _environment(variables: object) -> Mapping[str, str]:
    if not isinstance(variables, dict):
        raise SharingConfigError("environment takes variables and their values")
    for name, value in variables.items():
        if not _NAME.fullmatch(name) or name.startswith(_RESERVED):
            raise SharingConfigError(
                f"environment: {name!r} is no name that a claim can set: letters, digits and _, and not "
                f"{' or '.join(f'{prefix}…' for prefix in _RESERVED)}"
            )
        if not isinstance(value, str) or "\0" in value:
            raise SharingConfigError(f"environment: the value of {name} is not a text; put it in quotes")
    return variables
