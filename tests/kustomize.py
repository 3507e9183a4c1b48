"""As much of kustomize as k8s/ uses, so that overlays are checked where there is no kubectl.

What it does not know it refuses. That it does as kustomize does is tested where kubectl is there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import yaml

#: What tells the elements of these lists from each other; all other lists are replaced as a whole.
MERGE_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
}
KNOWN: Final = {"apiVersion", "kind", "resources", "components", "patches"}


@attrs.frozen
class Rendered:
    """The output of `kubectl kustomize`, and the addresses that it would fetch, which are not fetched here."""

    objects: tuple[Mapping[str, Any], ...]
    remote: tuple[str, ...]


@functools.cache
def render(directory: Path) -> Rendered:
    """The output of the kustomization in `directory`. Raises ValueError for what is not known here."""
    kustomization = _read(directory)
    objects: list[Any] = []
    remote: list[str] = []
    for resource in kustomization.get("resources", ()):
        if "://" in resource:
            remote.append(resource)
        elif (directory / resource).is_dir():
            below = render(directory / resource)
            objects.extend(below.objects)
            remote.extend(below.remote)
        else:
            objects.extend(load(directory / resource))
    for component in kustomization.get("components", ()):
        _add_component(directory / component, objects)
    _apply_patches(directory, objects)
    return Rendered(tuple(objects), tuple(remote))


def with_components(directory: Path, *components: Path) -> tuple[Mapping[str, Any], ...]:
    """Return the objects of the kustomization in `directory` with components added."""
    objects = list(render(directory).objects)
    for component in components:
        _add_component(component, objects)
    return tuple(objects)


def _read(directory: Path) -> Mapping[str, Any]:
    kustomization: Mapping[str, Any] = yaml.safe_load((directory / "kustomization.yaml").read_text())
    if unknown := kustomization.keys() - KNOWN:
        raise ValueError(f"{directory}: {', '.join(unknown)}")
    return kustomization


def _add_component(component: Path, objects: list[Any]) -> None:
    for resource in _read(component).get("resources", ()):
        objects.extend(load(component / resource))
    _apply_patches(component, objects)


def _apply_patches(directory: Path, objects: list[Any]) -> None:
    for patch in _read(directory).get("patches", ()):
        if patch.keys() != {"path"}:
            raise ValueError(f"{directory}: {patch}")
        for change in load(directory / patch["path"]):
            target = _position(objects, change, directory)
            objects[target] = _merge(objects[target], change)


def load(path: Path) -> list[Any]:
    """The objects of a file."""
    return [thing for thing in yaml.safe_load_all(path.read_text()) if thing is not None]


def identity(thing: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the identity of an object."""
    return thing["apiVersion"], thing["kind"], thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def _position(objects: list[Any], change: Mapping[str, Any], directory: Path) -> int:
    for position, thing in enumerate(objects):
        if identity(thing) == identity(change):
            return position
    raise ValueError(f"{directory}: a patch of {identity(change)}, which is not there")


def _merge(old: Any, change: Any, key: str = "") -> Any:  # noqa: ANN401  # as YAML has it
    """Strategic merge: mappings by key, null deletes, lists of named things by name, all else replaced."""
    if isinstance(old, dict) and isinstance(change, dict):
        result = {name: value for name, value in old.items() if name not in change}
        for name, value in change.items():
            if value is not None:
                result[name] = _merge(old.get(name), value, name)
        return result
    if key in MERGE_KEYS and isinstance(change, list):
        return list(_merged(old or [], change, MERGE_KEYS[key]))
    return change


def _merged(old: list[Any], changes: list[Any], name: str) -> Iterable[Any]:
    """The changed elements first, as kustomize has them, then the others."""
    by_name = {element[name]: element for element in old}
    for change in changes:
        before = by_name.pop(change[name], None)
        if change.get("$patch") == "delete":
            if before is None:
                raise ValueError(f"nothing to delete: {change}")
        else:
            yield _merge(before, change)
    yield from by_name.values()
