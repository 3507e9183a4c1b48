"""A host's file system with a driver's files as distributions lay them out, for `stage`.

The libraries are real ones, compiled here, with the names and sonames of NVIDIA's and nothing in them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import attrs

MACHINE: Final = os.uname().machine
MULTIARCH: Final = f"usr/lib/{MACHINE}-linux-gnu"
#: Name without version → soname; empty where it is the whole file name, as with libnvidia-pkcs11.
LIBRARIES: Final = {
    "libcuda.so": "libcuda.so.1",
    "libnvidia-ml.so": "libnvidia-ml.so.1",
    "libnvidia-nvvm.so": "libnvidia-nvvm.so.4",
    "libnvidia-pkcs11.so": "",
    "libnvidia-eglcore.so": "",
}
TOOLS: Final = ("nvidia-smi", "nvidia-debugdump", "nvidia-modprobe")


@attrs.frozen
class DriverFiles:
    """A driver's files, wherever they lie: path and soname of each library, and the tools."""

    libraries: tuple[tuple[Path, str], ...]
    tools: tuple[Path, ...]


def compile_driver(directory: Path, version: str) -> DriverFiles:
    """A driver of that version. Each of its files ends in the version, so that they can be told apart."""
    directory.mkdir()
    source = directory / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    libraries = []
    for name, soname in LIBRARIES.items():
        path = directory / f"{name}.{version}"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{soname or path.name}", "-o", path, source],
            check=True,
        )
        libraries.append((path, soname or path.name))
    tools = [directory / name for name in TOOLS]
    subprocess.run(["cc", "-o", tools[0], source], check=True)
    for tool in tools[1:]:
        shutil.copy(tools[0], tool)
    for path in (*(path for path, _ in libraries), *tools):
        with path.open("ab") as file:
            file.write(version.encode())
    return DriverFiles(tuple(libraries), tuple(tools))


def multiarch(root: Path, files: DriverFiles) -> None:
    """Debian's and Ubuntu's."""
    _plain(root, files, MULTIARCH)


def rhel(root: Path, files: DriverFiles) -> None:
    """RHEL's, with 32-bit libraries of the same names beside."""
    _plain(root, files, "usr/lib64")
    _plain(root, DriverFiles(tuple((other_machine(root, path), name) for path, name in files.libraries), ()), "usr/lib")


def operator(root: Path, files: DriverFiles) -> None:
    """The GPU operator's driver container, whose root is seen on the host."""
    _plain(root / "run/nvidia/driver", files, MULTIARCH)


def alternatives(root: Path, files: DriverFiles) -> None:
    """Debian's `nvidia/current`: the links lead through /etc/alternatives, and are absolute."""
    current = root / MULTIARCH / "nvidia/current"
    _copy_libraries(current, files)
    tools = root / "usr/lib/nvidia/current"
    _copy_tools(tools, files)
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    (root / "etc/alternatives").mkdir(parents=True, exist_ok=True)
    for _, soname in files.libraries:
        alternative = f"/etc/alternatives/nvidia--{soname}-{MACHINE}-linux-gnu"
        _link(root / alternative[1:], f"/{MULTIARCH}/nvidia/current/{soname}")
        _link(root / MULTIARCH / soname, alternative)
    for tool in files.tools:
        _link(root / f"etc/alternatives/nvidia--{tool.name}", f"/usr/lib/nvidia/current/{tool.name}")
        _link(root / "usr/bin" / tool.name, f"/etc/alternatives/nvidia--{tool.name}")


LAYOUTS: Final[dict[str, Callable[[Path, DriverFiles], None]]] = {
    layout.__name__: layout for layout in (multiarch, rhel, operator, alternatives)
}


def make_cache(root: Path, *directories: str) -> None:
    """Write the loader's cache: its usual directories, and those given."""
    (root / "etc").mkdir(parents=True, exist_ok=True)
    (root / "etc/ld.so.conf").write_text("".join(f"/{directory}\n" for directory in directories))
    subprocess.run(["/sbin/ldconfig", "-X", "-r", root], check=True, stderr=subprocess.DEVNULL)


def load_module(root: Path, version: str) -> None:
    """Write the kernel's version file of a loaded module."""
    path = root / "sys/module/nvidia/version"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{version}\n")


def other_machine(root: Path, library: Path) -> Path:
    """The library as a 32-bit one has it in its header."""
    directory = root / "32"
    directory.mkdir(parents=True, exist_ok=True)
    data = bytearray(library.read_bytes())
    data[18:20] = (3).to_bytes(2, "little")  # EM_386
    (directory / library.name).write_bytes(data)
    return directory / library.name


def _plain(root: Path, files: DriverFiles, directory: str) -> None:
    _copy_libraries(root / directory, files)
    _copy_tools(root / "usr/bin", files)


def _copy_libraries(directory: Path, files: DriverFiles) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path, soname in files.libraries:
        _copy(path, directory)
        if soname != path.name:
            _link(directory / soname, path.name)


def _copy_tools(directory: Path, files: DriverFiles) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for tool in files.tools:
        _copy(tool, directory)


def _copy(path: Path, directory: Path) -> None:
    """As a package manager does it: a new file takes the place of the old one."""
    new = directory / f"{path.name}.new"
    shutil.copy2(path, new)
    new.replace(directory / path.name)


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def names(paths: Iterable[Path]) -> list[str]:
    """In order."""
    return sorted(path.name for path in paths)
