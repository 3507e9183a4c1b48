"""The benchmark runs. What it measures is not checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

TESTS = Path(__file__).parent
MEASURE = TESTS.parent / "bench" / "measure.py"
#: sgpu once more, as anyone's plugin.
OTHER = (
    f"{sys.executable} -m sgpu -plugin-directory {{plugins}} -host-path {{host}} -dev-directory {{dev}} "
    "-gpu-duplication-factor {shares} -resource-name nvidia.com/gpu -state-file= -metrics-address= -status-socket="
)


@pytest.mark.parametrize("part", ["starts", "calls", "rest", "memory", "words", "crowd", "in-process"])
def test_every_figure_is_measured_side_by_side(part: str, tmp_path: Path) -> None:
    """Measure sgpu, the reference where it has such a thing, and at starts another plugin by its command line."""
    written = tmp_path / "figures.json"
    twin = ("--other", OTHER, "--other-name", "twin") if part == "starts" else ()
    done = subprocess.run(
        [sys.executable, str(MEASURE), part, "--glance", "--json", str(written), *twin],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    document = json.loads(written.read_text())
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert len(figures) == len(document["figures"]) == done.stdout.count("\n| ") - 1
    assert all(figure["values"]["sgpu"] > 0 for figure in figures.values())
    if twin:
        for name in ("start → 400 shares listed, median", "`kubelet.sock` created → listed again, median"):
            assert all(figures[name]["ratios"][other] > 0 for other in ("grpcio", "twin"))
    if part == "calls":
        assert figures["`Allocate`, 400 shares, median"]["ratios"]["grpcio"] > 0
