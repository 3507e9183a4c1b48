"""`stage` on NVIDIA's own files, from Debian's packages; and sgpu loads what was staged."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import driver_layout
import pytest
import real_driver
from driver_layout import MULTIARCH, DriverFiles

from sgpu.commands.stage import stage_once
from sgpu.driver.nvml import Code, NvmlError, open_library, search

pytestmark = pytest.mark.soak

#: All of the packages but libvdpau_nvidia, which draws: bare name → soname.
LIBRARIES = {
    "libcuda.so": "libcuda.so.1",
    "libnvcuvid.so": "libnvcuvid.so.1",
    "libnvidia-allocator.so": "libnvidia-allocator.so.1",
    "libnvidia-cfg.so": "libnvidia-cfg.so.1",
    "libnvidia-encode.so": "libnvidia-encode.so.1",
    "libnvidia-ml.so": "libnvidia-ml.so.1",
    "libnvidia-opencl.so": "libnvidia-opencl.so.1",
    "libnvidia-opticalflow.so": "libnvidia-opticalflow.so.1",
    "libnvidia-pkcs11-openssl3.so": "",
    "libnvidia-ptxjitcompiler.so": "libnvidia-ptxjitcompiler.so.1",
}
TOOLS = ["nvidia-cuda-mps-control", "nvidia-cuda-mps-server", "nvidia-smi"]


def files(packages: Path, version: str) -> DriverFiles:
    """Return the packages' files. Their own links say what each soname is."""
    libraries = []
    for path in (packages / "usr/lib").rglob(f"lib*.so.{version}"):
        links = [
            link.name
            for link in path.parent.glob("lib*.so.*")
            if link.is_symlink() and link.readlink().name == path.name
        ]
        libraries.append((path, (*links, path.name)[0]))
    places = ("bin", "sbin", "current")
    tools = [path for path in packages.rglob("*") if path.name in TOOLS and path.parent.name in places]
    return DriverFiles(tuple(libraries), tuple(tools))


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("configured", [True, False], ids=["configured", "unpacked"])
def test_staged_and_loaded(tmp_path: Path, configured: bool) -> None:
    """All libraries get their sonames, as the loader takes them; without a driver in the kernel NVML says so."""
    packages = real_driver.driver_packages()
    (library,) = (packages / MULTIARCH / "nvidia/current").glob("libnvidia-ml.so.*.*")
    version = library.name.removeprefix("libnvidia-ml.so.")
    root, path = tmp_path / "root", tmp_path / "nvidia"
    shutil.copytree(packages, root, symlinks=True)
    if configured:  # which makes links
        driver_layout.alternatives(root, files(packages, version))
    driver_layout.make_cache(root, MULTIARCH, "usr/lib64", f"{MULTIARCH}/nvidia/current")
    assert version in stage_once(root, path, tmp_path / "stage.lock", graphics=False)
    expected = {name for pair in LIBRARIES.items() for name in (*pair, f"{pair[0]}.{version}") if name}
    assert {file.name for file in (path / "lib64").iterdir()} == expected
    assert driver_layout.names((path / "bin").iterdir()) == TOOLS
    shutil.rmtree(root)
    assert search.dlopen(path)[0] == path / "lib64/libnvidia-ml.so.1"
    with pytest.raises(NvmlError) as caught, open_library(path):
        pass
    assert caught.value.code == Code.DRIVER_NOT_LOADED
    loader = {"LD_LIBRARY_PATH": str(path / "lib64")}
    smi = subprocess.run([path / "bin/nvidia-smi"], env=loader, capture_output=True, text=True, check=False)
    assert "couldn't communicate with the NVIDIA driver" in smi.stdout
