"""`sgpu limits`: the memory limits that sgpu has set on this node, and a way to remove them all.

For the time when sgpu is removed from a node: the limits of a container outlive the daemon.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sgpu.config.load import Loaded
from sgpu.driver import fault_file, limit_file, nvml
from sgpu.driver.limits import UNSUPPORTED
from sgpu.driver.nvml import Handle, Library, MemoryLimit, NvmlError
from sgpu.lib.logs import printable
from sgpu.lib.output import checked_output
from sgpu.lib.sizes import MIB
from sgpu.node.cgroup_limit import Target
from sgpu.observe.client import NoAnswerError, fetch


def limits(loaded: Loaded, *, clear: bool) -> bool:
    """Show the limits, after removing them if `clear`. Returns whether all could be read, and removed."""
    settings = loaded.settings
    if not settings.state_file:
        return _fail("-state-file is empty, so that no limit was recorded")
    if clear and _daemon_runs(settings.status_socket):
        return _fail("a daemon runs on this node and would set the limits again; delete the DaemonSet's pod first")
    path, boot_id = Path(settings.state_file).with_name(limit_file.NAME), fault_file.read_boot_id()
    targets = limit_file.load(path, boot_id)
    if not targets:
        with checked_output():
            print(f"no limits are recorded in {path}")
        return True
    try:
        with nvml.open_library(Path(settings.host_path)) as library:
            handles = _handles(library)
            left = [target for target in targets if not _show(library, handles.get(target.uuid), target, clear=clear)]
    except (nvml.LibraryNotFoundError, NvmlError) as error:
        return _fail(f"the driver can't be asked: {error}")
    if clear:
        limit_file.save(path, boot_id, left)
    return not left


def _show(library: Library, handle: Handle | None, target: Target, *, clear: bool) -> bool:
    """Print one limit. Returns False where it could not be read, or removed."""
    name = f"GPU {target.uuid}  {printable(target.cgroup)}"
    if handle is None:
        return _fail(f"{name}: the driver does not list this GPU")
    try:
        if clear:
            library.set_memory_limit(handle, target.cgroup, None)
        found = library.memory_limit(handle, target.cgroup)
    except NvmlError as error:
        return _fail(f"{name}: {UNSUPPORTED.get(error.code, error)}")
    with checked_output():
        print(f"{name}: {_describe(found)}")
    return not (clear and found)


def _describe(found: MemoryLimit | None) -> str:
    return f"{found.hard / MIB:.0f} MiB, {found.used / MIB:.0f} MiB used" if found else "no limit"


def _handles(library: Library) -> dict[str, Handle]:
    handles = map(library.handle, range(library.count()))
    return {library.uuid(handle): handle for handle in handles}


def _daemon_runs(socket: str) -> bool:
    try:
        fetch(socket)
    except NoAnswerError:
        return False
    return True


def _fail(message: str) -> bool:
    print(f"sgpu: {message}", file=sys.stderr)
    return False
