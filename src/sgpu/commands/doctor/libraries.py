"""The directory that pods get, and the libraries in it. They are read, never loaded; knows no GPU."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.config.settings import Settings
from sgpu.driver.nvml.search import candidates
from sgpu.lib.elf import ElfError, ours, read_elf

#: Where NVIDIA's CUDA images look (LD_LIBRARY_PATH), below the container path.
CUDA_IMAGES: Final = ("lib64", "lib")
CUDA: Final = "libcuda.so.1"
#: The version that the driver's files have in their names.
VERSION: Final = re.compile(r"\.so\.(\d+(?:\.\d+)+)$")
_COLLECT: Final = "`python -m sgpu stage` collects the libraries of a driver that a distribution installed"


@attrs.frozen
class Library:
    """The libnvidia-ml that would be loaded. `version` is from the name of the file behind it; empty if it has none."""

    path: Path
    version: str


def find_library(host_path: Path) -> Library | None:
    """Return the first candidate that is a library for this machine."""
    for path in candidates(host_path):
        if path.exists() and not _problem(path):
            match = VERSION.search(path.resolve().name)
            return Library(path, match[1] if match else "")
    return None


def check_libraries(settings: Settings) -> Iterator[Finding]:
    """Check the host path, libnvidia-ml and libcuda."""
    host_path = Path(settings.host_path)
    if not host_path.is_dir():
        yield fail(
            "host path",
            f"{host_path} {'is not a directory' if host_path.exists() else 'is not there'}",
            "set -host-path to the directory with the NVIDIA libraries; in a pod, mount it at the same path as on the "
            f"host; on GKE wait for the driver's installer; {_COLLECT}",
        )
        yield skip("library", "because the host path is not there")
        return
    yield _host_path(settings, host_path)
    found = find_library(host_path)
    if found is None:
        yield _not_found(host_path)
        return
    yield _library(found)
    yield _cuda(settings, found)


def _host_path(settings: Settings, host_path: Path) -> Finding:
    if os.statvfs(host_path).f_flag & os.ST_NOEXEC:
        message = f"{host_path} is on a file system mounted noexec, from which no library can be loaded"
        return fail("host path", message, "choose a -host-path on another file system, or mount it without noexec")
    if host_path == Path("/"):
        return warn(
            "host path",
            "/ is the whole host: each container gets all of its files, read-only",
            f"{_COLLECT} into a directory of their own for -host-path",
        )
    return ok("host path", f"{host_path} is there; containers get it at {settings.container_path}")


def _not_found(host_path: Path) -> Finding:
    paths = list(candidates(host_path))
    broken = [
        f"{path}: {problem}" for path in paths if (path.is_symlink() or path.exists()) and (problem := _problem(path))
    ]
    names = " or ".join(dict.fromkeys(path.name for path in paths))
    looked = ", ".join(dict.fromkeys(path.parent.relative_to(host_path).as_posix() for path in paths))
    message = f"no {names} for this machine under {host_path}; looked in {looked}"
    if broken:
        message += f"; found, but no use: {'; '.join(broken)}"
    return fail("library", message, f"install the driver, or set -host-path to where its libraries are; {_COLLECT}")


def _library(found: Library) -> Finding:
    elf = read_elf(found.path)
    behind = found.path.resolve()
    file = "" if behind == found.path else f" ({behind.name})"
    message = f"{found.path}{file}, {elf.bits} bit {elf.machine}, soname {elf.soname or 'none'}"
    if others := _others_may_write(behind):
        return warn(
            "library", f"{message}; {others}", "sgpu loads it as root: make it and its directory root's, mode 0755"
        )
    if elf.soname and elf.soname != "libnvidia-ml.so.1":
        return warn("library", message, "is that NVIDIA's? libnvidia-ml has the soname libnvidia-ml.so.1")
    return ok("library", message)


def _others_may_write(path: Path) -> str:
    """Say who besides root may replace a file or write to it; empty if nobody may."""
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid not in (0, os.getuid()):
            return f"{place} belongs to user {status.st_uid}"
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"every user may write to {place}"
    return ""


def _cuda(settings: Settings, found: Library) -> Finding:
    directory = found.path.parent
    cuda = directory / CUDA
    if not cuda.exists():
        return fail(
            "libcuda",
            f"there is no {CUDA} beside it in {directory}: programs in pods will not find a driver",
            f"the directory has the tools' library but not CUDA's; install the whole driver; {_COLLECT}",
        )
    if problem := _problem(cuda):
        return fail("libcuda", f"{cuda}: {problem}", "install the driver again")
    where = directory.relative_to(settings.host_path).as_posix()
    inside = Path(settings.container_path, where)
    if settings.container_path == "/usr/local/nvidia" and where in CUDA_IMAGES:
        return ok("libcuda", f"{cuda}; in containers {inside}, where NVIDIA's CUDA images look")
    return warn(
        "libcuda",
        f"{cuda} is at {inside} in containers, where NVIDIA's CUDA images do not look (/usr/local/nvidia/lib64)",
        f"put {inside} into LD_LIBRARY_PATH of the pods, or have the libraries in lib64 of -host-path: {_COLLECT} so",
    )


def _problem(path: Path) -> str:
    """Say why a file can't be loaded on this machine, by its header; empty if it can."""
    try:
        elf = read_elf(path)
    except FileNotFoundError:
        return f"a link to {path.resolve()}, which is not there (mount what it points to as well)"
    except ElfError as error:
        return f"{error}; is it being copied?"
    except OSError as error:
        return error.strerror or str(error)
    if elf.kind != ours().kind:
        return f"it is for {elf.bits} bit {elf.machine}, this machine's programs are {ours().bits} bit {ours().machine}"
    return ""
