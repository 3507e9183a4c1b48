"""`stage` on NVIDIA's own files, from Debian's packages, in each layout; and sgpu loads what was staged."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import driver_layout
import pytest
import real_driver
from driver_layout import LAYOUTS, MULTIARCH, DriverFiles
from test_nvml_real import without_gpu

from sgpu.nvml import Code, NvmlError, open_library, search
from sgpu.stage import stage_once

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


@pytest.fixture(scope="session")
def packages() -> Path:
    """The packages' files where the packages put them."""
    return real_driver.driver_packages()


def version(packages: Path) -> str:
    (library,) = (packages / MULTIARCH / "nvidia/current").glob("libnvidia-ml.so.*.*")
    return library.name.removeprefix("libnvidia-ml.so.")


def files(packages: Path) -> DriverFiles:
    """For another layout. The packages' own links say what each soname is."""
    paths = [*(packages / "usr/lib").rglob(f"lib*.so.{version(packages)}")]
    links = {
        link.readlink().name: link.name for path in paths for link in path.parent.glob("lib*.so.*") if link.is_symlink()
    }
    tools = [
        path for path in packages.rglob("*") if path.name in TOOLS and path.parent.name in ("bin", "sbin", "current")
    ]
    return DriverFiles(tuple((path, links.get(path.name, path.name)) for path in paths), tuple(tools))


def configured(root: Path, packages: Path) -> None:
    """Debian's packages, and the links that configuring them makes."""
    shutil.copytree(packages, root, symlinks=True, dirs_exist_ok=True)
    driver_layout.alternatives(root, files(packages))


def unpacked(root: Path, packages: Path) -> None:
    """Just Debian's packages."""
    shutil.copytree(packages, root, symlinks=True, dirs_exist_ok=True)


def _imitated(name: str) -> Callable[[Path, Path], None]:
    return lambda root, packages: LAYOUTS[name](root, files(packages))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(configured, id="debian"),
        pytest.param(unpacked, id="debian, unpacked"),
        *(pytest.param(_imitated(name), id=name) for name in ("multiarch", "rhel", "operator")),
    ],
)
@without_gpu
def test_staged_and_loaded(tmp_path: Path, packages: Path, layout: Callable[[Path, Path], None]) -> None:
    """All libraries under their sonames, as the loader takes them; without a driver in the kernel NVML says so."""
    root, path = tmp_path / "root", tmp_path / "nvidia"
    root.mkdir()
    layout(root, packages)
    driver_layout.make_cache(root, MULTIARCH, "usr/lib64", f"{MULTIARCH}/nvidia/current")
    line = stage_once(root, path, tmp_path / "stage.lock", graphics=False)
    assert line.startswith(f"staged driver {version(packages)}: {len(LIBRARIES)} libraries, {len(TOOLS)} tools (")
    expected = {name for pair in LIBRARIES.items() for name in pair if name}
    expected |= {f"{name}.{version(packages)}" for name in LIBRARIES}
    assert {file.name for file in (path / "lib64").iterdir()} == expected
    assert driver_layout.names((path / "bin").iterdir()) == TOOLS
    assert stage_once(root, path, tmp_path / "stage.lock", graphics=False).endswith("is up to date")
    shutil.rmtree(root)
    assert search.dlopen(path)[0] == path / "lib64/libnvidia-ml.so.1"
    with pytest.raises(NvmlError) as caught, open_library(path):
        pass
    assert caught.value.code == Code.DRIVER_NOT_LOADED
    loader = {"LD_LIBRARY_PATH": str(path / "lib64")}
    smi = subprocess.run([path / "bin/nvidia-smi"], env=loader, capture_output=True, text=True, check=False)
    assert "couldn't communicate with the NVIDIA driver" in smi.stdout
