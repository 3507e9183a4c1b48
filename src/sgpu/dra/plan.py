"""The slices that should be there and those that are → what to write and delete. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import attrs

from sgpu.dra.slices import Object
from sgpu.lib.quantity import parse_quantity

#: Fields that a server without the feature gate leaves out, so that each claim would get the whole GPU.
_SHARING: Final = re.compile(r"\.(allowMultipleAllocations|requestPolicy)$")
_TAINTS: Final = re.compile(r"\.taints$")
#: Maps that are ours alone. Elsewhere a newer server may add fields with their defaults.
_EXACT: Final = frozenset({"attributes", "capacity"})


@attrs.frozen
class Plan:
    """Slices to create, those to replace, and names of those to delete; in this order."""

    create: tuple[Object, ...] = ()
    replace: tuple[Object, ...] = ()
    delete: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.create or self.replace or self.delete)


def plan(wanted: Sequence[Object], current: Mapping[str, Object], owner: Sequence[Object] = ()) -> Plan:
    """Return what makes the current slices, by name, the wanted ones. New ones get `owner` as owner references.

    Consumers use the slices of the highest generation, and only if all of them are there. So a single slice is
    changed in place, and of several all get another generation.
    """
    names = [_name(thing) for thing in wanted]
    generations = {_generation(thing) for thing in current.values()}
    if current.keys() == set(names) and len(generations) == 1:
        if not any(chain.from_iterable(differences(thing, current[_name(thing)]) for thing in wanted)):
            return Plan()
    in_place = len(wanted) == 1 and current.keys() <= set(names)
    generation = max(generations, default=1) if in_place or not current else max(generations) + 1
    written = [_numbered(thing, generation) for thing in wanted]
    return Plan(
        tuple(_with_metadata(thing, ownerReferences=list(owner)) for thing in written if _name(thing) not in current),
        tuple(_replacement(thing, current[_name(thing)]) for thing in written if _name(thing) in current),
        tuple(name for name in current if name not in names),
    )


def differences(sent: Object, got: Object) -> Iterator[str]:
    """Yield the paths where a slice, as the server has it, is not as it was sent; without the generation."""
    yield from _differences(_numbered(sent, 0)["spec"], _numbered(got, 0)["spec"], "spec")


def unshared(paths: Sequence[str]) -> bool:
    """Return whether what these paths lack makes shared devices exclusive, or makes one claim take all."""
    return any(_SHARING.search(path) for path in paths)


def untainted(paths: Sequence[str]) -> bool:
    """Return whether these paths lack taints and nothing else."""
    return bool(paths) and all(_TAINTS.search(path) for path in paths)


def new_faults(wanted: Sequence[Object], current: Mapping[str, Object]) -> bool:
    """Return whether a device is to get no more claims from now on: it is tainted now, or left out."""
    before = {each["name"] for thing in current.values() for each in _devices(thing) if not each.get("taints")}
    now = {each["name"] for thing in wanted for each in _devices(thing) if not each.get("taints")}
    return bool(before - now)


def _differences(sent: Any, got: Any, path: str) -> Iterator[str]:  # noqa: ANN401  # as JSON has it
    if isinstance(sent, dict) and isinstance(got, dict):
        keys = (
            sent.keys() | got.keys() if path.rpartition(".")[2] in _EXACT else sent.keys() | (got.keys() & {"taints"})
        )
        for key in sorted(keys):
            yield from _differences(sent.get(key), got.get(key), f"{path}.{key}")
    elif isinstance(sent, list) and isinstance(got, list) and len(sent) == len(got):
        for index, (mine, its) in enumerate(zip(sent, got, strict=True)):
            yield from _differences(mine, its, f"{path}[{index}]")
    elif sent != got and not (sent in (None, [], {}) and got in (None, [], {})) and not _same_quantity(sent, got):
        yield path


def _same_quantity(sent: object, got: object) -> bool:
    """Return whether these are one amount: the server writes 16384Mi as 16Gi, and 1000 as 1k."""
    if not (isinstance(sent, str) and isinstance(got, str)):
        return False
    try:
        return parse_quantity(sent) == parse_quantity(got)
    except ValueError:
        return False


def _numbered(thing: Object, generation: int) -> Object:
    spec = thing["spec"]
    return {**thing, "spec": {**spec, "pool": {**spec["pool"], "generation": generation}}}


def _replacement(thing: Object, current: Object) -> Object:
    known = current["metadata"]
    return _with_metadata(
        thing, resourceVersion=known["resourceVersion"], ownerReferences=known.get("ownerReferences", [])
    )


def _with_metadata(thing: Object, **metadata: object) -> Object:
    return {**thing, "metadata": {**thing["metadata"], **metadata}}


def _name(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def _generation(thing: Object) -> int:
    return int(thing["spec"]["pool"]["generation"])


def _devices(thing: Object) -> Sequence[Object]:
    return thing["spec"].get("devices") or ()
