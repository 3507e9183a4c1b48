"""`stage` copies one driver's files from wherever a host has them, and readers see one whole set at any time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path, PurePosixPath

import attrs
import driver_layout
import pytest
from driver_layout import LAYOUTS, MULTIARCH, DriverFiles, load_module, make_cache, multiarch

from sgpu.commands import stage as stage_module
from sgpu.commands.stage import StageError, sets, stage, stage_once
from sgpu.commands.stage.driver import find
from sgpu.commands.stage.host import Host

OLD, NEW = "535.261.03", "550.90"
#: Names that a staged library has beside that of its file, without what draws.
LINKS = {"libcuda.so", "libcuda.so.1", "libnvidia-ml.so", "libnvidia-ml.so.1", "libnvidia-nvvm.so"}
LINKS |= {"libnvidia-nvvm.so.4", "libnvidia-pkcs11.so"}
FILES = ("libcuda.so", "libnvidia-ml.so", "libnvidia-nvvm.so", "libnvidia-pkcs11.so")
COMMAND = (sys.executable, "-m", "sgpu", "stage")
#: Seconds that a process may take.
PATIENCE = 60.0


@attrs.frozen
class Place:
    """A host with its root, and where its driver is staged."""

    root: Path
    path: Path
    lock: Path

    def stage(self, *, graphics: bool = False) -> str:
        return stage_once(self.root, self.path, self.lock, graphics=graphics)

    def refused(self) -> str:
        """Stage, and return the one line that says why it can't be done."""
        with pytest.raises(StageError) as caught:
            self.stage()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def upgrade(self, files: DriverFiles) -> None:
        """Have another driver in place of the one that is there."""
        shutil.rmtree(self.root / "usr", ignore_errors=True)
        multiarch(self.root, files)

    @property
    def flags(self) -> list[str]:
        return ["-host-root", str(self.root), "-host-path", str(self.path), "-lock-file", str(self.lock)]

    @property
    def version(self) -> str:
        return version_in(self.path)

    @property
    def left(self) -> list[str]:
        """Return the other entries of the host path; sets by their versions."""
        assert {path.name for path in self.path.iterdir()} == {".sgpu", "bin", "lib64"}
        return sorted(path.name.partition("-")[0] for path in (self.path / ".sgpu").iterdir() if path.name != "current")


def version_in(path: Path, directories: Collection[str] = ("lib64", "bin")) -> str:
    """Return the version that all staged files end in; empty if there are none."""
    found = {
        re.sub(rb".*\0", b"", file.read_bytes(), flags=re.DOTALL).decode()
        for directory in map(path.joinpath, directories)
        if directory.exists()
        for file in directory.iterdir()
    }
    assert len(found) <= 1, found
    return "".join(found)


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> DriverFiles:
    """A driver."""
    return driver_layout.compile_driver(tmp_path_factory.mktemp("drivers") / "old", OLD)


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> DriverFiles:
    """A newer driver."""
    return driver_layout.compile_driver(tmp_path_factory.mktemp("drivers") / "new", NEW)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """The command sets its process's umask."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def bare(tmp_path: Path) -> Place:
    """A host without a driver."""
    (tmp_path / "root").mkdir()
    return Place(tmp_path / "root", tmp_path / "a/nvidia", tmp_path / "run/stage.lock")


@pytest.fixture
def place(bare: Place, old: DriverFiles) -> Place:
    """A host with the older driver."""
    multiarch(bare.root, old)
    return bare


@pytest.fixture
def staged(place: Place) -> Place:
    """A host whose driver is staged."""
    place.stage()
    return place


# Where the driver's files are


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(bare: Place, old: DriverFiles, layout: str, cache: bool) -> None:
    """By the loader's cache or in the usual directories, the same files are found, and get their names."""
    LAYOUTS[layout](bare.root, old)
    if cache:
        root = bare.root / "run/nvidia/driver" if layout == "operator" else bare.root
        make_cache(root, MULTIARCH, "usr/lib64", "usr/lib")
    line = bare.stage()
    assert all(fact in line for fact in (OLD, "4 libraries", "3 tools", str(bare.path)))
    assert "libcuda" not in line
    assert {file.name for file in (bare.path / "lib64").iterdir()} == LINKS | {f"{name}.{OLD}" for name in FILES}
    assert driver_layout.names((bare.path / "bin").iterdir()) == sorted(driver_layout.TOOLS)
    assert bare.version == OLD


