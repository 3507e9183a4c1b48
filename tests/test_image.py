"""Contents of the image, without building it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sgpu import __version__

pytestmark = pytest.mark.static

ROOT = Path(__file__).parents[1]


def locked() -> dict[Requirement, int]:
    """The entries of the lock, and how many hashes each has."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line.split("#", 1)[0].strip() for line in text.splitlines()]
    return {Requirement(line.split(" --hash")[0]): line.count("--hash=sha256:") for line in lines if line}


def dependencies() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_lock_has_every_dependency_in_a_version_that_is_allowed(python: str) -> None:
    """Otherwise `tox -e lock` is due: the image would have another version, or fail as it starts."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    entries = [entry for entry in locked() if entry.marker is None or entry.marker.evaluate(environment)]
    for dependency in dependencies():
        if dependency.marker is None or dependency.marker.evaluate(environment):
            name = canonicalize_name(dependency.name)
            versions = [str(entry.specifier) for entry in entries if entry.name == name]
            assert len(versions) == 1, dependency
            assert dependency.specifier.contains(versions[0].removeprefix("==")), dependency


def test_lock_has_one_exact_version_and_a_hash_for_each() -> None:
    for entry, hashes in locked().items():
        assert re.fullmatch(r"==[^*,]+", str(entry.specifier)), entry
        assert hashes, entry


def test_label_has_the_version_of_the_package() -> None:
    assert f'org.opencontainers.image.version="{__version__}"' in (ROOT / "Dockerfile").read_text()


def test_bytecode_is_what_is_run() -> None:
    """Python looks for bytecode of the level that it runs at, and compiles anew at each start where there is none."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    (compiled,) = re.findall(r"-m compileall .*-o (\d)", dockerfile)
    assert re.findall(r"PYTHONOPTIMIZE=(\d)", dockerfile) == [compiled]
