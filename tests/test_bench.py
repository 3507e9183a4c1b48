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


def test_every_figure_is_measured_side_by_side(tmp_path: Path) -> None:
    """Measure sgpu, the reference where it has such a thing, and another plugin by its command line."""
    written = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(MEASURE), "--glance", "--json", str(written), "--other", OTHER, "--other-name", "twin"],
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
    for name in ("start → 400 shares listed, median", "`Allocate`, 400 shares, median", "anonymous memory at rest"):
        assert figures[name]["ratios"].keys() == {"grpcio", "twin"}
        assert all(ratio > 0 for ratio in figures[name]["ratios"].values())
    for name in ("`kubelet.sock` created → listed again, median", "critical XID → unhealthy in the kubelet, worst"):
        assert figures[name]["values"].keys() == {"sgpu", "twin"}
