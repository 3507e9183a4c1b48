"""Finds the files of a host's NVIDIA driver: libraries and tools of one version. Reads only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

from sgpu.commands.stage.host import Host
from sgpu.driver.kernelmodule import module_version
from sgpu.driver.wsl import UNSUPPORTED, is_wsl
from sgpu.lib.elf import ElfError, ours, read_elf

#: File systems that may have the driver: the host's, and that of the GPU operator's driver container.
ROOTS: Final = (PurePosixPath("/"), PurePosixPath("/run/nvidia/driver"))
_MULTIARCH: Final = PurePosixPath(f"/usr/lib/{os.uname().machine}-linux-gnu")
#: Where libraries are if the loader's cache does not say: Debian and Ubuntu, Debian's alternatives, RHEL, others.
DIRECTORIES: Final = (
    _MULTIARCH,
    _MULTIARCH / "nvidia/current",
    *map(
        PurePosixPath,
        (
            *("/usr/lib64", "/usr/lib64/nvidia", "/usr/lib", "/usr/local/lib64", "/usr/local/lib"),
            "/run/opengl-driver/lib",  # NixOS
            *("/opt/nvidia/lib64", "/var/lib/nvidia/lib64", "/usr/local/nvidia/lib64"),  # installers of clouds
            "/usr/local/glibc/usr/lib",  # Talos
            "/cm/local/apps/cuda/libs/current/lib64",  # Bright Cluster Manager
            "/cm/local/apps/cuda/libs/current",
            "/usr/lib/nvidia/tesla",  # Bottlerocket
        ),
    ),
)
TOOL_DIRECTORIES: Final = tuple(
    map(
        PurePosixPath,
        (
            *("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/lib/nvidia/current"),
            *("/usr/libexec/nvidia/tesla/bin", "/run/current-system/sw/bin"),
        ),
    )
)
#: Bound to no version: Debian has nvidia-persistenced 535.171 beside a driver 535.309.
TOOLS: Final = (
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-modprobe",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
)
#: The library that each driver has, and that says which version it is.
MANAGEMENT_LIBRARY: Final = "libnvidia-ml.so"
#: The file of a library ends in the driver's version, whatever its soname ends in: new libraries need no list.
_LIBRARY: Final = re.compile(r"lib[^/]+\.so\.(\d+\.\d+(?:\.\d+)?)")
#: A library of the driver with no version in its name, as libnvidia-nvvm70.so.4 of R575.
_UNVERSIONED: Final = re.compile(r"lib(nvidia-|cuda|nvcuvid)[^/]*\.so\.\d+")
#: What draws: more than half of a driver, and of little use without the files in /etc and /usr/share that announce it.
_GRAPHICS: Final = re.compile(
    r"lib(E?GL|OpenGL|glx|nvoptix|vdpau_)"
    r"|libnvidia-(cbl|e?gl|fbc|gtk|ifr|ngx|present|rtcore|tls|vksc|vulkan|wayland|wfb|xcb)"
)
#: In the host path, where `sets` keeps its sets: what was staged is no source to stage from.
OWN_DIRECTORY: Final = ".sgpu"


class NotWholeError(Exception):
    """A file that should be a library or a program is none, or is cut short."""


class NoDriverError(Exception):
    """There is no driver that could be staged. The message says what to do."""


class OtherVersionError(NoDriverError):
    """There are libraries, but none of the version that the kernel has loaded (`loaded`)."""

    def __init__(self, loaded: str, there: str) -> None:
        self.loaded = loaded
        super().__init__(
            f"the kernel has loaded version {loaded} of the NVIDIA driver, and the host's libraries are of {there}, "
            f"which do not work with it: reboot the node, or reload the module"
        )


@attrs.frozen
class File:
    """A file of the driver. `size` in bytes; `soname` is empty for a tool."""

    name: str
    source: Path
    size: int
    mtime_ns: int
    soname: str


@attrs.frozen
class Driver:
    """All of one driver's files. `directory` is where its management library is, as the host has it.

    `left_out` are files that should be the driver's and are none (empty, a directory, a script), if there is no other
    of that name.
    """

    version: str
    directory: PurePosixPath
    libraries: tuple[File, ...]
    tools: tuple[File, ...]
    left_out: tuple[str, ...] = ()


def find(root: Path, *, graphics: bool = False) -> Driver:
    """Find the driver of the host whose root is mounted at `root`: the version that the kernel has loaded, else the
    one that the loader would take. Graphics libraries are left out, unless `graphics`.

    Raises NoDriverError, NotWholeError, and OSError when a file can't be read.
    """
    there = []
    loaded = module_version(root / "proc", root / "sys")
    for place in ROOTS:
        resolved = Host(root).resolve(place)
        if resolved is None:
            continue
        host = Host(Host(root).here(resolved))
        for version, directory in _installed(host, loaded):
            if loaded in ("", version):
                return _driver(host, version, place, directory, graphics)
            there.append(version)
    if there:
        raise OtherVersionError(loaded, " and ".join(dict.fromkeys(there)))
    if unversioned := _unversioned(Host(root)):
        reason = UNSUPPORTED if is_wsl(root / "dev") else "stage can't tell which driver it is of: install a package"
        raise NoDriverError(f"{unversioned} is there and has no version in its name; {reason}")
    raise NoDriverError(
        f"no NVIDIA driver under {root}: {MANAGEMENT_LIBRARY}.1 for {os.uname().machine} is neither in the loader's "
        f"cache nor in {', '.join(map(str, DIRECTORIES))}, nor in any of these under {ROOTS[1]}; install the driver on "
        f"the host, or say with -host-root where the host's root is seen"
    )


def _driver(host: Host, version: str, place: PurePosixPath, directory: PurePosixPath, graphics: bool) -> Driver:
    odd: list[str] = []
    libraries = tuple(_libraries(host, version, directory, graphics, odd))
    tools = tuple(_tools(host, directory, odd))
    found = {file.name for file in libraries + tools}
    left_out = tuple(path for path in odd if PurePosixPath(path).name not in found)
    return Driver(version, place / directory.relative_to("/"), libraries, tools, left_out)


def _management_libraries(host: Host) -> list[PurePosixPath]:
    """Return the paths by which programs may find the management library, the loader's first."""
    paths = [path for name, path in host.loader_cache() if name.startswith(MANAGEMENT_LIBRARY)]
    return paths + [directory / f"{MANAGEMENT_LIBRARY}.1" for directory in DIRECTORIES]


