"""`stage` copies one driver's files from wherever a host has them, and readers see one whole set at any time."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import driver_layout
import pytest
from driver_layout import LAYOUTS, DriverFiles

from sgpu.cli import FAILED, OK, main
from sgpu.stage import StageError, elf, sets, stage_once
from sgpu.stage.host import Host

OLD, NEW = "535.261.03", "550.90"
#: What is staged of the compiled driver, without what draws.
LIBRARY_NAMES = {
    "libcuda.so",
    "libcuda.so.1",
    "libnvidia-ml.so",
    "libnvidia-ml.so.1",
    "libnvidia-nvvm.so",
    "libnvidia-nvvm.so.4",
    "libnvidia-pkcs11.so",
}
FILE_NAMES = ("libcuda.so", "libnvidia-ml.so", "libnvidia-nvvm.so", "libnvidia-pkcs11.so")

#: Mounts the directory read-only in its own mount namespace and locks, as another user, all that it can open there.
POD = """
import fcntl, os, subprocess, sys
path = sys.argv[1]
subprocess.run(["mount", "--bind", "-o", "ro", path, path], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
os.chdir(path)  # what is above it is pytest's, and closed to others
os.setgid(65534), os.setuid(65534)
locked = 0
for directory, _, names in os.walk("."):
    for each in (directory, *(os.path.join(directory, name) for name in names)):
        try:
            fcntl.flock(os.open(each, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked += 1
        except (PermissionError, BlockingIOError):  # or a link to what is locked
            pass
print(locked, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> DriverFiles:
    """A driver."""
    return driver_layout.compile_driver(tmp_path_factory.mktemp("drivers") / "old", OLD)


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> DriverFiles:
    """A newer driver."""
    return driver_layout.compile_driver(tmp_path_factory.mktemp("drivers") / "new", NEW)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The host's root."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The host path; `stage` makes it."""
    return tmp_path / "a/nvidia"


def put(root: Path, path: Path) -> str:
    return stage_once(root, path, lock_of(path), graphics=False)


def lock_of(path: Path) -> Path:
    """The lock file of the tests that stage in `path`."""
    return path.parent.parent / "run/stage.lock"


def staged_version(path: Path, *directories: str) -> str:
    """The version that all staged files end in; empty if there are none."""
    found = {
        re.sub(rb".*\0", b"", file.read_bytes(), flags=re.DOTALL).decode()
        for directory in map(path.joinpath, directories or ("lib64", "bin"))
        if directory.exists()
        for file in directory.iterdir()
    }
    assert len(found) <= 1, found
    return "".join(found)


def left(path: Path) -> list[str]:
    """What there is in the host path, the sets by their versions."""
    return sorted([p.name for p in path.iterdir()] + [p.name.partition("-")[0] for p in (path / ".sgpu").iterdir()])


class TestFinding:
    """Where the driver's files are."""

    @pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, root: Path, path: Path, old: DriverFiles, layout: str, cache: bool) -> None:
        """By the loader's cache, or in the usual directories: the same files, with their sonames and bare names."""
        LAYOUTS[layout](root, old)
        if cache:
            place = root / "run/nvidia/driver" if layout == "operator" else root
            driver_layout.make_cache(place, driver_layout.MULTIARCH, "usr/lib64", "usr/lib")
        line = put(root, path)
        assert line.startswith(f"staged driver {OLD}: 4 libraries, 3 tools (")
        assert line.endswith(f" in {path}")
        assert {file.name for file in (path / "lib64").iterdir()} == LIBRARY_NAMES | {f"{n}.{OLD}" for n in FILE_NAMES}
        assert driver_layout.names((path / "bin").iterdir()) == sorted(driver_layout.TOOLS)
        assert staged_version(path) == OLD

    def test_a_directory_that_only_the_loader_knows(self, root: Path, path: Path, old: DriverFiles) -> None:
        """Such as `/opt`."""
        driver_layout.multiarch(root, old)
        (root / "opt").mkdir()
        (root / driver_layout.MULTIARCH).rename(root / "opt/nvidia")
        driver_layout.make_cache(root, "opt/nvidia")
        assert f" from /opt/nvidia in {path}" in put(root, path)

    @pytest.mark.parametrize("cache", [b"", b"glibc-ld.so.cache1.1", b"glibc-ld.so.cache1.1" + b"\xff" * 60, b"x" * 99])
    def test_a_damaged_cache(self, root: Path, path: Path, old: DriverFiles, cache: bytes) -> None:
        """Is as good as none."""
        driver_layout.multiarch(root, old)
        (root / "etc").mkdir()
        (root / "etc/ld.so.cache").write_bytes(cache)
        assert put(root, path).startswith("staged")

    @pytest.mark.skipif(not Path("/etc/ld.so.cache").exists(), reason="needs a loader's cache")
    def test_the_cache_of_this_machine(self) -> None:
        """Is read as its own tool reads it."""
        output = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
        told = [(m[1], PurePosixPath(m[2])) for m in re.finditer(r"^\t(\S+) \(.*\) => (.*)$", output, re.MULTILINE)]
        assert Host(Path("/")).loader_cache() == told

    def test_what_draws(self, root: Path, path: Path, old: DriverFiles) -> None:
        """Only where it is asked for; asking for it later makes another set."""
        driver_layout.multiarch(root, old)
        put(root, path)
        assert not (path / f"lib64/libnvidia-eglcore.so.{OLD}").exists()
        assert "5 libraries" in stage_once(root, path, lock_of(path), graphics=True)
        assert (path / f"lib64/libnvidia-eglcore.so.{OLD}").exists()

    def test_without_cuda(self, root: Path, path: Path, old: DriverFiles) -> None:
        """It is told that there is little to be done with it."""
        driver_layout.multiarch(root, old)
        (root / driver_layout.MULTIARCH / f"libcuda.so.{OLD}").unlink()
        assert "; libcuda is not among them" in put(root, path)

    def test_no_setuid(self, root: Path, path: Path, old: DriverFiles) -> None:
        """NVIDIA's nvidia-modprobe has it, which is nothing for pods."""
        driver_layout.multiarch(root, old)
        (root / "usr/bin/nvidia-modprobe").chmod(0o4755)
        put(root, path)
        assert (path / "bin/nvidia-modprobe").stat().st_mode & 0o7777 == 0o755

    @pytest.mark.parametrize("links", [("/b", "/a"), ("/../../b", "../../../target")], ids=["circle", "above the root"])
    def test_links(self, root: Path, links: tuple[str, str]) -> None:
        """Are followed as the host follows them: not out of its root, and not for ever."""
        (root / "a").symlink_to(links[0])
        (root / "b").symlink_to(links[1])
        (root.parent / "target").touch()
        assert Host(root).resolve(PurePosixPath("/a")) is None
        (root / "target").touch()
        found = Host(root).resolve(PurePosixPath("/a"))
        assert found == (None if links[1] == "/a" else PurePosixPath("/target"))


class TestRefusing:
    """What can't be staged is said in one line, and what is there stays."""

    @staticmethod
    def refused(root: Path, path: Path) -> str:
        with pytest.raises(StageError) as caught:
            put(root, path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_no_driver(self, root: Path, path: Path) -> None:
        """Nothing is made."""
        assert "no NVIDIA driver under" in self.refused(root, path)
        assert not path.exists()

    def test_a_driver_for_another_machine(self, root: Path, path: Path, old: DriverFiles) -> None:
        """Is none."""
        driver_layout.rhel(root, old)
        shutil.rmtree(root / "usr/lib64")
        assert "no NVIDIA driver under" in self.refused(root, path)

    def test_it_is_taken_away(self, root: Path, path: Path, old: DriverFiles) -> None:
        """The staged set stays."""
        driver_layout.multiarch(root, old)
        put(root, path)
        shutil.rmtree(root / "usr")
        assert "no NVIDIA driver under" in self.refused(root, path)
        assert staged_version(path) == OLD

    @pytest.mark.parametrize("size", [0, 10, 5000])
    @pytest.mark.parametrize("name", ["libnvidia-ml.so", "libcuda.so"])
    def test_a_file_is_cut_short(self, root: Path, path: Path, old: DriverFiles, name: str, size: int) -> None:
        """As while a package manager unpacks it."""
        driver_layout.multiarch(root, old)
        os.truncate(root / driver_layout.MULTIARCH / f"{name}.{OLD}", size)
        assert "is not a whole file" in self.refused(root, path)

    def test_replaced_while_it_is_copied(
        self, root: Path, path: Path, old: DriverFiles, new: DriverFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Readers keep the old set."""
        driver_layout.multiarch(root, old)
        put(root, path)
        driver_layout.multiarch(root, new)
        copy = shutil.copyfile

        def copy_and_upgrade(source: Path, target: Path) -> None:
            copy(source, target)
            source.write_bytes(b"another")

        monkeypatch.setattr(shutil, "copyfile", copy_and_upgrade)
        assert "was replaced while it was copied" in self.refused(root, path)
        assert staged_version(path) == OLD
        assert left(path) == sorted([".sgpu", "bin", "lib64", "current", OLD])

    @pytest.mark.parametrize("name", ["lib64", "bin"])
    def test_somebody_elses(self, root: Path, path: Path, old: DriverFiles, name: str) -> None:
        """As an installer's on GKE: it is left alone."""
        driver_layout.multiarch(root, old)
        (path / name).mkdir(parents=True)
        assert f"{path / name} is there, and was not made by `stage`" in self.refused(root, path)
        assert left(path) == sorted([".sgpu", name])

    def test_no_directory(self, root: Path, path: Path, old: DriverFiles) -> None:
        """The system's words, with what it is about."""
        driver_layout.multiarch(root, old)
        path.parent.mkdir()
        path.touch()
        line = self.refused(root, path)
        assert line.startswith(f"the driver can't be staged in {path}: ")
        assert line.endswith("; what was there before stays")

    def test_no_room(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """The old set stays, and nothing half made beside it. (A limit on files stands for a full disk.)"""
        driver_layout.multiarch(root, old)
        put(root, path)
        driver_layout.multiarch(root, new)
        command = f"ulimit -f 8; exec {sys.executable} -m sgpu stage -host-root {root} -host-path {path}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == FAILED
        assert done.stderr.startswith(f"sgpu: the driver can't be staged in {path}: File too large: ")
        assert done.stderr.count("\n") == 1
        assert staged_version(path) == OLD
        assert left(path) == sorted([".sgpu", "bin", "lib64", "current", OLD])

    @pytest.mark.parametrize("seed", range(3))
    def test_damaged_headers(self, tmp_path: Path, old: DriverFiles, seed: int) -> None:
        """Whatever is in a file, it is a library's name, or one kind of error."""
        random_ = random.Random(seed)
        whole = old.libraries[0][0].read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            for _ in range(random_.randint(1, 6)):
                data[random_.randrange(random_.choice((64, 600, len(data))))] = random_.randrange(256)
            (tmp_path / "library").write_bytes(data)
            try:
                assert isinstance(elf.soname(tmp_path / "library"), str | None)
            except elf.NotWholeError:
                pass


class TestVersions:
    """All of a set is of one version, the kernel's if it has one."""

    def test_side_by_side(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """The one that the links name."""
        driver_layout.multiarch(root, old)
        driver_layout.multiarch(root, new)
        put(root, path)
        assert staged_version(path) == NEW

    @pytest.mark.parametrize("cache", [True, False])
    def test_the_kernel_decides(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles, cache: bool) -> None:
        """Whatever the links name. Tools are bound to no version, and there is only one of each."""
        driver_layout.multiarch(root, old)
        driver_layout.multiarch(root, new)
        if cache:
            driver_layout.make_cache(root, driver_layout.MULTIARCH)
        driver_layout.load_module(root, OLD)
        put(root, path)
        assert staged_version(path, "lib64") == OLD

    def test_the_kernels_is_the_operators(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """A driver container beside what is left of the host's own driver."""
        driver_layout.multiarch(root, old)
        driver_layout.operator(root, new)
        driver_layout.load_module(root, NEW)
        assert f" from /run/nvidia/driver/{driver_layout.MULTIARCH} in {path}" in put(root, path)

    def test_upgraded_without_a_reboot(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """The libraries that are staged still work, those of the host don't: they stay, without failing the pod."""
        driver_layout.multiarch(root, old)
        driver_layout.load_module(root, OLD)
        put(root, path)
        shutil.rmtree(root / "usr")
        driver_layout.multiarch(root, new)
        line = put(root, path)
        assert line.startswith(f"driver {OLD} in {path} stays: the kernel has loaded version {OLD}")
        assert staged_version(path) == OLD
        driver_layout.load_module(root, NEW)
        assert put(root, path).startswith(f"staged driver {NEW}")
        assert staged_version(path) == NEW

    def test_other_libraries_than_the_kernels(self, root: Path, path: Path, old: DriverFiles) -> None:
        """With nothing staged, there is nothing that would work."""
        driver_layout.multiarch(root, old)
        driver_layout.load_module(root, NEW)
        with pytest.raises(StageError, match=f"has loaded version {NEW} .* are of {OLD}, .*: reboot the node"):
            put(root, path)


class TestAgain:
    """Staging what is staged, and what is not."""

    def test_nothing_new(self, root: Path, path: Path, old: DriverFiles) -> None:
        """Nothing is written."""
        driver_layout.multiarch(root, old)
        put(root, path)
        before = os.readlink(path / ".sgpu/current")
        assert put(root, path) == f"driver {OLD} in {path} is up to date"
        assert os.readlink(path / ".sgpu/current") == before

    def test_upgrades(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """The previous set stays, for who has just opened it; older ones go. A mounted directory sees the change."""
        driver_layout.multiarch(root, old)
        put(root, path)
        mounted = os.open(path, os.O_RDONLY | os.O_DIRECTORY)  # as what a pod has mounted stays the same directory
        try:
            for files in (new, old, new):
                shutil.rmtree(root / "usr")
                driver_layout.multiarch(root, files)
                put(root, path)
            assert staged_version(Path(f"/proc/self/fd/{mounted}")) == NEW
        finally:
            os.close(mounted)
        assert left(path) == sorted([".sgpu", "bin", "lib64", "current", "previous", OLD, NEW])

    def test_it_works_wherever_it_is_mounted(self, root: Path, path: Path, old: DriverFiles) -> None:
        """No link leads outside or says where it is."""
        driver_layout.alternatives(root, old)
        put(root, path)
        shutil.rmtree(root)
        moved = path.with_name("local")
        path.rename(moved)
        assert staged_version(moved) == OLD

    def test_a_file_was_replaced(self, root: Path, path: Path, old: DriverFiles) -> None:
        """By one of the same version: that counts as new."""
        driver_layout.multiarch(root, old)
        put(root, path)
        os.utime(root / driver_layout.MULTIARCH / f"libcuda.so.{OLD}", ns=(1, 1))
        assert put(root, path).startswith("staged")

    @pytest.mark.parametrize(
        "what", ["lib64", "bin", "lib64/libcuda.so.1", f"lib64/libcuda.so.{OLD}", "bin/nvidia-smi"]
    )
    def test_something_is_gone(self, root: Path, path: Path, old: DriverFiles, what: str) -> None:
        """It is put back."""
        driver_layout.multiarch(root, old)
        put(root, path)
        (path / what).unlink()
        assert put(root, path).startswith("staged")
        assert (path / what).exists()

    def test_a_host_path_that_the_loader_knows(
        self, root: Path, path: Path, old: DriverFiles, new: DriverFiles
    ) -> None:
        """What was staged is no driver to stage: an upgrade of the host counts."""
        path = root / "usr/local/nvidia"
        driver_layout.multiarch(root, old)
        put(root, path)
        shutil.rmtree(root / driver_layout.MULTIARCH)
        driver_layout.multiarch(root, new)
        driver_layout.make_cache(root, "usr/local/nvidia/lib64", driver_layout.MULTIARCH)
        put(root, path)
        assert staged_version(path) == NEW

    def test_two_at_once(self, root: Path, path: Path, old: DriverFiles) -> None:
        """One after the other."""
        driver_layout.multiarch(root, old)
        command = [sys.executable, "-m", "sgpu", "stage", "-host-root", str(root), "-host-path", str(path)]
        command += ["-lock-file", str(lock_of(path))]
        with sets.locked(lock_of(path)):
            processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        lines = sorted(process.communicate()[0].split()[0] for process in processes)
        assert lines == ["driver", "staged"]

    def test_the_other_does_not_end(
        self, root: Path, path: Path, old: DriverFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is not waited for for ever."""
        driver_layout.multiarch(root, old)
        monkeypatch.setattr(sets, "LOCK_TIMEOUT", 0.2)
        with (
            sets.locked(lock_of(path)),
            pytest.raises(StageError, match=r"held the lock for 0\.2 s: .*/run/stage\.lock"),
        ):
            put(root, path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount and another user")
    def test_a_pod_locks_all_it_can_open(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """Which is what is mounted into it, read-only: neither a look nor an upgrade waits for it."""
        driver_layout.multiarch(root, old)
        put(root, path)
        with subprocess.Popen(
            ["unshare", "--mount", sys.executable, "-c", POD, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as pod:
            assert pod.stdout is not None
            assert int(pod.stdout.readline()) > 3  # how many it has locked
            started = time.monotonic()
            assert put(root, path).endswith("is up to date")
            shutil.rmtree(root)
            root.mkdir()
            driver_layout.multiarch(root, new)
            assert put(root, path).startswith(f"staged driver {NEW}")
            assert time.monotonic() - started < sets.LOCK_TIMEOUT / 2
            pod.kill()

    @pytest.mark.parametrize("umask", [0o000, 0o277], ids=oct)
    def test_only_the_owner_can_open_the_lock(self, umask: int, root: Path, path: Path, old: DriverFiles) -> None:
        """Nor its directory, whatever the umask."""
        driver_layout.multiarch(root, old)
        before = os.umask(umask)
        try:
            with sets.locked(lock_of(path)):
                modes = [stat.S_IMODE(each.stat().st_mode) for each in (lock_of(path), lock_of(path).parent)]
        finally:
            os.umask(before)
        assert modes == [0o600, 0o700]


class _Killed(BaseException):
    """The process would be gone here."""


class _Reaper:
    """Ends whatever the process does with files at its n-th step. Audit hooks are called before each, and stay."""

    STEPS = frozenset({"open", "os.mkdir", "os.symlink", "os.rename", "os.remove", "os.rmdir", "os.chmod"})

    def __init__(self) -> None:
        self.left = -1
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.left >= 0 and event in self.STEPS:
            if self.left == 0:
                raise _Killed
            self.left -= 1


@pytest.fixture(scope="session")
def reaper() -> _Reaper:
    """One for the process."""
    return _Reaper()


class TestKilled:
    """At whatever point, readers see the old set or the new one, and the next run leaves nothing over."""

    @pytest.mark.soak
    @pytest.mark.parametrize("first", [True, False], ids=["first", "upgrade"])
    def test_at_each_step(
        self, root: Path, path: Path, old: DriverFiles, new: DriverFiles, reaper: _Reaper, first: bool
    ) -> None:
        """One after the other, until a run comes to its end."""
        before = "" if first else OLD
        keep = path.with_name("keep")
        if not first:
            driver_layout.multiarch(root, old)
            put(root, path)
            shutil.copytree(path, keep, symlinks=True)
        driver_layout.multiarch(root, new)
        seen = set()
        for step in range(1000):
            shutil.rmtree(path, ignore_errors=True)
            if not first:
                shutil.copytree(keep, path, symlinks=True)
            reaper.left = step
            try:
                put(root, path)
            except _Killed:
                ended = False
            else:
                ended = True
            finally:
                reaper.left = -1
            seen.add(staged_version(path))
            assert seen <= {before, NEW}
            put(root, path)
            assert staged_version(path) == NEW
            expected = {".sgpu", "bin", "lib64", "current", NEW}
            assert set(left(path)) - {"previous", OLD} == expected
            assert len(left(path)) <= len(expected) + 2 * (not first)
            if ended:
                break
        assert step > 30
        assert seen == {before, NEW}

    @pytest.mark.soak
    def test_at_any_moment(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """With SIGKILL, while it goes to and fro between two drivers; each file can be read at all times, whole."""
        roots = [root / "old", root / "new"]
        for directory, files in zip(roots, (old, new), strict=True):
            driver_layout.multiarch(directory, files)
        put(roots[0], path)
        sizes = {
            name: {files.libraries[index][0].stat().st_size for files in (old, new)}
            for index, (name, soname) in enumerate(driver_layout.LIBRARIES.items())
            if soname
        }
        script = (
            "import sys; from pathlib import Path; from itertools import cycle; from sgpu.stage import stage_once\n"
            "print(flush=True)\n"
            "path, lock = map(Path, sys.argv[1:3])\n"
            "for root in cycle(sys.argv[3:]): stage_once(Path(root), path, lock, graphics=False)\n"
        )
        random_ = random.Random(5)
        for _ in range(25):
            command = [sys.executable, "-c", script, *map(str, (path, *roots))]
            with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
                assert process.stdout is not None
                process.stdout.readline()
                end = time.monotonic() + random_.uniform(0, 0.1)
                while time.monotonic() < end:
                    for name, whole in sizes.items():
                        assert len((path / "lib64" / name).read_bytes()) in whole
                process.send_signal(signal.SIGKILL)
            assert staged_version(path) in (OLD, NEW)
        put(roots[0], path)
        put(roots[1], path)
        assert left(path) == sorted([".sgpu", "bin", "lib64", "current", "previous", OLD, NEW])


class TestCommand:
    """`python -m sgpu stage`."""

    def test_it_says_what_it_did(
        self, root: Path, path: Path, old: DriverFiles, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """On standard output; the host path may come from the environment, as the daemon's does."""
        driver_layout.multiarch(root, old)
        lock = ["-lock-file", str(lock_of(path))]
        for words in ("staged driver", "up to date"):
            assert main(["stage", "-host-root", str(root), *lock], {"SGPU_HOST_PATH": str(path)}) == OK
            assert words in capsys.readouterr().out

    def test_it_fails(self, root: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With one line on standard error."""
        assert main(["stage", "-host-root", str(root), "-host-path", str(path)], {}) == FAILED
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(r"sgpu: no NVIDIA driver under .*\n", captured.err)

    def test_again_and_again(self, root: Path, path: Path, old: DriverFiles, new: DriverFiles) -> None:
        """With -interval it tells what changes, once, goes on when something is wrong, and stops when it is told to."""
        flags = ["-host-root", str(root), "-host-path", str(path), "-interval", "0.05"]
        flags += ["-lock-file", str(lock_of(path))]
        command = [sys.executable, "-m", "sgpu", "stage", *flags]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            lines: Iterator[str] = process.stdout
            assert "no NVIDIA driver" in next(lines)
            time.sleep(0.3)  # nothing is said again
            driver_layout.multiarch(root, old)
            words = [next(lines)]
            while "up to date" not in words[-1]:  # before the first, it may see libraries that are half there
                words.append(next(lines))
            assert f"staged driver {OLD}" in "".join(words)
            process.terminate()
            assert process.wait(10) == 0
            assert list(lines) == []
