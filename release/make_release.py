"""Make the files of a release in dist/: sdist, wheel, `kubectl sgpu` for krew, a bill of materials, and checksums.

The same commit gives the same bytes, as long as Python is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import krew
import yaml

from sgpu import __version__

ROOT: Final = Path(__file__).parents[1]
DIST: Final = ROOT / "dist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="where the files will be published: makes sgpu.yaml, the manifest for krew")
    parser.add_argument("--untagged", action="store_true", help="to try it: the commit need not have the version's tag")
    options = parser.parse_args()
    if problem := unfit(options.untagged):
        sys.exit(f"make_release: {problem}")
    moment = os.environ.setdefault("SOURCE_DATE_EPOCH", git("log", "-1", "--format=%ct"))  # hatchling's, too
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        archive = DIST / f"kubectl-sgpu-{__version__}.tar.gz"
        krew.install(krew.client_requirements((ROOT / "requirements.lock").read_text()), scratch / "client")
        krew.pack(scratch / "client", archive, int(moment))
        write_bill(scratch / "image", DIST / f"sgpu-{__version__}.cdx.json")
    if options.address:
        manifest = krew.manifest(archive, __version__, options.address)
        (DIST / "sgpu.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    else:
        print("no sgpu.yaml for krew: --address says where the archive will be")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(DIST.iterdir())]
    (DIST / "SHA256SUMS").write_text("".join(sums))
    print("".join(sums), end="")


def unfit(untagged: bool) -> str:
    """Return why this checkout is not that of a release; empty if it is."""
    if changes := git("status", "--porcelain"):
        return f"there are changes that are not committed:\n{changes}"
    tags = git("tag", "--points-at", "HEAD").split()
    if f"v{__version__}" not in tags and not untagged:
        return f"this commit has no tag v{__version__} (tags: {', '.join(tags) or 'none'}); --untagged goes on without"
    return ""


def write_bill(environment: Path, path: Path) -> None:
    """Write the bill of materials of the image's Python packages, from an environment with what the lock has.

    The lock alone would tell neither licenses nor what needs what.
    """
    python = environment / "bin/python"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--root-user-action=ignore"),
        *("--no-compile", "--only-binary=:all:", "--require-hashes", "--requirement", ROOT / "requirements.lock"),
    )
    # It reads the version of sgpu in pyproject.toml alone, and ours is in the code.
    project = environment.with_suffix(".toml")
    text = (ROOT / "pyproject.toml").read_text()
    project.write_text(text.replace('dynamic = ["version"]', f'version = "{__version__}"'))
    run(
        *(sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", project, "--mc-type=application"),
        *("--output-reproducible", "--validate", "--output-file", path, python),
    )


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def git(*arguments: str) -> str:
    return subprocess.run(("git", "-C", ROOT, *arguments), check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


if __name__ == "__main__":
    main()