def test_directory_that_only_the_loader_knows(place: Place) -> None:
    """The loader's cache may name any directory, such as one in /opt."""
    (place.root / "opt").mkdir()
    (place.root / MULTIARCH).rename(place.root / "opt/nvidia")
    make_cache(place.root, "opt/nvidia")
    assert "/opt/nvidia" in place.stage()


@pytest.mark.parametrize("cache", [b"", b"glibc-ld.so.cache1.1", b"glibc-ld.so.cache1.1" + b"\xff" * 60, b"x" * 99])
def test_damaged_cache(place: Place, cache: bytes) -> None:
    """A cache that can't be read is as good as none."""
    (place.root / "etc").mkdir()
    (place.root / "etc/ld.so.cache").write_bytes(cache)
    place.stage()
    assert place.version == OLD


@pytest.mark.skipif(not Path("/etc/ld.so.cache").exists(), reason="needs a loader's cache")
def test_cache_of_this_machine() -> None:
    """The cache is read as the machine's own tool reads it."""
    output = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    lines = [(m[1], PurePosixPath(m[2])) for m in re.finditer(r"^\t(\S+) \(.*\) => (.*)$", output, re.MULTILINE)]
    assert Host(Path("/")).loader_cache() == lines


@pytest.mark.parametrize(
    ("links", "end"),
    [(("/b", "/a"), None), (("/../../b", "../../../target"), "/target"), (("/b", "/absent"), None)],
    ids=["circle", "above the root", "to nothing"],
)
def test_links(bare: Place, links: tuple[str, str], end: str | None) -> None:
    """Links are followed as the host follows them: not out of its root, and not forever."""
    for name, link in zip(("a", "b"), links, strict=True):
        (bare.root / name).symlink_to(link)
    (bare.root.parent / "target").touch()
    assert Host(bare.root).resolve(PurePosixPath("/a")) is None
    (bare.root / "target").touch()
    assert Host(bare.root).resolve(PurePosixPath("/a")) == (end and PurePosixPath(end))


def test_what_draws(staged: Place) -> None:
    """Libraries that draw are staged only on request; to request them later makes another set."""
    assert not (staged.path / f"lib64/libnvidia-eglcore.so.{OLD}").exists()
    assert "5 libraries" in staged.stage(graphics=True)
    assert (staged.path / f"lib64/libnvidia-eglcore.so.{OLD}").exists()


def test_incomplete(staged: Place) -> None:
    """It is said that CUDA's library is missing, without which no CUDA program runs, and nvidia-smi."""
    (staged.root / MULTIARCH / f"libcuda.so.{OLD}").unlink()
    shutil.rmtree(staged.root / "usr/bin")
    line = staged.stage()
    assert "libcuda" in line
    assert "nvidia-smi" in line


def test_modes(place: Place) -> None:
    """Any user can read libraries and run tools, whatever the umask; a setuid bit is nothing for pods."""
    (place.root / "usr/bin/nvidia-modprobe").chmod(0o4711)
    os.umask(0o077)
    place.stage()
    modes = {"bin/nvidia-modprobe": 0o755, "lib64/libcuda.so.1": 0o644}
    for name, mode in {**modes, "lib64": 0o755, "bin": 0o755, ".sgpu/current": 0o755}.items():
        assert stat.S_IMODE((place.path / name).stat().st_mode) == mode


# What can't be staged


def test_no_driver(bare: Place, old: DriverFiles) -> None:
    """Without a driver, or with libraries of another machine alone, nothing is made."""
    bare.refused()
    driver_layout.rhel(bare.root, old)
    shutil.rmtree(bare.root / "usr/lib64")
    assert str(bare.root) in bare.refused()
    assert not bare.path.exists()


def test_driver_is_taken_away(staged: Place) -> None:
    """A staged driver stays."""
    shutil.rmtree(staged.root / "usr")
    staged.refused()
    assert staged.version == OLD


@pytest.mark.parametrize("name", ["libnvidia-ml.so", "libcuda.so"])
def test_file_cut_short(place: Place, name: str) -> None:
    """A file that is not whole, as while a package manager unpacks it, is named."""
    os.truncate(place.root / MULTIARCH / f"{name}.{OLD}", 5000)
    assert f"{name}.{OLD}" in place.refused()


