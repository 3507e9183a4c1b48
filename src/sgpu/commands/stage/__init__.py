"""`python -m sgpu stage`: the host's driver libraries and tools in one directory, where pods and sgpu look for them.

For nodes whose driver came from a distribution's packages, which spread it over the file system. It runs before the
daemon, in the same pod, and with `-interval` beside it. The host's root may be read-only; nothing is loaded or run.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final

from sgpu.commands.stage import sets
from sgpu.commands.stage.driver import Driver, NoDriverError, NotWholeError, OtherVersionError, find
from sgpu.lib.interrupts import interrupts_held
from sgpu.lib.limits import cure
from sgpu.lib.logs import printable

#: Which CUDA programs need; the management library alone is enough to list GPUs.
CUDA_LIBRARY: Final = "libcuda.so."


class StageError(Exception):
    """It could not be staged; what was staged before stays. The message says what to do."""


def stage(host_root: Path, host_path: Path, lock: Path, *, graphics: bool, interval: float) -> bool:
    """Stage once, or every `interval` seconds, and print what changed. Returns whether it succeeded."""
    os.umask(0o022)  # containers read it with any user
    printed = ""
    while True:
        try:
            line, staged = stage_once(host_root, host_path, lock, graphics=graphics), True
        except StageError as error:
            line, staged = f"sgpu: {error}", False
        if line != printed:
            print(printable(line), file=sys.stdout if staged else sys.stderr, flush=True)
        printed = line
        if not interval:
            return staged
        wait(interval)


def wait(seconds: float) -> None:
    """Wait, and exit when told to."""
    with interrupts_held() as wait_for_interrupt:
        if wait_for_interrupt(seconds):
            sys.exit(0)


def stage_once(host_root: Path, host_path: Path, lock: Path, *, graphics: bool) -> str:
    """Stage if there is anything new, and say what was done. Raises StageError."""
    try:
        driver = find(host_root, graphics=graphics)
        up_to_date = f"driver {driver.version} in {host_path} is up to date"
        if sets.is_current(host_path, driver) and not sets.leftovers(host_path):  # which takes no lock
            return up_to_date
        sets.check_place(host_path)
        with sets.locked(lock):
            if sets.is_current(host_path, driver):
                sets.clean(host_path)
                return up_to_date
            sets.put(host_path, driver)
            return _done(driver, host_path)
    except OtherVersionError as error:
        if sets.current_version(host_path) == error.loaded:
            return f"driver {error.loaded} in {host_path} stays: {error}"
        raise StageError(str(error)) from error
    except (NoDriverError, NotWholeError, sets.NotOursError, sets.ChangedError) as error:
        raise StageError(str(error)) from error
    except OSError as error:
        message = f"cannot stage the driver in {host_path}: {_describe(error)}; the staged files stay as they were"
        raise StageError(message) from error


def _describe(error: OSError) -> str:
    """Describe an error, the same way each time: the random names of sets are left out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror} (it takes room for two sets, each of 200 MB or more)"
    return "; ".join(filter(None, (f"{error.strerror}: {error.filename}", cure(error))))


def _done(driver: Driver, host_path: Path) -> str:
    size = sum(file.size for file in driver.libraries + driver.tools) / 1e6
    line = (
        f"staged driver {driver.version}: {len(driver.libraries)} libraries, {len(driver.tools)} tools "
        f"({size:.0f} MB) from {driver.directory} in {host_path}"
    )
    if driver.left_out:
        line += f"; left out, because they are no libraries or programs: {', '.join(driver.left_out)}"
    if not driver.tools:
        line += "; no tools were found, as nvidia-smi"
    if not any(file.name.startswith(CUDA_LIBRARY) for file in driver.libraries):
        line += "; libcuda is not among them, without which no CUDA program runs: install it on the host"
    return line
