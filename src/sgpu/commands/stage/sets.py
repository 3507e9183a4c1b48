"""Sets of a driver's files in one directory, of which readers see one, whole, at any time.

    lib64 → .sgpu/current/lib64        what is outside is found here, in pods too: the links are relative
    bin → .sgpu/current/bin
    .sgpu/current → 535.261.03-x1y2z3   the one link that changes, so both change at once
    .sgpu/previous → …                  for who has just followed `current`
    .sgpu/535.261.03-x1y2z3/lib64/…, bin/…, manifest

Pods have the directory itself mounted, so nothing but what is in it can be replaced. A set that neither link names is
half made, or old, and removed at the next run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sgpu.commands.stage.driver import OWN_DIRECTORY, Driver, File
from sgpu.lib.files import make_private_directory, read_regular_file

LIBRARIES: Final = "lib64"
TOOLS: Final = "bin"
CURRENT: Final = "current"
PREVIOUS: Final = "previous"
MANIFEST: Final = "manifest"
_NEW_LINK: Final = "link"
#: Seconds that another `stage` may take to copy a driver, and between two looks whether it has.
LOCK_TIMEOUT: Final = 60.0
_LOCK_PAUSE: Final = 0.1
#: Without setuid, which nothing in a pod should get from us.
_LIBRARY_MODE: Final = 0o644
_TOOL_MODE: Final = 0o755


class NotOursError(Exception):
    """Something is in the way that another installer or a person put there."""


class ChangedError(Exception):
    """A file of the driver was replaced while the driver was copied."""


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Wait until no other process changes sets. Raises OSError, also when that takes too long.

    Whoever can open a file, if only to read it, can lock it: so this one lies where pods can't reach it.
    """
    make_private_directory(lock.parent)
    descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it does
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"another process has held the lock for {LOCK_TIMEOUT:g} s"
                    raise TimeoutError(errno.ETIMEDOUT, message, str(lock)) from None
                time.sleep(_LOCK_PAUSE)
        yield
    finally:
        os.close(descriptor)


def check_place(host_path: Path) -> None:
    """Make the directory if need be. Raises NotOursError where sets can't be there, OSError where it can't be made."""
    home = host_path / OWN_DIRECTORY
    home.mkdir(parents=True, exist_ok=True)
    if home.is_symlink():
        raise NotOursError(f"{home} is a link, which `stage` does not make: remove it")
    if os.statvfs(host_path).f_flag & os.ST_NOEXEC:
        raise NotOursError(
            f"{host_path} is on a file system mounted noexec, from which no library can be loaded: choose another "
            f"-host-path"
        )


def is_current(host_path: Path, driver: Driver) -> bool:
    """Return whether readers see exactly these files."""
    return _whole(host_path) == _manifest(driver)


def current_version(host_path: Path) -> str:
    """Return the version of the driver that readers see; empty if none, or not whole."""
    return str((_whole(host_path) or {}).get("version", ""))


def put(host_path: Path, driver: Driver) -> None:
    """Make a set and let readers see it. Needs the lock.

    Raises NotOursError, ChangedError or OSError; what readers see has not changed then.
    """
    home = host_path / OWN_DIRECTORY
    for name in (LIBRARIES, TOOLS):
        _check_ours(host_path / name)
    old = _target(home / CURRENT)
    _remove(_all_but(home, old))  # first, for there may not be room for three
    new = Path(tempfile.mkdtemp(prefix=f"{driver.version}-", dir=home))
    try:
        _fill(new, driver)
        for name in (LIBRARIES, TOOLS):
            _link(home, host_path / name, _outside(name))
        if old:
            _link(home, home / PREVIOUS, old)
        _link(home, home / CURRENT, new.name)
    except BaseException:
        if _target(home / CURRENT) != new.name:
            shutil.rmtree(new, ignore_errors=True)
        raise
    clean(host_path)


def leftovers(host_path: Path) -> list[Path]:
    """Return what killed runs have left behind, and sets older than the previous one."""
    home = host_path / OWN_DIRECTORY
    return _all_but(home, PREVIOUS, _target(home / CURRENT), _target(home / PREVIOUS))


def clean(host_path: Path) -> None:
    """Remove the leftovers. Needs the lock."""
    _remove(leftovers(host_path))


def _whole(host_path: Path) -> dict[str, Any] | None:
    """Return the manifest of the set that readers see; None if there is none, or something of it is missing."""
    current = host_path / OWN_DIRECTORY / CURRENT
    try:
        manifest: dict[str, Any] = json.loads(read_regular_file(current / MANIFEST))
        for directory in (LIBRARIES, TOOLS):
            if _target(host_path / directory) != _outside(directory):
                return None
            for name, size, _, soname in manifest[directory]:
                if {(current / directory / each).stat().st_size for each in (name, soname or name)} != {size}:
                    return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return manifest


def _outside(name: str) -> str:
    """Return the target of a link that readers follow."""
    return f"{OWN_DIRECTORY}/{CURRENT}/{name}"


def _check_ours(path: Path) -> None:
    if os.path.lexists(path) and _target(path) != _outside(path.name):
        raise NotOursError(
            f"{path} is there, and was not made by `stage`: if an installer keeps the driver's libraries there, "
            f"nothing has to be staged; else remove it, or set another -host-path"
        )


def _all_but(home: Path, *names: str) -> list[Path]:
    return [path for path in home.iterdir() if path.name not in (CURRENT, *names)]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _fill(new: Path, driver: Driver) -> None:
    """Write a set, and sync it to the disk: a power cut must not leave less than a kill."""
    libraries, tools = new / LIBRARIES, new / TOOLS
    for directory in (libraries, tools):
        directory.mkdir()
    for library in driver.libraries:
        _copy(library, libraries, _LIBRARY_MODE)
        names = [library.name]
        # By its soname it is loaded, and by its bare name by programs that were not linked with it.
        for name in (library.soname, f"{library.name.partition('.so.')[0]}.so"):
            if name and "/" not in name and not os.path.lexists(libraries / name):
                (libraries / name).symlink_to(names[-1])
                names.append(name)
    for tool in driver.tools:
        _copy(tool, tools, _TOOL_MODE)
    _check_unchanged(driver)
    manifest = new / MANIFEST
    with manifest.open("w") as file:
        json.dump(_manifest(driver), file)
        file.flush()
        os.fsync(file.fileno())
    for directory in (libraries, tools, new):
        directory.chmod(0o755)
        _sync(directory)


def _copy(file: File, directory: Path, mode: int) -> None:
    """Copy a file. A link would not do: the host's file is on another mount, and may be overwritten in place."""
    target = directory / file.name
    shutil.copyfile(file.source, target)
    target.chmod(mode)
    _sync(target)


def _check_unchanged(driver: Driver) -> None:
    """Raise ChangedError if a file changed since it was found: files of two drivers may be in one set."""
    for file in driver.libraries + driver.tools:
        status = file.source.stat()
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise ChangedError(f"{file.source} was replaced while it was copied: is the driver being installed?")


def _link(home: Path, path: Path, target: str) -> None:
    """Make `path` a link to `target`, in one step."""
    if _target(path) == target:
        return
    new = home / _NEW_LINK
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target(link: Path) -> str:
    """Return where a link leads; empty if it is no link."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _manifest(driver: Driver) -> dict[str, Any]:
    """Return what identifies a set: a new version or a replaced file makes a new set."""
    return {
        "version": driver.version,
        LIBRARIES: [[file.name, file.size, file.mtime_ns, file.soname] for file in driver.libraries],
        TOOLS: [[file.name, file.size, file.mtime_ns, file.soname] for file in driver.tools],
    }
