"""argv, environment and file → Settings, and where each value came from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import attrs

from sgpu.logs import printable
from sgpu.rpc import MAX_PATH_BYTES
from sgpu.settings import BOOLEAN, KNOBS, Kind, Settings

ENVIRONMENT_PREFIX: Final = "SGPU_"
#: Flags that do something instead of setting something.
ACTIONS: Final = ("help", "h", "version", "print-config")


class UsageError(Exception):
    """What the user gave can't be used. One line: the setting, where it came from, what it takes."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@attrs.frozen
class Flags:
    """A command line taken apart. `values` has the text of each flag that was given, the last one winning."""

    values: Mapping[str, str]
    actions: frozenset[str]
    words: tuple[str, ...]


@attrs.frozen
class Loaded:
    """The effective settings, and for each the place that it came from."""

    settings: Settings
    origins: Mapping[str, str]


def parse_flags(arguments: Sequence[str]) -> Flags:
    """Take a command line apart as Go's `flag` package does: `-flag value`, `-flag=value`, one dash or two.

    A boolean takes its value only behind `=`. Raises UsageError for a flag that is unknown or lacks its value.
    """
    values: dict[str, str] = {}
    actions: set[str] = set()
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            words.extend(rest)
        elif not argument.startswith("-") or argument == "-":
            words.append(argument)
        else:
            name, equals, value = argument[2 if argument.startswith("--") else 1 :].partition("=")
            if name in ACTIONS:
                if _check(name, value if equals else "true", "command line", BOOLEAN.from_text):
                    actions.add(name)
                continue
            if name not in KNOBS and name != "config":
                raise UsageError(f"unknown flag {argument.split('=')[0]} (see -help)")
            if not equals:
                value = "true" if _is_boolean(name) else next(rest, "")
            if not value and (name == "config" or not equals):
                raise UsageError(f"-{name} (command line) needs a value: {_takes(name)}")
            values[name] = value
    return Flags(values, frozenset(actions), tuple(words))


def load(flags: Mapping[str, str], environment: Mapping[str, str]) -> Loaded:
    """The effective settings: flag beats environment beats file beats default. Raises UsageError.

    Variables with our prefix that name no setting are left alone: Kubernetes makes some for a Service named `sgpu`.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(KNOBS, "default")

    def take(name: str, value: object, origin: str) -> None:
        values[name], origins[name] = value, origin

    config, config_origin = _config_path(flags, environment)
    for name, value in _read_file(config, config_origin).items() if config else ():
        if name not in KNOBS:
            raise UsageError(f"unknown key {name!r} in {config} (it takes: {', '.join(KNOBS)})")
        take(name, _check(name, value, config, _kind(name).from_file), config)
    for name in KNOBS:
        variable = _variable(name)
        if variable in environment:
            take(name, _check(name, environment[variable], variable, _kind(name).from_text), variable)
    for name, text in flags.items():
        if name in KNOBS:
            take(name, _check(name, text, "command line", _kind(name).from_text), "command line")
    settings = Settings(**{name.replace("-", "_"): value for name, value in values.items()})
    _check_socket_path(settings, origins)
    return Loaded(settings, origins)


def _config_path(flags: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, str]:
    if "config" in flags:
        return flags["config"], "command line"
    return environment.get(_variable("config"), ""), _variable("config")


def _read_file(path: str, origin: str) -> Mapping[str, object]:
    import yaml  # here, because a daemon without a file should not pay for it

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"-config {path} ({origin}) can't be read: {error}") from error
    except Exception as error:  # beside its own errors PyYAML lets through whatever its constructors raise
        raise UsageError(f"-config {path} ({origin}) is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"-config {path} ({origin}) takes a mapping of settings, as in `gpu-duplication-factor: 50`")
    return {str(name): value for name, value in content.items()}


def _check(name: str, value: object, origin: str, convert: Any) -> object:  # noqa: ANN401
    try:
        return convert(value)
    except ValueError:
        raise UsageError(f"-{name}: {value!r} ({origin}) is not {_takes(name)}") from None


def _check_socket_path(settings: Settings, origins: Mapping[str, str]) -> None:
    path = PurePosixPath(settings.plugin_directory) / settings.endpoint
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise UsageError(
            f"-plugin-directory ({origins['plugin-directory']}) and -resource-name ({origins['resource-name']}) are "
            f"too long together: {path} is the path of a socket, which takes at most {MAX_PATH_BYTES} bytes"
        )


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.replace("-", "_").upper()


def _kind(name: str) -> Kind:
    kind: Kind = KNOBS[name].metadata["kind"]
    return kind


def _is_boolean(name: str) -> bool:
    return name in KNOBS and _kind(name).type is bool


def _takes(name: str) -> str:
    if name in ACTIONS:
        return BOOLEAN.takes
    return _kind(name).takes if name in KNOBS else "the path of a YAML file"
