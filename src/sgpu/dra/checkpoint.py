"""The claims that are prepared, on disk: they outlive a restart of sgpu, and not a reboot, which ends all containers.

Reading and writing block as files do.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from sgpu.lib.files import make_private_directory, read_regular_file, write_private_file
from sgpu.node.claims import ClaimedUnit, Pod, PreparedClaim
from sgpu.node.shares import Share

logger = logging.getLogger(__name__)

VERSION: Final = 1
NAME: Final = "claims.json"
#: A file that can't be used is set aside under this name, for whoever wants to know.
ASIDE: Final = ".unusable"


def load(directory: Path, boot_id: str) -> Mapping[str, PreparedClaim] | None:
    """Return the claims that were prepared in this boot, by uid; None where the file can't be used: it is set aside."""
    try:
        return read(directory, boot_id)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _set_aside(directory / NAME, error)
        return None


def read(directory: Path, boot_id: str) -> Mapping[str, PreparedClaim]:
    """Return the same, and change nothing. Raises OSError, or ValueError where the file can't be used."""
    try:
        content = json.loads(read_regular_file(directory / NAME))
        version = content["version"]
        if version != VERSION:
            raise ValueError(f"it is of version {version}, and this sgpu knows version {VERSION}")
        if content["boot_id"] != boot_id:
            return {}
        claims = [_claim(each) for each in content["claims"]]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return {claim.uid: claim for claim in claims}


def save(directory: Path, boot_id: str, claims: Iterable[PreparedClaim]) -> None:
    """Write them in one step. Raises OSError."""
    make_private_directory(directory)
    content = {"version": VERSION, "boot_id": boot_id, "claims": [_fields(claim) for claim in claims]}
    write_private_file(directory / NAME, json.dumps(content).encode(), durable=True)


def _fields(claim: PreparedClaim) -> dict[str, Any]:
    units = [attrs.asdict(unit, recurse=False) for unit in claim.units]
    return {**attrs.asdict(claim, recurse=False), "units": units}


def _claim(fields: Mapping[str, Any]) -> PreparedClaim:
    """Return a claim. Fields that only a later sgpu knows raise TypeError."""
    pods = tuple(Pod(*map(str, pod)) for pod in fields["pods"])
    units = tuple(
        ClaimedUnit(**{**unit, "shares": tuple(Share(str(uuid), int(number)) for uuid, number in unit["shares"])})
        for unit in fields["units"]
    )
    return PreparedClaim(**{**fields, "pods": pods, "units": units})


def _set_aside(path: Path, error: Exception) -> None:
    kept = path.with_name(path.name + ASIDE)
    try:
        os.replace(path, kept)
        where = f"it is kept as {kept}"
    except OSError as problem:
        where = f"and it can't be set aside: {problem}"
    logger.warning(
        "cannot use %s: %s; %s. Claims that it names are not counted until their pods start again", path, error, where
    )
