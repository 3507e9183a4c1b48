"""The doctor on the host path: what is missing, broken, of another machine, or where containers will not find it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from findings import about, told
from stub_driver import StubDriver
from test_elf import made

from sgpu.doctor.finding import Level
from sgpu.doctor.libraries import check_libraries, find_library
from sgpu.settings import Settings


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A driver as GKE's installer leaves it: files with the version in their name, and links."""
    directory = tmp_path / "nvidia"
    stub = StubDriver(directory).path
    real = stub.with_name("libnvidia-ml.so.550.54.15")
    stub.rename(real)
    stub.symlink_to(real.name)
    shutil.copy(real, stub.with_name("libcuda.so.1"))
    return directory


def test_found(host: Path) -> None:
    """Everything is in its place: each line says what it saw."""
    findings = list(check_libraries(Settings(host_path=str(host))))
    assert {finding.level for finding in findings} == {Level.OK}
    assert told(about(findings, "host path"), "ok", f"{host} is there; containers get it at /usr/local/nvidia")
    assert told(about(findings, "library"), "ok", "(libnvidia-ml.so.550.54.15), 64 bit")
    assert told(about(findings, "library"), "ok", "soname libnvidia-ml.so.1")
    assert told(about(findings, "libcuda"), "ok", "in containers /usr/local/nvidia/lib64")
    library = find_library(host)
    assert library
    assert library.version == "550.54.15"


@pytest.mark.parametrize("make", [pytest.param(False, id="absent"), pytest.param(True, id="a file")])
def test_no_host_path(tmp_path: Path, make: bool) -> None:
    """Without the directory nothing else is looked for."""
    path = tmp_path / "nvidia"
    if make:
        path.touch()
    first, second = check_libraries(Settings(host_path=str(path)))
    assert told(first, "FAIL", "is not a directory" if make else "is not there", "set -host-path")
    assert told(second, "skip", "because the host path is not there")


def test_whole_host(host: Path) -> None:
    """The host's root as host path gives every container all of it."""
    finding = about(check_libraries(Settings(host_path="/")), "host path")
    assert told(finding, "warn", "each container gets all", "stage")


def test_nothing_there(tmp_path: Path) -> None:
    """Every place that was looked at is named."""
    finding = about(check_libraries(Settings(host_path=str(tmp_path))), "library")
    assert told(finding, "FAIL", "libnvidia-ml.so.1", "install the driver, or set -host-path")
    assert told(finding, "FAIL", "looked in lib64, lib, lib/x86_64-linux-gnu, usr/lib/x86_64-linux-gnu, usr/lib64")
    assert find_library(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(made(64, "<", 40, b"libnvidia-ml.so.1"), "it is for 64 bit arm", id="machine"),
        pytest.param(made(32, "<", 3, b"libnvidia-ml.so.1"), "it is for 32 bit 386", id="bits"),
        pytest.param(b"version https://git-lfs", "it is not an ELF file", id="no library"),
        pytest.param(made(64, "<", 62, b"x")[:70], "it is cut short", id="cut short"),
    ],
)
def test_useless_library(tmp_path: Path, content: bytes, words: str) -> None:
    """A file that can't be loaded here is none, and it says why."""
    path = tmp_path / "lib64" / "libnvidia-ml.so.1"
    path.parent.mkdir()
    path.write_bytes(content)
    assert told(about(check_libraries(Settings(host_path=str(tmp_path))), "library"), "FAIL", f"{path}: {words}")


def test_link_to_nothing(tmp_path: Path) -> None:
    """A link out of what is mounted."""
    path = tmp_path / "lib64" / "libnvidia-ml.so.1"
    path.parent.mkdir()
    path.symlink_to("/nowhere/libnvidia-ml.so.550.54.15")
    finding = about(check_libraries(Settings(host_path=str(tmp_path))), "library")
    assert told(finding, "FAIL", f"{path}: a link to /nowhere/libnvidia-ml.so.550.54.15, which is not there")


def test_other_soname(tmp_path: Path, host: Path) -> None:
    """Something else under that name."""
    (host / "lib64/libnvidia-ml.so.1").unlink()
    shutil.copy(shutil.which("true") or "", host / "lib64/libnvidia-ml.so.1")
    assert told(about(check_libraries(Settings(host_path=str(host))), "library"), "ok", "soname none")
    ours = 62 if "x86_64" in about(check_libraries(Settings(host_path=str(host))), "library").words else 183
    (host / "lib64/libnvidia-ml.so.1").write_bytes(made(64, "<", ours, b"libother.so.1"))
    finding = about(check_libraries(Settings(host_path=str(host))), "library")
    assert told(finding, "warn", "soname libother.so.1", "libnvidia-ml has the soname")


def test_no_cuda(host: Path) -> None:
    """The tools' library without CUDA's: GPUs are seen, and no pod can use one."""
    (host / "lib64/libcuda.so.1").unlink()
    assert told(about(check_libraries(Settings(host_path=str(host))), "libcuda"), "FAIL", "there is no libcuda.so.1")


def test_broken_cuda(host: Path) -> None:
    """CUDA's library is looked at as well."""
    (host / "lib64/libcuda.so.1").write_bytes(b"")
    finding = about(check_libraries(Settings(host_path=str(host))), "libcuda")
    assert told(finding, "FAIL", "it is not an ELF file", "install the driver again")


@pytest.mark.parametrize(
    ("directory", "container_path", "inside"),
    [
        pytest.param("usr/lib64", "/usr/local/nvidia", "/usr/local/nvidia/usr/lib64", id="host"),
        pytest.param("lib64", "/opt/nvidia", "/opt/nvidia/lib64", id="container"),
    ],
)
def test_out_of_sight(host: Path, directory: str, container_path: str, inside: str) -> None:
    """Libraries that images do not look for by themselves."""
    if directory != "lib64":
        (host / directory).parent.mkdir()
        (host / "lib64").rename(host / directory)
    finding = about(check_libraries(Settings(host_path=str(host), container_path=container_path)), "libcuda")
    assert told(finding, "warn", f"is at {inside} in containers", f"put {inside} into LD_LIBRARY_PATH")
