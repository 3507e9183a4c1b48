"""What was read of another plugin's configuration: settings and rules of ours, and what does not carry over.

Values only. Knows neither plugin.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeGuard

import attrs
import yaml

from sgpu.config.values import RESOURCE, SHARES, Kind
from sgpu.lib.logs import cut, printable

#: Comments of one file. YAML's aliases can make millions of values of a few lines.
MOST_NOTES: Final = 200
#: Levels of a configuration; theirs have five.
MOST_LEVELS: Final = 12
MOST_QUOTED: Final = 60
MOST_PATH: Final = 200


class UnreadableError(Exception):
    """The file is not what it should be. The message says what to do."""


@attrs.frozen
class Imported:
    """`source` names the plugin; `notes` are a line each."""

    source: str
    settings: Mapping[str, Any]
    rules: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def text(self, file: str) -> str:
        """Return the -config file."""
        lines = [f"# From {printable(file)}, {self.source}. See docs/migration.md."]
        content = {**self.settings, **({"gpus": list(self.rules)} if self.rules else {})}
        body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True) if content else "{}\n"
        return (
            "\n".join((*lines, body, *(f"# not carried over: {printable(note)}" for note in self.notes))).strip() + "\n"
        )


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """Yield each value with its path, as `flags.plugin.passDeviceSpecs`. A list is one value."""
    if isinstance(value, Mapping) and value and len(path) < MOST_LEVELS:
        for key, each in value.items():
            yield from leaves(each, (*path, str(key)))
    else:
        yield ".".join(path), value


def notes(
    content: Mapping[str, Any], known: Mapping[str, str | None], same: Mapping[str, Sequence[object]]
) -> Iterator[str]:
    """Yield a line for each value that does not carry over, at most MOST_NOTES.

    `known` has a reason by path, or by the first part of a path; None: it carries over. `same` has the values by path
    that mean what sgpu does anyway.
    """
    for number, (path, value) in enumerate(leaves(content)):
        if number == MOST_NOTES:
            yield "and more: the file has too many values"
            return
        if value is None or value in ([], {}, "") or value in same.get(path, ()):
            continue
        reason = next((known[prefix] for prefix in _prefixes(path) if prefix in known), "unknown here")
        if reason is not None:
            yield f"{cut(path, MOST_PATH)}: {quote(value)}: {reason}"


def _prefixes(path: str) -> Iterator[str]:
    """Yield the path, then those above it."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def quote(value: object) -> str:
    """Return a value for a message. YAML's aliases can make one that would fill the memory as text."""
    return cut(reprlib.repr(value), MOST_QUOTED)


def is_gpu(value: object) -> TypeGuard[str]:
    """Return whether this is a GPU's UUID, as the -config file takes it."""
    return isinstance(value, str) and value.startswith("GPU-")


def shares(value: object, path: str) -> int:
    """Return a number of shares. Raises UnreadableError."""
    number: int = _checked(SHARES, value, path)
    return number


def resource(value: object, path: str) -> str:
    """Return the name of a resource. Raises UnreadableError."""
    name: str = _checked(RESOURCE, value, path)
    return name


def _checked(kind: Kind, value: object, path: str) -> Any:  # noqa: ANN401  # as the kind has it
    convert: Callable[[Any], object] = kind.from_file
    try:
        return convert(value)
    except ValueError:
        raise UnreadableError(f"{path}: {quote(value)} is not {kind.takes}") from None