def _replace(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())
    source.write_bytes(b"another")


def _fail(number: int) -> Callable[[Path, Path], None]:
    def fail(source: Path, target: Path) -> None:
        target.touch()
        raise OSError(number, os.strerror(number), source)

    return fail


@pytest.mark.parametrize(
    ("copy", "fact"),
    [(_replace, f".so.{OLD}"), (_fail(errno.EIO), f".so.{OLD}"), (_fail(errno.ENOSPC), "200 MB")],
    ids=["replaced", "unreadable", "no room"],
)
def test_failed_copy(
    staged: Place, monkeypatch: pytest.MonkeyPatch, copy: Callable[[Path, Path], None], fact: str
) -> None:
    """Where a file can't be copied as it was found, the old set stays, and nothing half made beside it."""
    for library in (staged.root / MULTIARCH).glob(f"*.{OLD}"):
        os.utime(library, ns=(1, 1))
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert fact in staged.refused()
    assert staged.version == OLD
    assert staged.left == [OLD]


@pytest.mark.parametrize("name", ["lib64", "bin"])
def test_somebody_elses(place: Place, name: str) -> None:
    """A directory that an installer made, as on GKE, is left alone."""
    (place.path / name).mkdir(parents=True)
    assert str(place.path / name) in place.refused()
    assert driver_layout.names(place.path.iterdir()) == [".sgpu", name]
    assert not list((place.path / ".sgpu").iterdir())


def test_no_directory(place: Place) -> None:
    """Where the host path can't be made, the system's reason is given."""
    place.path.parent.mkdir()
    place.path.touch()
    assert os.strerror(errno.ENOTDIR) in place.refused()


# Versions


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("loaded", "version"), [("", NEW), (OLD, OLD)], ids=["links", "kernel"])
def test_side_by_side(place: Place, new: DriverFiles, loaded: str, version: str, cache: bool) -> None:
    """Of two versions, the kernel's is staged, or else the one that the links name. Tools have no version."""
    multiarch(place.root, new)
    if cache:
        make_cache(place.root, MULTIARCH)
    if loaded:
        load_module(place.root, loaded)
    place.stage()
    assert version_in(place.path, ["lib64"]) == version


def test_kernels_driver_is_the_operators(place: Place, new: DriverFiles) -> None:
    """A driver container counts beside what is left of the host's own driver."""
    driver_layout.operator(place.root, new)
    load_module(place.root, NEW)
    assert f"/run/nvidia/driver/{MULTIARCH}" in place.stage()


def test_upgrade_without_reboot(staged: Place, new: DriverFiles) -> None:
    """While the kernel's version is staged, it stays, and that is no failure; with the module's upgrade it goes."""
    load_module(staged.root, OLD)
    staged.upgrade(new)
    line = staged.stage()
    assert OLD in line
    assert NEW in line
    assert staged.version == OLD
    load_module(staged.root, NEW)
    staged.stage()
    assert staged.version == NEW


def test_other_libraries_than_the_kernels(place: Place) -> None:
    """With nothing staged, libraries that the kernel's module doesn't work with are none."""
    load_module(place.root, NEW)
    message = place.refused()
    assert NEW in message
    assert OLD in message
    assert not place.path.exists()


# Again


def test_nothing_new(staged: Place) -> None:
    """To stage what is staged writes nothing, and takes no lock."""
    before = os.readlink(staged.path / ".sgpu/current")
    staged.lock.unlink()
    assert OLD in staged.stage()
    assert os.readlink(staged.path / ".sgpu/current") == before
    assert not staged.lock.exists()


def test_upgrades(staged: Place, old: DriverFiles, new: DriverFiles) -> None:
    """The previous set stays, for who has just opened it; older ones go. A mounted directory sees the change."""
    mounted = os.open(staged.path, os.O_RDONLY | os.O_DIRECTORY)  # what a pod has mounted stays the same directory
    try:
        for files in (new, old, new):
            staged.upgrade(files)
            staged.stage()
        assert version_in(Path(f"/proc/self/fd/{mounted}")) == NEW
    finally:
        os.close(mounted)
    assert staged.left == [OLD, NEW, "previous"]


