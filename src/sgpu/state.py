"""What is down and why, on disk: it outlives a restart of the daemon, and not a reboot of the node.

Knows neither trio nor NVML. Blocks as files do: call it from a thread.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Final

import attrs

from sgpu.files import make_private_directory, write_private_file
from sgpu.health import Cure, Fault
from sgpu.monitor import Memory

logger = logging.getLogger(__name__)

VERSION: Final = 1
#: Another after each boot; the same in all containers of a node.
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: A state file that can't be used is set aside under this name, for whoever wants to know.
ASIDE: Final = ".unusable"


def load(path: Path, boot_id: str) -> Memory:
    """What was remembered in this boot; nothing where there is no file, or none that can be used."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Memory()
    except (OSError, UnicodeDecodeError) as error:
        return _set_aside(path, str(error))
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            return _set_aside(path, f"version {content['version']!r} is not {VERSION}")
        if content["boot_id"] != boot_id:
            return Memory()  # the node was rebooted, which is evidence enough
        faults = {
            str(uuid): tuple(
                Fault(str(fault["reason"]), _seconds(fault["since"]), Cure(fault["cure"])) for fault in faults
            )
            for uuid, faults in content["faults"].items()
        }
        return Memory(str(content["driver_version"]), faults)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _set_aside(path, f"{type(error).__name__}: {error}")


def save(path: Path, boot_id: str, memory: Memory) -> None:
    """Write it in one step: a reader sees the old or the new. Raises OSError."""
    content = {
        "version": VERSION,
        "boot_id": boot_id,
        "driver_version": memory.driver_version,
        "faults": {
            uuid: [{**attrs.asdict(fault), "cure": fault.cure.value} for fault in faults]
            for uuid, faults in memory.faults.items()
        },
    }
    make_private_directory(path.parent)
    write_private_file(path, json.dumps(content, indent=1).encode())


def boot_id() -> str:
    """Which boot this is; empty where the kernel does not tell."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _seconds(value: Any) -> float:  # noqa: ANN401  # whatever JSON has
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    return seconds


def _set_aside(path: Path, why: str) -> Memory:
    logger.warning("%s can't be used and is set aside (%s): faults from before are not known", path, why)
    try:
        os.replace(path, path.with_name(path.name + ASIDE))
    except OSError as error:
        logger.warning("%s can't be set aside either: %s", path, error)
    return Memory()
