"""A feature file, from which Node Feature Discovery labels the node. Knows nothing of the API server.

NFD reads the directory once a minute. It ignores names that begin with a dot, and what has expired.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import trio

from sgpu.lib.files import write_public_file
from sgpu.lib.limits import explain
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread

logger = logging.getLogger(__name__)

NAME: Final = "sgpu"
#: Seconds between looks at what the labels should be.
INTERVAL: Final = 5.0
#: Seconds after which NFD ignores the file, should nobody be left to remove it.
LIFETIME: Final = 3600.0
#: Seconds after which it is written again.
RENEWAL: Final = LIFETIME / 4
REMEDY: Final = (
    "mount the host's directory there, as k8s/components/node-labels does; without it, the node has no such labels"
)


async def keep_feature_file(directory: Path, labels: Callable[[], Mapping[str, str]], in_place: trio.Event) -> NoReturn:
    """Write the labels into a file in the directory, as long as this daemon serves, and remove it at the end.

    One that is left by an earlier daemon stays until there are labels.
    """
    await in_place.wait()
    path = directory / NAME
    problem = OnChange(logger, logging.WARNING)
    written: Mapping[str, str] = {}
    renewal = trio.current_time()
    try:
        while True:
            wanted = labels()
            if wanted != written or (wanted and trio.current_time() >= renewal):
                try:
                    await run_in_thread(_write, path, wanted)
                    written, renewal = wanted, trio.current_time() + RENEWAL
                    problem.clear()
                except OSError as error:
                    problem.report(f"cannot write {path}: {explain(error, REMEDY)}")
            await trio.sleep(INTERVAL)
    finally:
        if written:
            with suppress(OSError):
                path.unlink()


def _write(path: Path, labels: Mapping[str, str]) -> None:
    if labels:
        write_public_file(path, content(labels, time.time() + LIFETIME).encode())
    else:
        path.unlink(missing_ok=True)


def content(labels: Mapping[str, str], expiry: float) -> str:
    """Return the text of a feature file that holds until `expiry`, in seconds since the epoch."""
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expiry))
    return f"# +expiry-time={until}\n" + "".join(f"{name}={value}\n" for name, value in labels.items())