def test_mounted_elsewhere(bare: Place, old: DriverFiles) -> None:
    """No link leads out of the host path, or says where it is."""
    driver_layout.alternatives(bare.root, old)
    bare.stage()
    shutil.rmtree(bare.root)
    moved = bare.path.with_name("local")
    bare.path.rename(moved)
    assert version_in(moved) == OLD


def test_replaced_file(staged: Place) -> None:
    """A file that was replaced by one of the same version makes another set."""
    os.utime(staged.root / MULTIARCH / f"libcuda.so.{OLD}", ns=(1, 1))
    staged.stage()
    assert staged.left == [OLD, OLD, "previous"]


@pytest.mark.parametrize("what", ["lib64", "bin", "lib64/libcuda.so.1", f"lib64/libcuda.so.{OLD}", "bin/nvidia-smi"])
def test_something_is_gone(staged: Place, what: str) -> None:
    """A missing file of a set is put back."""
    (staged.path / what).unlink()
    staged.stage()
    assert (staged.path / what).exists()


def test_host_path_that_the_loader_knows(place: Place, new: DriverFiles) -> None:
    """A staged driver is not staged again: an upgrade of the host is."""
    place = attrs.evolve(place, path=place.root / "usr/local/nvidia")
    place.stage()
    shutil.rmtree(place.root / MULTIARCH)
    multiarch(place.root, new)
    make_cache(place.root, "usr/local/nvidia/lib64", MULTIARCH)
    place.stage()
    assert place.version == NEW


# The lock


def has_open(process: subprocess.Popen[str], path: Path) -> bool:
    return path in [link.resolve() for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.exists()]


