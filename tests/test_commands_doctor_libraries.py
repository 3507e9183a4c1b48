"""The doctor on the host path: what is missing, broken, of another machine, or where containers will not find it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from findings import expect, find
from stub_driver import StubDriver
from test_lib_elf import made

from sgpu.commands.doctor.finding import Finding, Level
from sgpu.commands.doctor.libraries import check_libraries, find_library
from sgpu.config.settings import Settings
from sgpu.driver.nvml.search import DIRECTORIES

#: Of ELF headers.
OUR_MACHINE = {"x86_64": 62, "aarch64": 183}.get(os.uname().machine, 0)


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


def checked(host_path: Path, container_path: str = "/usr/local/nvidia") -> list[Finding]:
    return list(check_libraries(Settings(host_path=str(host_path), container_path=container_path)))


def test_found(host: Path) -> None:
    """Everything is in its place: each line has what was found."""
    findings = checked(host)
    assert {finding.level for finding in findings} == {Level.OK}
    expect(find(findings, "host path"), "ok", host, "/usr/local/nvidia")
    expect(find(findings, "library"), "ok", "libnvidia-ml.so.550.54.15", "64", "libnvidia-ml.so.1")
    expect(find(findings, "libcuda"), "ok", "/usr/local/nvidia/lib64")
    library = find_library(host)
    assert library
    assert library.version == "550.54.15"


def test_no_host_path(tmp_path: Path) -> None:
    """Without the directory, nothing else is looked for."""
    path = tmp_path / "nvidia"
    absent, rest = checked(path)
    path.touch()
    file, _ = checked(path)
    for finding in absent, file:
        expect(finding, "FAIL", path, advice="-host-path")
    assert absent.message != file.message
    expect(rest, "skip")


def test_whole_host() -> None:
    """The host's root as host path gives every container all of it."""
    expect(find(checked(Path("/")), "host path"), "warn", "/", advice="python -m sgpu stage")


def test_nothing_there(tmp_path: Path) -> None:
    """Every place that was looked at is named."""
    finding = find(checked(tmp_path), "library")
    expect(finding, "FAIL", "libnvidia-ml.so.1", ", ".join(DIRECTORIES), advice="-host-path")
    assert str(tmp_path / "lib64") not in finding.message
    assert find_library(tmp_path) is None


USELESS = {
    "machine": (made(64, "<", 40, b"libnvidia-ml.so.1"), "arm"),
    "bits": (made(32, "<", 3, b"libnvidia-ml.so.1"), "386"),
    "no library": (b"version https://git-lfs", "ELF"),
    "link to nowhere": ("/nowhere/libnvidia-ml.so.550.54.15", "/nowhere/libnvidia-ml.so.550.54.15"),
    "link to itself": ("libnvidia-ml.so.1", os.strerror(errno.ELOOP)),
}


@pytest.mark.parametrize(("content", "fact"), USELESS.values(), ids=USELESS)
def test_useless_library(tmp_path: Path, content: bytes | str, fact: str) -> None:
    """A file that can't be loaded here counts as none, and the message says why."""
    path = tmp_path / "lib64" / "libnvidia-ml.so.1"
    path.parent.mkdir()
    if isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)
    expect(find(checked(tmp_path), "library"), "FAIL", path, fact)


@pytest.mark.parametrize(("soname", "level"), [(b"libnvidia-ml.so.1", "ok"), (b"libother.so.1", "warn"), (b"", "ok")])
def test_soname(host: Path, soname: bytes, level: str) -> None:
    """A library that calls itself something else may not be NVIDIA's."""
    (host / "lib64/libnvidia-ml.so.1").unlink()
    (host / "lib64/libnvidia-ml.so.1").write_bytes(made(64, "<", OUR_MACHINE, soname))
    expect(find(checked(host), "library"), level, soname.decode() or "none")


@pytest.mark.parametrize("broken", [False, True], ids=["absent", "broken"])
def test_no_cuda(host: Path, broken: bool) -> None:
    """Without CUDA's library beside NVML's, GPUs are seen and no pod can use one."""
    (host / "lib64/libcuda.so.1").unlink()
    if broken:
        (host / "lib64/libcuda.so.1").write_bytes(b"")
    expect(find(checked(host), "libcuda"), "FAIL", "ELF" if broken else "libcuda.so.1", host / "lib64")


@pytest.mark.parametrize(
    ("directory", "container_path", "inside"),
    [("usr/lib64", "/usr/local/nvidia", "/usr/local/nvidia/usr/lib64"), ("lib64", "/opt/nvidia", "/opt/nvidia/lib64")],
    ids=["elsewhere below the host path", "elsewhere in the container"],
)
def test_not_where_images_look(host: Path, directory: str, container_path: str, inside: str) -> None:
    """Libraries that CUDA images don't look for need LD_LIBRARY_PATH."""
    if directory != "lib64":
        (host / directory).parent.mkdir()
        (host / "lib64").rename(host / directory)
    finding = find(checked(host, container_path), "libcuda")
    expect(finding, "warn", inside, advice="LD_LIBRARY_PATH")
    assert inside in finding.advice


@pytest.mark.parametrize("place", ["lib64", "lib64/libnvidia-ml.so.550.54.15"])
def test_others_may_write(host: Path, place: str) -> None:
    """It is loaded as root."""
    (host / place).chmod(0o777)
    expect(find(checked(host), "library"), "warn", host / place)


def test_noexec(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library can be loaded from there: say that, and not to install the driver again."""
    status = os.statvfs_result((4096, 4096, 1, 1, 1, 1, 1, 1, os.ST_NOEXEC, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    expect(find(checked(host), "host path"), "FAIL", "noexec", advice="-host-path")
