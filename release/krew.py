"""`kubectl sgpu` for krew: an archive with all that it imports, and the manifest that tells krew where it is.

One archive serves Linux and macOS on any processor, because none of what it has is compiled.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parents[1]
#: What pip writes beside the packages, for itself or for their own commands.
LEFT_OUT: Final = ("__pycache__", "bin", "RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
#: How macOS answers the markers of a lock. On Linux they bring the daemon's dependencies, too.
MACOS: Final = {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"}


def client_requirements(lock: str) -> Iterator[str]:
    """Yield the entries of the lock, with their hashes, that `kubectl sgpu` needs."""
    for line in lock.replace("\\\n", " ").splitlines():
        entry, *hashes = line.partition("#")[0].split(" --hash=")
        if entry.strip():
            requirement = Requirement(entry)
            if requirement.marker is None or requirement.marker.evaluate(MACOS):
                yield " --hash=".join((f"{requirement.name}{requirement.specifier}", *map(str.strip, hashes)))


def install(requirements: Iterable[str], directory: Path) -> None:
    """Install the requirements into a directory; fail for one that is compiled, or is not what the lock has."""
    listed = directory.with_suffix(".txt")
    listed.write_text("\n".join(requirements))
    # For the oldest Python, without an ABI: such a wheel runs on any.
    anywhere = ["--platform=any", "--implementation=py", "--abi=none", "--python-version=3.11", "--only-binary=:all:"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", "--no-deps", "--no-compile"]
    to = [f"--target={directory}", "--require-hashes", f"--requirement={listed}"]
    subprocess.run([*pip, *anywhere, *to], check=True)


def pack(libraries: Path, archive: Path, moment: int) -> None:
    """Write the archive: the command, sgpu, and the libraries, as if all were made at that moment."""
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=moment) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        _add(tar, "kubectl-sgpu", ROOT / "release/kubectl_sgpu.py", 0o755, moment)
        _add(tar, "LICENSE", ROOT / "LICENSE", 0o644, moment)
        for base, directory in ((ROOT / "src", ROOT / "src/sgpu"), (libraries, libraries)):
            for path in sorted(directory.rglob("*")):
                name = path.relative_to(base)
                if path.is_file() and not {*name.parts} & {*LEFT_OUT}:
                    _add(tar, f"lib/{name}", path, 0o644, moment)


def _add(tar: tarfile.TarFile, name: str, path: Path, mode: int, moment: int) -> None:
    content = path.read_bytes()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(content), mode, moment
    tar.addfile(entry, io.BytesIO(content))


def manifest(archive: Path, version: str, address: str) -> Mapping[str, Any]:
    """Return krew's manifest of an archive that is published at this address."""
    platforms = {"key": "os", "operator": "In", "values": ["darwin", "linux"]}
    return {
        "apiVersion": "krew.googlecontainertools.github.com/v1alpha2",
        "kind": "Plugin",
        "metadata": {"name": "sgpu"},
        "spec": {
            "version": f"v{version}",
            "shortDescription": "Show shared GPUs and the pods that use them",
            "description": (
                "Shows the GPUs of all nodes that sgpu shares, and the pods that use them: what is allocated beside\n"
                "what is used, unhealthy GPUs, and where there is room.\n"
            ),
            "caveats": "Needs Python 3.11 or later in PATH, and rights to list sgpu's pods and to get pods/proxy.\n",
            "platforms": [
                {
                    "selector": {"matchExpressions": [platforms]},
                    "uri": f"{address.rstrip('/')}/{archive.name}",
                    "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
                    "bin": "kubectl-sgpu",
                }
            ],
        },
    }