def test_two_at_once(place: Place) -> None:
    """Of two processes, one waits for the other, and has nothing left to do."""
    with sets.locked(place.lock):
        processes = [subprocess.Popen([*COMMAND, *place.flags], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        deadline = time.monotonic() + PATIENCE
        while not all(has_open(process, place.lock) for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    lines = [process.communicate()[0] for process in processes]
    assert len(set(lines)) == 2
    assert [process.returncode for process in processes] == [0, 0]
    assert place.left == [OLD]


def test_other_does_not_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that keeps the lock is not waited for forever."""
    monkeypatch.setattr(sets, "LOCK_TIMEOUT", 0.2)
    with sets.locked(place.lock):
        message = place.refused()
    assert "0.2 s" in message
    assert str(place.lock) in message


def test_locks_of_pods(staged: Place, new: DriverFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod can lock all that is mounted into it, if only to read: nothing of that is waited for."""
    monkeypatch.setattr(sets, "LOCK_TIMEOUT", 0.0)
    with ExitStack() as stack:
        for path in (staged.path, *staged.path.rglob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with suppress(BlockingIOError):  # a link to what is locked
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        staged.stage()
        staged.upgrade(new)
        staged.stage()
    assert staged.version == NEW


@pytest.mark.parametrize("umask", [0o000, 0o277], ids=oct)
def test_lock_is_its_owners(umask: int, place: Place) -> None:
    """Nobody else can open the lock or its directory, whatever the umask."""
    os.umask(umask)
    with sets.locked(place.lock):
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (place.lock, place.lock.parent)]
    assert modes == [0o600, 0o700]


# Killed at whatever point, readers see the old set or the new one, and the next run leaves nothing over


#: What a process does with files, as audit events: they come before each.
STEPS = frozenset({"open", "os.mkdir", "os.symlink", "os.rename", "os.remove", "os.rmdir", "os.chmod"})


class _Killed(BaseException):
    """The process would be gone here."""


@pytest.fixture(scope="session")
def steps() -> list[int]:
    """How many steps are left to this process; empty where it may live on. (An audit hook stays.)"""
    left: list[int] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if left and event in STEPS:
            if left[0] == 0:
                raise _Killed
            left[0] -= 1

    sys.addaudithook(hook)
    return left


@pytest.mark.soak
@pytest.mark.parametrize("first", [True, False], ids=["first", "upgrade"])
def test_killed_at_each_step(place: Place, new: DriverFiles, steps: list[int], first: bool) -> None:
    """A run is killed at its first step, then one at its second, until one comes to its end."""
    keep = place.path.with_name("keep")
    if not first:
        place.stage()
        shutil.copytree(place.path, keep, symlinks=True)
    place.upgrade(new)
    seen = set()
    for step in range(1000):
        shutil.rmtree(place.path, ignore_errors=True)
        if not first:
            shutil.copytree(keep, place.path, symlinks=True)
        ended = False
        steps[:] = [step]
        try:
            place.stage()
            ended = True
        except _Killed:
            pass
        finally:
            steps.clear()
        seen.add(place.version)
        place.stage()
        assert place.version == NEW
        assert set(place.left) <= {NEW, *([] if first else [OLD, "previous"])}
        assert len(place.left) <= (1 if first else 3)
        if ended:
            break
    assert step > 30
    assert seen == {"" if first else OLD, NEW}


# `python -m sgpu stage`


def test_once(bare: Place, old: DriverFiles, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what it did, or on standard error why it could not, in a line; its result says which."""
    once = partial(stage, bare.root, bare.path, bare.lock, graphics=False, interval=0.0)
    assert not once()
    multiarch(bare.root, old)
    os.umask(0o077)
    assert once()
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sgpu: ")
    assert captured.out.count("\n") == 1
    assert OLD in captured.out
    assert stat.S_IMODE(bare.path.stat().st_mode) == 0o755  # containers read it with any user


def test_interval(
    bare: Place, old: DriverFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an interval it looks again and again, prints what changes once, and goes on where something is wrong."""
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            multiarch(bare.root, old)
        if len(sleeps) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage_module, "wait", sleep)
    with pytest.raises(KeyboardInterrupt):
        stage(bare.root, bare.path, bare.lock, graphics=False, interval=30.0)
    captured = capsys.readouterr()
    assert set(sleeps) == {30.0}
    assert (captured.err.count("\n"), captured.out.count("\n")) == (1, 2)  # no driver; staged, up to date


def test_signal(place: Place) -> None:
    """With an interval, it ends when it is told to."""
    command = [*COMMAND, *place.flags, "-interval", "3600"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert OLD in process.stdout.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("libraries", "tools"),
    [
        ("run/opengl-driver/lib", "run/current-system/sw/bin"),
        ("opt/nvidia/lib64", "opt/nvidia/bin"),
        ("var/lib/nvidia/lib64", "var/lib/nvidia/bin"),
        ("usr/local/nvidia/lib64", "usr/local/nvidia/bin"),
        ("usr/local/glibc/usr/lib", "usr/local/glibc/usr/bin"),
        ("cm/local/apps/cuda/libs/current/lib64", "usr/bin"),
        ("usr/lib/nvidia/tesla", "usr/libexec/nvidia/tesla/bin"),
    ],
    ids=lambda path: path.split("/")[1],
)
def test_other_places(place: Place, libraries: str, tools: str) -> None:
    """Find a driver where other distributions and installers put it, without the loader's cache."""
    for source, target in ((driver_layout.MULTIARCH, libraries), ("usr/bin", tools)):
        if source != target:
            (place.root / target).parent.mkdir(parents=True, exist_ok=True)
            (place.root / source).rename(place.root / target)
    assert "4 libraries, 3 tools" in place.stage()


def test_library_without_a_version(place: Place) -> None:
    """One that has only a soname's number, beside the management library, belongs to the driver; a link does not."""
    directory = place.root / driver_layout.MULTIARCH
    shutil.copy(directory / f"libnvidia-nvvm.so.{OLD}", directory / "libnvidia-nvvm70.so.4")
    shutil.copy(directory / f"libnvidia-nvvm.so.{OLD}", directory / "libother.so.4")
    (directory / "libnvidia-link.so.4").symlink_to("libnvidia-nvvm70.so.4")
    assert "5 libraries" in place.stage()
    assert (place.path / "lib64/libnvidia-nvvm70.so.4").is_file()


def test_old_copy_by_soname(place: Place) -> None:
    """A file by whose name a library of the driver is loaded is another's: it is not staged."""
    directory = place.root / driver_layout.MULTIARCH
    (directory / "libcuda.so.1").unlink(missing_ok=True)
    shutil.copy(directory / f"libnvidia-nvvm.so.{OLD}", directory / "libcuda.so.1")
    assert "4 libraries" in place.stage()
    assert os.readlink(place.path / "lib64/libcuda.so.1") == f"libcuda.so.{OLD}"
    assert sets.is_current(place.path, find(place.root))


def test_odd_files(place: Place, new: DriverFiles) -> None:
    """A tool that is a script or a directory, an empty library, one of another version: staged without, and named."""
    directory = place.root / driver_layout.MULTIARCH
    (place.root / "usr/bin/nvidia-smi").write_text("#!/bin/sh\n")
    (place.root / "usr/bin/nvidia-debugdump").unlink()
    (place.root / "usr/bin/nvidia-debugdump").mkdir()
    (directory / f"libcuda.so.{OLD}").write_bytes(b"")
    (directory / f"libnvidia-ml.so.{NEW}").write_bytes(b"")
    line = place.stage()
    assert "3 libraries, 1 tools" in line
    for name in ("usr/bin/nvidia-smi", "usr/bin/nvidia-debugdump", f"libcuda.so.{OLD}"):
        assert name in line


def test_odd_file_beside_the_real_one(place: Place) -> None:
    """A script or an empty library in one directory is not named where another has the real one, which is staged."""
    (place.root / "usr/lib64").mkdir()
    (place.root / "usr/sbin").mkdir()
    (place.root / "usr/bin/nvidia-smi").rename(place.root / "usr/sbin/nvidia-smi")
    (place.root / "usr/bin/nvidia-smi").write_text("#!/bin/sh\n")
    library = place.root / driver_layout.MULTIARCH / f"libcuda.so.{OLD}"
    library.rename(place.root / "usr/lib64" / library.name)
    library.touch()
    line = place.stage()
    assert "4 libraries, 3 tools" in line
    assert "left out" not in line


@pytest.mark.parametrize(
    ("nodes", "fact", "other"), [(["dxg"], "WSL", "package"), ([], "package", "WSL")], ids=["WSL", "elsewhere"]
)
def test_management_library_without_a_version(place: Place, nodes: list[str], fact: str, other: str) -> None:
    """It is found, and what is said is not that there is none; in WSL, that sgpu does not support it."""
    source = place.root / driver_layout.MULTIARCH / f"libnvidia-ml.so.{OLD}"
    (place.root / "usr/lib/wsl/lib").mkdir(parents=True)
    source.rename(place.root / "usr/lib/wsl/lib/libnvidia-ml.so.1")
    make_cache(place.root, "usr/lib/wsl/lib")
    (place.root / "dev").mkdir()
    for node in nodes:
        (place.root / "dev" / node).touch()
    message = place.refused()
    assert "/usr/lib/wsl/lib/libnvidia-ml.so.1" in message
    assert fact in message
    assert other not in message


@pytest.mark.parametrize("name", ["etc/ld.so.cache", "usr/bin/nvidia-smi", f"usr/lib64/libcuda.so.{OLD}"])
def test_pipes_of_the_host(place: Place, name: str) -> None:
    """What is no file is not opened, which could wait forever: the rest is staged."""
    path = place.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert "4 libraries" in place.stage()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_text("[" * 100_000)], ids=["pipe", "too deep"])
def test_manifest_that_is_none(staged: Place, make: Callable[[Path], object]) -> None:
    """The set that it is of counts as damaged: another is made."""
    manifest = staged.path / ".sgpu/current/manifest"
    manifest.unlink()
    make(manifest)
    assert "staged driver" in staged.stage()
    assert staged.left == [OLD, OLD, "previous"]


def test_control_characters(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A name of the host is printed in one line, whatever is in it."""
    place = attrs.evolve(place, root=place.root.rename(place.root.with_name("a\x1b[2J\nb")))
    (place.root / driver_layout.MULTIARCH / f"libnvidia-ml.so.{OLD}").write_bytes(b"-")
    assert not stage(place.root, place.path, place.lock, graphics=False, interval=0)
    assert r"a\x1b[2J\nb" in capsys.readouterr().err


def test_link_in_the_way(place: Place, tmp_path: Path) -> None:
    """Nothing is written, or removed, where a link of somebody else's leads."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    place.path.mkdir(parents=True)
    (place.path / ".sgpu").symlink_to(elsewhere)
    assert ".sgpu" in place.refused()
    assert os.listdir(elsewhere) == ["precious"]


def test_noexec(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a place from which no library can be loaded, and name the setting."""
    status = os.statvfs_result((4096, 4096, 1, 1, 1, 1, 1, 1, os.ST_NOEXEC, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    refused = place.refused()
    assert "noexec" in refused
    assert "-host-path" in refused
