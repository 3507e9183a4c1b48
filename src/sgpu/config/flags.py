"""argv → flags, and what is said of a value that can't be used. Imports little: `-help` and `-version` wait for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from sgpu.config.settings import SETTINGS
from sgpu.config.values import BOOLEAN, Kind

ENVIRONMENT_PREFIX: Final = "SGPU_"
#: Characters of a value that are quoted in a message.
MOST_QUOTED: Final = 100
#: Characters of a message: what is quoted of a file can be as long as the file.
MOST_MESSAGE: Final = 1500
CONFIG: Final = Kind("the path of a YAML file", str, bool)
#: Flags that do something instead of setting something.
ACTIONS: Final = ("help", "h", "version", "print-config")


class UsageError(Exception):
    """A setting has an invalid value. One line: the setting, where it came from, what it takes."""

    def __init__(self, message: str) -> None:
        from sgpu.lib.logs import cut, printable  # here, as `quote` does: mostly there is no such error

        super().__init__(cut(printable(message), MOST_MESSAGE))


@attrs.frozen
class Flags:
    """A command line taken apart. `values` has the text of each setting that was given, the last one winning;
    `options` the value of each option of a command.
    """

    values: Mapping[str, str]
    actions: frozenset[str]
    positional: tuple[str, ...]
    options: Mapping[str, Any] = attrs.Factory(dict)


def parse_flags(arguments: Sequence[str], options: Mapping[str, Kind] | None = None) -> Flags:
    """Take a command line apart as Go's `flag` package does: `-flag value`, `-flag=value`, one dash or two.

    A boolean takes its value only behind `=`. `options` are flags that a command takes beside the settings. Raises
    UsageError for a flag that is unknown or lacks its value.
    """
    options = options or {}
    kinds = {**{name: kind_of(name) for name in SETTINGS}, "config": CONFIG, **options}
    values: dict[str, str] = {}
    actions: set[str] = set()
    positional: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            positional.extend(rest)
        elif not argument.startswith("-") or argument == "-":
            positional.append(argument)
        else:
            name, equals, value = argument[2 if argument.startswith("--") else 1 :].partition("=")
            if name in ACTIONS:
                if check(name, value if equals else "true", "command line", BOOLEAN, BOOLEAN.from_text):
                    actions.add(name)
                continue
            if name not in kinds:
                raise UsageError(f"unknown flag {argument.split('=')[0]} (see -help)")
            if not equals:
                value = "true" if kinds[name].type is bool else next(rest, "")
            if not value and (name == "config" or not equals):
                raise UsageError(f"-{name} (command line) needs a value: {kinds[name].takes}")
            values[name] = value
    chosen = {
        name: check(name, values.pop(name), "command line", kind, kind.from_text)
        for name, kind in options.items()
        if name in values
    }
    return Flags(values, frozenset(actions), tuple(positional), chosen)


def check(name: str, value: object, origin: str, kind: Kind, convert: Any) -> object:  # noqa: ANN401
    """Return the value, converted. Raises UsageError where it is none of this kind."""
    try:
        return convert(value)
    except ValueError:
        raise UsageError(f"-{name}: {quote(value)} ({origin}) is not {kind.takes}") from None


def quote(value: object) -> str:
    """Return what the user gave, cut to what fits into a message."""
    from sgpu.lib.logs import cut

    return cut(repr(value), MOST_QUOTED)


def kind_of(name: str) -> Kind:
    """Return the kind of value that a setting takes."""
    kind: Kind = SETTINGS[name].metadata["kind"]
    return kind
