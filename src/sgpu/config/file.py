"""The -config file: YAML, with the line that each thing stands in. Knows no setting by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import yaml

from sgpu.lib.files import read_regular_file

#: Longest file, in bytes. A rule takes about 50.
MAX_BYTES: Final = 1024 * 1024
#: Values, with aliases replaced: 5000 rules have 50,000.
MOST_NODES: Final = 200_000
_NOTHING: Final = "tag:yaml.org,2002:null"
_MERGE: Final = "tag:yaml.org,2002:merge"
_TEXT: Final = "tag:yaml.org,2002:str"
_NUMBERS: Final = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_NUMBER: Final = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]+)?")


class ConfigFileError(Exception):
    """The file can't be read or is not what it should be. The message says where."""


@attrs.frozen
class Entry:
    """A value, and the line of the file that it stands in."""

    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                if key_node.value in seen:
                    raise ConfigFileError(f"has {key_node.value!r} twice, the second time in line {_line(key_node)}")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:  # noqa: ANN401
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        # To YAML 1.1 the PCI bus id 0000:05:00.0 is a number in base 60, 010 is 8 and 1_000 is 1000: a number is what a
        # flag would take for one, and the rest is text.
        return _TEXT if tag in _NUMBERS and not _NUMBER.fullmatch(str(value)) else tag


def read(path: Path) -> Mapping[str, Entry]:
    """Return the keys of the file's mapping. An empty file has none. A list's items are Entries themselves.

    Raises ConfigFileError.
    """
    try:
        text = read_regular_file(path, MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"can't be read: {error}") from error
    try:
        return _read(_Loader(text))
    except ConfigFileError:
        raise
    except yaml.MarkedYAMLError as error:
        message = ", ".join(filter(None, (error.context, error.problem)))
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigFileError(f"is not YAML: {message}{place}") from error
    except Exception as error:  # PyYAML lets through whatever its constructors raise
        raise ConfigFileError(f"is not YAML: {' '.join(str(error).split())}") from error


def _read(loader: _Loader) -> Mapping[str, Entry]:
    node = loader.get_single_node()
    if node is None or node.tag == _NOTHING:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigFileError("takes a mapping of settings, as in `gpu-duplication-factor: 50`")
    if _size(node, {}) > MOST_NODES:
        raise ConfigFileError("has aliases (*name) that stand for millions of values; write the values out")
    loader.construct_mapping(node, deep=True)  # for its checks
    return {
        str(loader.construct_object(key_node, deep=True)): Entry(_value(loader, value), _line(key_node))
        for key_node, value in node.value
    }


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes there are once each alias is replaced by what it stands for."""
    if id(node) not in known:
        known[id(node)] = 1  # for a node that contains itself, which the constructor refuses
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = isinstance(node, yaml.MappingNode)
        known[id(node)] += sum(_size(each, known) for child in children for each in (child if pairs else (child,)))
    return known[id(node)]


def _value(loader: _Loader, node: yaml.Node) -> object:
    if isinstance(node, yaml.SequenceNode):
        return [Entry(loader.construct_object(item, deep=True), _line(item)) for item in node.value]
    return loader.construct_object(node, deep=True)


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1