def _unversioned(host: Host) -> PurePosixPath | None:
    """Return a management library for this machine whose version is not known, as it is not in its name."""
    for path in _management_libraries(host):
        resolved = host.resolve(path)
        if resolved and OWN_DIRECTORY not in resolved.parts and _LIBRARY.fullmatch(resolved.name) is None:
            with suppress(NotWholeError, OSError):
                if soname(host.here(resolved)) is not None:
                    return path
    return None


def _installed(host: Host, loaded: str) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield the installed versions, each with the directory of its management library, the loader's first."""
    paths = _management_libraries(host)
    if loaded:  # may lie beside a newer one, which the links name
        found = [resolved.parent for path in paths if (resolved := host.resolve(path))]
        paths += [directory / f"{MANAGEMENT_LIBRARY}.{loaded}" for directory in dict.fromkeys(found)]
    for path in paths:
        resolved = host.resolve(path)
        if resolved is None or OWN_DIRECTORY in resolved.parts:
            continue
        match = _LIBRARY.fullmatch(resolved.name)
        if match is None:
            continue
        try:
            usable = soname(host.here(resolved)) is not None
        except NotWholeError:
            if loaded in ("", match[1]) and host.here(resolved).stat().st_size:
                raise  # it is being installed
            continue  # a leftover of another version, or of a mount
        if usable:
            yield match[1], resolved.parent


def _libraries(host: Host, version: str, directory: PurePosixPath, graphics: bool, odd: list[str]) -> Iterator[File]:
    """Yield the libraries of one version, wherever the loader or a distribution has them; the first of each name.

    Those beside the management library count, too, if their names have only a soname's number, unless a library of
    this version is loaded by that name: then they are copies of another. What is no library is added to `odd`.
    """
    known = [resolved.parent for _, path in host.loader_cache() if (resolved := host.resolve(path))]
    seen: set[str] = set()
    sonames: set[str] = set()
    for place in dict.fromkeys((directory, *known, *DIRECTORIES)):
        if OWN_DIRECTORY in place.parts:
            continue
        for name in host.names(place):
            if name in seen or (_GRAPHICS.match(name) and not graphics):
                continue
            match = _LIBRARY.fullmatch(name)
            if match and match[1] == version and (library := _library(host, place / name, odd)):
                seen.add(name)
                sonames.add(library.soname)
                yield library
    for name in host.names(directory):
        if name in sonames or not _UNVERSIONED.fullmatch(name) or (_GRAPHICS.match(name) and not graphics):
            continue
        if host.is_file(directory / name) and (library := _library(host, directory / name, odd)):
            yield library


def _library(host: Host, path: PurePosixPath, odd: list[str]) -> File | None:
    """Return the library that a path leads to, if it is for this machine. An empty one is added to `odd`."""
    if host.is_empty(path):
        odd.append(str(path))
        return None
    return _file(host, path)


def _tools(host: Host, libraries: PurePosixPath, odd: list[str]) -> Iterator[File]:
    """Yield the tools, from where distributions have them or from beside the libraries. What is none goes to `odd`."""
    beside = (libraries.parent / "bin", libraries / "bin")
    for name in TOOLS:
        for directory in (*TOOL_DIRECTORIES, *beside):
            try:
                tool = _file(host, directory / name)
            except (NotWholeError, OSError):  # a wrapper script, a directory
                odd.append(str(directory / name))
                continue
            if tool:
                yield tool
                break


def _file(host: Host, path: PurePosixPath) -> File | None:
    """Return the file that a path leads to, if it exists and is for this machine."""
    resolved = host.resolve(path)
    if resolved is None or OWN_DIRECTORY in resolved.parts:
        return None
    source = host.here(resolved)
    name = soname(source)
    if name is None:
        return None
    status = source.stat()
    return File(path.name, source, status.st_size, status.st_mtime_ns, name)


def soname(path: Path) -> str | None:
    """Return the soname of a library, empty if it has none; None if it is for another machine, or 32-bit.

    Raises NotWholeError, and OSError when it can't be read.
    """
    try:
        elf = read_elf(path)
    except ElfError as error:
        raise NotWholeError(f"{path} is not a whole file ({error}); is the driver being installed?") from error
    return elf.soname if elf.kind == ours().kind else None
