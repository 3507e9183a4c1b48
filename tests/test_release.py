"""The files of a release: what `tox -e release` refuses, and `kubectl sgpu` as krew installs it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import distribution
from pathlib import Path

import krew
import make_release
import pytest
from fake_api import path, pod, pod_list, serving
from fake_status import SNAPSHOT
from packaging.requirements import Requirement

from sgpu import __version__
from sgpu.observe.snapshot import encode

LOCK = (krew.ROOT / "requirements.lock").read_text()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, of the libraries that are installed here."""
    directory = tmp_path_factory.mktemp("release")
    for requirement in krew.client_requirements(LOCK):
        installed = distribution(Requirement(requirement.partition(" ")[0]).name)
        for file in installed.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (directory / "lib" / file).parent.mkdir(parents=True, exist_ok=True)
                (directory / "lib" / file).write_bytes(file.read_binary())
    krew.pack(directory / "lib", directory / "first.tar.gz", 1700000000)
    os.utime(directory / "lib/trio/__init__.py", (1, 1))
    krew.pack(directory / "lib", directory / "kubectl-sgpu.tar.gz", 1700000000)
    assert (directory / "first.tar.gz").read_bytes() == (directory / "kubectl-sgpu.tar.gz").read_bytes()
    return directory / "kubectl-sgpu.tar.gz"


@pytest.fixture
def command(archive: Path, tmp_path: Path) -> Path:
    """The command as krew installs it: unpacked, with a link to it in another directory."""
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "store", filter="data")
    link = tmp_path / "kubectl-sgpu"
    link.symlink_to("store/kubectl-sgpu")
    return link


def test_requirements() -> None:
    """What pyproject.toml asks for everywhere, and nothing for Linux alone; each with its hashes."""
    found = list(krew.client_requirements(LOCK))
    names = {Requirement(line.partition(" ")[0]).name for line in found}
    assert names >= {"attrs", "h11", "rich", "trio", "idna"}
    assert not names & {"cffi", "httpcore", "purerpc", "typing-extensions"}
    assert all(re.fullmatch(r"[\w-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in found)


def test_runs(command: Path) -> None:
    """Runs with a Python that has nothing installed."""
    with serving({"pods": (200, pod_list(pod("n"))), path("n"): (200, encode(SNAPSHOT))}) as address:
        words: list[str | Path] = [sys.executable, "-I", "-S", command, f"-address={address}"]
        run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "1 of 1 node answered" in run.stdout, run.stderr
    assert os.access(command, os.X_OK)


@pytest.mark.parametrize("newer", [True, False])
def test_old_python(newer: bool, command: Path, tmp_path: Path) -> None:
    """An older Python hands over to a newer one that works, or says what is needed."""
    for name, code in {"python3.14": "exit 1", "python3.12": '[ "$1" = -c ] || echo "$0 $*"'}.items() if newer else ():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    old = "import runpy, sys; sys.version_info = (3, 9); sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    words: list[str | Path] = [sys.executable, "-c", old, command, "pods"]
    run = subprocess.run(words, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert run.stdout == (f"{tmp_path}/python3.12 {command} pods\n" if newer else "")
    assert ("needs Python 3.11 or later" in run.stderr) is not newer


def test_manifest(archive: Path) -> None:
    """What krew insists on: its version, a name, a semantic version, one line of description, each platform's file."""
    manifest = krew.manifest(archive, __version__, "https://example.com/v1/")
    assert manifest["apiVersion"] == "krew.googlecontainertools.github.com/v1alpha2"
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("Plugin", "sgpu")
    assert re.fullmatch(r"v\d+\.\d+\.\d+", manifest["spec"]["version"])
    assert re.fullmatch(r".{1,50}", manifest["spec"]["shortDescription"])
    (platform,) = manifest["spec"]["platforms"]
    assert platform["uri"] == "https://example.com/v1/kubectl-sgpu.tar.gz"
    assert platform["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert [each["key"] for each in platform["selector"]["matchExpressions"]] == ["os"]
    with tarfile.open(archive) as tar:
        assert tar.getmember(platform["bin"]).mode & 0o111
        assert "LICENSE" in tar.getnames()


@pytest.mark.parametrize(
    ("changes", "tags", "untagged", "problem"),
    [
        ("", f"v{__version__}\nlatest", False, ""),
        (" M src/sgpu/cli.py", f"v{__version__}", True, "src/sgpu/cli.py"),
        ("", "v0.0.1", False, "v0.0.1"),
        ("", "", False, f"no tag v{__version__}"),
        ("", "", True, ""),
    ],
    ids=["release", "uncommitted", "other tag", "no tag", "tried without"],
)
def test_refused(changes: str, tags: str, untagged: bool, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release is made of a commit that has the version's tag, and of nothing else."""
    monkeypatch.setattr(make_release, "git", lambda verb, *_: {"status": changes, "tag": tags}[verb])
    said = make_release.unfit(untagged)
    assert problem in said
    assert bool(said) is bool(problem)
