"""The ways in which a file gets new content on a node."""

from __future__ import annotations

import time
from pathlib import Path


def rewrite(file: Path, content: str) -> None:
    file.write_text(content)


def rename(file: Path, content: str) -> None:
    new = file.with_name(".new")
    new.write_text(content)
    new.replace(file)


def remove_and_write(file: Path, content: str) -> None:
    file.unlink()
    file.write_text(content)


def link_elsewhere(file: Path, content: str) -> None:
    """As some tools deploy: the name is a link to a version."""
    target = file.parent / "versions"
    target.mkdir(exist_ok=True)
    version = target / str(time.monotonic_ns())
    version.write_text(content)
    link = file.with_name(".link")
    link.symlink_to(version)
    link.replace(file)


def config_map(file: Path, content: str) -> None:
    """As the kubelet updates a volume: the file is a link through `..data`, a link to a directory, which is swapped."""
    directory = file.parent
    data, old = directory / "..data", (directory / "..data").resolve()
    new = directory / f"..{time.monotonic_ns()}"
    new.mkdir()
    (new / file.name).write_text(content)
    (directory / "..data_tmp").symlink_to(new.name)
    (directory / "..data_tmp").replace(data)
    if not file.is_symlink():
        file.unlink()
        file.symlink_to(f"..data/{file.name}")
    elif old != new:
        (old / file.name).unlink()
        old.rmdir()


WAYS = (rewrite, rename, remove_and_write, link_elsewhere, config_map)
