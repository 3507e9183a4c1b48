"""The faults of the GPUs, on disk: they outlive a restart of the daemon, and not a reboot of the node.

Reading and writing block as files do. Knows nothing of NVML.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Final, NoReturn

from sgpu.driver.health import Clearance, Fault, FaultRecord
from sgpu.driver.monitor import Monitor
from sgpu.lib.files import make_private_directory, read_regular_file, write_private_file
from sgpu.lib.limits import explain
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread

logger = logging.getLogger(__name__)

VERSION: Final = 1
#: Differs after each boot; the same in all containers of a node.
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: Seconds since the boot, more than any node runs (300 years).
MOST_SECONDS: Final = 1e10
#: A state file that can't be used is set aside under this name, for whoever wants to know.
ASIDE: Final = ".unusable"


def load(path: Path, boot_id: str) -> FaultRecord:
    """Return what was saved in this boot; nothing where there is no file, or none that can be used."""
    try:
        text = read_regular_file(path).decode("utf-8")
    except FileNotFoundError:
        return FaultRecord()
    except (OSError, UnicodeDecodeError) as error:
        return _set_aside(path, str(error))
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            return _set_aside(path, f"version {content['version']!r} is not {VERSION}")
        if content["boot_id"] != boot_id:
            return FaultRecord()  # the node was rebooted, which is evidence enough
        faults = {
            str(uuid): tuple(
                Fault(str(fault["reason"]), _seconds(fault["since"]), Clearance(fault["cure"])) for fault in faults
            )
            for uuid, faults in content["faults"].items()
        }
        return FaultRecord(str(content["driver_version"]), faults)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _set_aside(path, f"{type(error).__name__}: {error}")


def save(path: Path, boot_id: str, record: FaultRecord) -> None:
    """Write the record in one step: a reader sees the old or the new. Raises OSError."""
    content = {
        "version": VERSION,
        "boot_id": boot_id,
        "driver_version": record.driver_version,
        "faults": {
            uuid: [{"reason": fault.reason, "since": fault.since, "cure": fault.clearance.value} for fault in faults]
            for uuid, faults in record.faults.items()
        },
    }
    make_private_directory(path.parent)
    write_private_file(path, json.dumps(content, indent=1).encode())


async def save_changes(path: Path, boot_id: str, monitor: Monitor) -> NoReturn:
    """Save the monitor's record, now and whenever it changes. A file that can't be written is a warning."""
    problem = OnChange(logger, logging.WARNING)
    while True:
        changed = monitor.record_changed.next
        try:
            await run_in_thread(save, path, boot_id, monitor.record)
            problem.clear()
        except OSError as error:
            problem.report(
                f"cannot write {path}: {explain(error)}; a restart of sgpu will not know which GPUs are faulty"
            )
        await changed.wait()


def read_boot_id() -> str:
    """Return what identifies this boot; empty where the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _seconds(value: Any) -> float:  # noqa: ANN401  # whatever JSON has
    seconds = float(value)
    if not 0 <= seconds <= MOST_SECONDS:
        raise ValueError(f"{seconds} is no time")
    return seconds


def _set_aside(path: Path, why: str) -> FaultRecord:
    logger.warning("%s can't be used and is set aside (%s): earlier faults are unknown", path, why)
    try:
        os.replace(path, path.with_name(path.name + ASIDE))
    except OSError as error:
        logger.warning("%s can't be set aside either: %s", path, error)
    return FaultRecord()
