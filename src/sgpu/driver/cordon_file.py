"""The cordoned GPUs, on disk: a cordon outlives a restart of the daemon and a reboot of the node.

A card is known by its UUID, so that another one in its slot is not cordoned. Reading and writing block as files do.
Knows nothing of NVML.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from sgpu.lib.files import make_private_directory, read_regular_file, write_private_file
from sgpu.node.gpu import Cordon, Gpu

logger = logging.getLogger(__name__)

VERSION: Final = 1
#: Seconds since the epoch, more than a clock shows (the year 9000).
MOST_SECONDS: Final = 2.2e11
#: A file that can't be used is set aside under this name, for whoever wants to know.
ASIDE: Final = ".unusable"
#: What is kept of a GPU: all that can be shown of one while nobody may open it.
_FACTS: Final = ("uuid", "name", "pci_bus_id", "memory_bytes", "memory_total", "numa_node", "mig_mode", "mig_pending")


def load(path: Path, boot_id: str) -> Mapping[str, Gpu]:
    """Return the cordoned GPUs by UUID; none where there is no file, or none that can be used.

    After a reboot each is looked at once before it is released again: its slot may have another card by now.
    """
    try:
        content = json.loads(read_regular_file(path))
        if content["version"] != VERSION:
            return _set_aside(path, f"version {content['version']!r} is not {VERSION}")
        same_boot = content["boot_id"] == boot_id
        gpus = [_gpu(each, same_boot=same_boot) for each in content["cordons"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _set_aside(path, f"{type(error).__name__}: {error}")
    return {gpu.uuid: gpu for gpu in gpus}


def save(path: Path, boot_id: str, cordoned: Mapping[str, Gpu]) -> None:
    """Write them in one step, so that they are there even after the node lost its power. Raises OSError."""
    content = {"version": VERSION, "boot_id": boot_id, "cordons": [_entry(gpu) for gpu in cordoned.values()]}
    make_private_directory(path.parent)
    write_private_file(path, json.dumps(content, indent=1).encode(), durable=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # the new name, too
    finally:
        os.close(directory)


def _entry(gpu: Gpu) -> dict[str, object]:
    facts = {name: getattr(gpu, name) for name in _FACTS}
    return {**facts, "device_nodes": gpu.device_nodes, "cordon": gpu.cordon and attrs.asdict(gpu.cordon)}


def _gpu(entry: Mapping[str, Any], *, same_boot: bool) -> Gpu:
    """Return the GPU of an entry. Raises ValueError, KeyError, TypeError or AttributeError."""
    order = entry["cordon"]
    since = float(order["since"])
    if not 0 <= since <= MOST_SECONDS:
        raise ValueError(f"{since} is no time")
    cordon = Cordon(_text(order["reason"]), since, released=order["released"] is True and same_boot)
    gpu = Gpu(
        **{name: entry[name] for name in _FACTS}, device_nodes=tuple(map(_text, entry["device_nodes"])), cordon=cordon
    )
    for value in (gpu.uuid, gpu.name, gpu.pci_bus_id):
        _text(value)
    for number in (gpu.memory_bytes, gpu.memory_total, gpu.numa_node):
        if number is not None and type(number) is not int:
            raise TypeError(f"{number!r} is no number")
    return attrs.evolve(gpu, mig_mode=gpu.mig_mode is True, mig_pending=gpu.mig_pending is True)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _set_aside(path: Path, why: str) -> Mapping[str, Gpu]:
    logger.warning("%s can't be used and is set aside (%s): no GPU is cordoned; cordon them again", path, why)
    try:
        os.replace(path, path.with_name(path.name + ASIDE))
    except OSError as error:
        logger.warning("%s can't be set aside either: %s", path, error)
    return {}
