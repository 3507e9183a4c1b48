"""`sgpu import-config`: another plugin's configuration → a -config file of ours, on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from sgpu.commands.import_config import hami, nvidia
from sgpu.commands.import_config.imported import Imported, UnreadableError
from sgpu.lib.files import read_regular_file
from sgpu.lib.logs import few, printable
from sgpu.lib.output import checked_output

#: Longest file, in bytes: a ConfigMap takes 1 MiB.
MAX_BYTES: Final = 1024 * 1024
STANDARD_INPUT: Final = "-"
KNOWN: Final = (
    "NVIDIA's device plugin (version, flags, sharing), HAMi's device-config.yaml (nvidia) or config.json (nodeconfig), "
    "or a ConfigMap with one of them"
)


def import_config(file: str, name: str) -> bool:
    """Print the configuration. `name`: which one of several in the file. Returns False where it can't be read."""
    try:
        text = convert(_read(file), name).text("standard input" if file == STANDARD_INPUT else Path(file).name)
    except (OSError, UnreadableError) as error:
        print(f"sgpu: {printable(file)} can't be imported: {printable(str(error))}", file=sys.stderr)
        return False
    with checked_output():
        print(text, end="")
    return True


def convert(content: bytes, name: str = "") -> Imported:
    """Return what the content of a file says. Raises UnreadableError."""
    found = _mapping(content)
    if found.get("kind") == "ConfigMap":
        key, text = _choose("key", found.get("data"), name if _is_key(found, name) else "")
        found = _mapping(str(text).encode())
        name = "" if key == name else name
    if "nodeconfig" in found:
        return hami.of_node(_choose("node", _nodes(found["nodeconfig"]), name)[1])
    if name:
        raise UnreadableError(f"there is no {name!r} in it")
    if isinstance(found.get("nvidia"), Mapping):
        return hami.of_devices(found)
    if found.keys() & {"flags", "sharing"} or found.get("version") == "v1":
        return nvidia.of_plugin(found)
    raise UnreadableError(f"it is none of these: {KNOWN}")


def _nodes(nodes: object) -> Mapping[str, Mapping[str, Any]]:
    listed = nodes if isinstance(nodes, list) else ()
    return {
        str(node["name"]): node for node in listed if isinstance(node, Mapping) and isinstance(node.get("name"), str)
    }


def _read(file: str) -> bytes:
    if file != STANDARD_INPUT:
        return read_regular_file(Path(file), MAX_BYTES)
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UnreadableError(f"more than {MAX_BYTES} bytes")
    return content


def _mapping(content: bytes) -> Mapping[str, Any]:
    try:
        found = _parse(content.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableError(f"it is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, Mapping):
        raise UnreadableError(f"it is none of these: {KNOWN}")
    return found


def _parse(text: str) -> object:
    """Return what YAML or JSON says. YAML refuses JSON that is indented with tabs."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def _is_key(config_map: Mapping[str, Any], name: str) -> bool:
    data = config_map.get("data")
    return isinstance(data, Mapping) and name in data


def _choose(what: str, candidates: object, name: str) -> tuple[str, Any]:
    """Return the one with this name, or the only one."""
    if not isinstance(candidates, Mapping) or not candidates:
        raise UnreadableError(f"there is no {what} in it")
    if name in candidates:
        return name, candidates[name]
    if name or len(candidates) > 1:
        reason = f"no {what} {name!r}" if name else f"more than one {what}"
        raise UnreadableError(f"there is {reason}; choose one with -name: {few(list(map(str, candidates)))}")
    return next(iter(candidates.items()))
