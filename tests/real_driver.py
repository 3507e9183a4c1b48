"""NVIDIA's own libnvidia-ml for tests, from Debian's package: unpacked, never installed, and no part of sgpu.

It shows that sgpu finds the library, loads it and calls it correctly; without a GPU it can't show more.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

import pytest

PACKAGE: Final = "libnvidia-ml1"
#: A good part of a driver, as far as it is small: 17 MB.
DRIVER_PACKAGES: Final = (
    PACKAGE,
    "libcuda1",
    "libnvcuvid1",
    "libnvidia-allocator1",
    "libnvidia-cfg1",
    "libnvidia-encode1",
    "libnvidia-opticalflow1",
    "libnvidia-pkcs11-openssl3",
    "libnvidia-ptxjitcompiler1",
    "nvidia-alternative",
    "nvidia-cuda-mps",
    "nvidia-opencl-icd",
    "nvidia-smi",
    "nvidia-vdpau-driver",
)
#: A directory that holds a driver's files, as a container sees the host's; nothing is downloaded then.
VARIABLE: Final = "SGPU_REAL_DRIVER"
TIME_LIMIT: Final = 60  # seconds for a download; the library is some 800 KB, and the index of packages 100 KB
SOURCES: Final = Path("/etc/apt")


def real_driver() -> Path:
    """A directory that NVIDIA's library is found below. Skips the test where there is no way to have one."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    return _kept(PACKAGE, PACKAGE)


def driver_packages() -> Path:
    """The root of a host that has unpacked, and not configured, Debian's packages. Skips the test where there is no
    way to have them.
    """
    return _kept("driver", *DRIVER_PACKAGES)


def _kept(name: str, *packages: str) -> Path:
    kept = _cache() / name
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            unpacked = _download(Path(scratch), packages)
            try:
                unpacked.rename(kept)
            except OSError:  # another run was faster
                if not kept.exists():
                    raise
    return kept


def _cache() -> Path:
    """A directory that outlives the run, so that the next interpreter's tests need not download again."""
    path = Path(tempfile.gettempdir()) / f"sgpu-tests-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise RuntimeError(f"{path} belongs to somebody else, who could put any library there")
    return path


def _download(scratch: Path, packages: tuple[str, ...]) -> Path:
    """Download the packages from where this machine's packages come from, and unpack them."""
    sources = scratch / "sources"
    sources.mkdir()
    for path in [SOURCES / "sources.list", *(SOURCES / "sources.list.d").glob("*")]:
        if path.suffix in (".list", ".sources") and path.is_file():
            (sources / path.name).write_text(non_free(path.read_text()))
    (scratch / "lists" / "partial").mkdir(parents=True)
    (scratch / "cache" / "archives" / "partial").mkdir(parents=True)
    (scratch / "apt.conf").write_text(f"""
        Dir::Etc::sourcelist "/dev/null";
        Dir::Etc::sourceparts "{sources}";
        Dir::State::lists "{scratch}/lists";
        Dir::Cache "{scratch}/cache";
        APT::Sandbox::User "root";  // apt's own user can't write into a private directory
        APT::Update::Error-Mode "any";  // a mirror out of reach is none otherwise
        Acquire::Languages "none";
        Acquire::Retries "0";
        Acquire::http::Timeout "15";
        #clear APT::Update::Post-Invoke;  // hooks that clean or index the machine's own packages
        #clear APT::Update::Post-Invoke-Success;
    """)
    deadline = time.monotonic() + TIME_LIMIT
    apt_get = ["apt-get", "-q", f"-c={scratch / 'apt.conf'}"]
    _run([*apt_get, "update"], scratch, deadline)
    _run([*apt_get, "download", *(f"{package}:amd64" for package in packages)], scratch, deadline)
    unpacked = scratch / "unpacked"
    for package in scratch.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(unpacked)], scratch, deadline)
    return unpacked


def non_free(sources: str) -> str:
    """Apt's sources, in either format, with the component that has NVIDIA's packages in place of all others."""
    sources = re.sub(r"^Components:.*\bmain\b.*$", "Components: non-free", sources, flags=re.MULTILINE)
    return re.sub(r"^(deb\s(?:\[.*\]\s*)?.*\s)main\b.*$", r"\1non-free", sources, flags=re.MULTILINE)


def _run(command: list[str], directory: Path, deadline: float) -> None:
    """Run one step; skip the test, with the step's output, when it fails."""
    try:
        subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            timeout=max(0, deadline - time.monotonic()),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        output = " ".join((getattr(error, "stderr", None) or str(error)).split())
        step = " ".join(word for word in command[:4] if not word.startswith("-"))
        pytest.skip(f"needs {VARIABLE}, or Debian's {PACKAGE} and others from non-free: {step}: {output}")
