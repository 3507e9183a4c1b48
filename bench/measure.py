"""Measure sgpu beside other plugins, as an operator pays for it, and print a table: `tox -e bench`.

Each plugin is a process of its own, between the stub driver and the tests' kubelet on grpcio; they are asked in turn,
so that what else the machine does hits all of them. docs/performance.md says what to make of the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import calls
import crowded
import image
import rest
import words
from calls import Extent
from plugins import BARE, Plugin, Running, Size, other, running, sgpu
from table import Figure, document, heading, row, side_by_side

STANDARD: Final = Size(4, 100)
LARGE: Final = Size(16, 100)
HUGE: Final = Size(16, 1000)
#: A look at each figure, in a few seconds: to see that all of it works, not what it is.
GLANCE: Final = Extent(starts=1, restarts=1, rounds=1, calls=5, lists=1, rest=1.0)
#: Seconds until whatever a start has left to do is done, and a part of an hour's work in a glance.
SETTLE: Final = 10.0
GLANCE_HOUR: Final = 0.01


@contextmanager
def all_running(plugins: Sequence[Plugin], size: Size) -> Iterator[Sequence[Running]]:
    """All of them on nodes of their own, with their devices listed."""
    with ExitStack() as stack:
        runs = [stack.enter_context(running(plugin, size)) for plugin in plugins]
        for run in runs:
            run.wait_listed()
        yield runs


def start(plugins: Sequence[Plugin], extent: Extent) -> Iterator[Figure]:
    yield from calls.starts(plugins, STANDARD, extent)
    with all_running(plugins, STANDARD) as runs:
        yield from calls.restarts(runs, extent)


def call(plugins: Sequence[Plugin], extent: Extent) -> Iterator[Figure]:
    for size in (STANDARD, LARGE) if extent is GLANCE else (STANDARD, LARGE, HUGE):
        with all_running(plugins, size) as runs:
            yield from calls.calls(runs, extent)
            if size is LARGE:
                yield from calls.faults(runs)
    if extent is not GLANCE:
        yield from side_by_side([list(_memory(plugin, HUGE)) for plugin in plugins])


def _memory(plugin: Plugin, size: Size) -> Iterator[Figure]:
    with running(plugin, size) as run:
        run.wait_listed()
        yield from rest.memory(run, f"with {size}")


def rested(plugins: Sequence[Plugin], extent: Extent) -> Iterator[Figure]:
    # One after the other, because they would share the interpreter's memory.
    yield from side_by_side([list(_rested(plugin, extent)) for plugin in plugins])


def _rested(plugin: Plugin, extent: Extent) -> Iterator[Figure]:
    glance = extent is GLANCE
    with running(plugin, STANDARD) as run:
        run.wait_listed()
        rest.settle(run, 0 if glance else SETTLE)
        yield from rest.at_rest(run, "at rest", extent.rest)
        rest.hour(run, GLANCE_HOUR if glance else 1.0)
        yield from rest.at_rest(run, "after an hour's work", extent.rest)


def crowd(_: Sequence[Plugin], extent: Extent) -> Iterator[Figure]:
    glance = extent is GLANCE
    yield from crowded.churn(LARGE if glance else HUGE, extent.calls)
    calls = 1 if glance else 40 * extent.calls
    yield from crowded.scrapes(STANDARD if glance else LARGE, max(1, extent.calls // 5), calls)


def memory(_: Sequence[Plugin], extent: Extent) -> Iterator[Figure]:
    glance = extent is GLANCE
    yield from image.memory(STANDARD, LARGE if glance else HUGE, 0 if glance else SETTLE)


def answered(_: Sequence[Plugin], extent: Extent) -> Iterator[Figure]:
    yield from words.answers(extent.starts)


def in_process(_: Sequence[Plugin], extent: Extent) -> Iterator[Figure]:
    # A process of its own: this one has threads, and gRPC's C library.
    command = [sys.executable, str(Path(__file__).with_name("in_process.py")), *(["1"] if extent is GLANCE else [])]
    measured = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    yield from (Figure(**figure) for figure in json.loads(measured))


Part = Callable[[Sequence[Plugin], Extent], Iterator[Figure]]
PARTS: Final[dict[str, Part]] = {
    "starts": start,
    "calls": call,
    "rest": rested,
    "memory": memory,
    "words": answered,
    "crowd": crowd,
    "in-process": in_process,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"what to measure, of {', '.join(PARTS)}; all of it by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--other",
        metavar="COMMAND",
        help="another plugin's command line, with {plugins} for the kubelet's directory and {host} for one that has "
        "libnvidia-ml.so.1 in lib64 (which is also in LD_LIBRARY_PATH); {dev}, {gpus} and {shares} are known too",
    )
    parser.add_argument("--other-resource", default="nvidia.com/gpu", metavar="NAME", help="what it registers")
    parser.add_argument("--other-name", default="other", metavar="NAME", help="its name in the table")
    parser.add_argument(
        "--glance", action="store_true", help="everything once, and nothing large: to see that it works"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled once, not at each start
    if unknown := set(options.parts) - PARTS.keys():
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    plugins = [sgpu(), BARE]
    if options.other:
        plugins.append(other(options.other, options.other_resource, options.other_name))
    names = [plugin.name for plugin in plugins]
    figures = []
    print(heading(names))
    for part in options.parts or PARTS:
        for figure in PARTS[part](plugins, GLANCE if options.glance else Extent()):
            figures.append(figure)
            print(row(figure, names), flush=True)
    if options.json:
        options.json.write_text(json.dumps(document(figures, names), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
