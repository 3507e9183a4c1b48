"""docs/grafana-dashboard.json queries series and labels that the daemon has, and its layout is sound."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from fake_status import GPU, SNAPSHOT

from sgpu.node.usage import ContainerUse
from sgpu.observe.counters import Counters, Durations
from sgpu.observe.metrics import families

pytestmark = pytest.mark.static

DASHBOARD: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "docs" / "grafana-dashboard.json").read_text()
)


def _series() -> dict[str, set[str]]:
    """Series → its labels, of a daemon that has something of each."""
    use = ContainerUse("default", "server", "main", shares=1, memory_used=1, utilization=1, processes=1)
    gpu = attrs.evolve(GPU, healthy=False, reason="XID 79", containers=(use,))
    counters = Counters()
    counters.calls["Allocate", "OK"] = Durations()
    counters.nvml_errors["nvmlDeviceGetUUID", "15"] += 1
    counters.guard_actions["GPU-a", "default", "server", "main", "warn"] += 1
    counters.registrations["example.com/gpu", True] += 1
    labels: dict[str, set[str]] = {}
    for family in families(attrs.evolve(SNAPSHOT, gpus=(gpu,)), counters):
        for sample in family.metric().samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


SERIES: Final = _series()
#: What Prometheus adds to each, and what Grafana fills in.
ADDED: Final = {"instance", "job"}
VARIABLES: Final = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
BUILT_IN: Final = {"__rate_interval"}

PANELS: Final = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TABLES: Final = [panel for panel in PANELS if panel["type"] == "table"]
#: What follows from others that are shown.
DERIVED: Final = {"sgpu_rpc_duration_seconds_sum", "sgpu_gpu_memory_free_bytes"}


def queries() -> Iterator[Any]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']} {target['refId']}")
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            series, label = groups(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            yield pytest.param(f"max by ({label}) ({series})", f"{{{{{label}}}}}", id=f"${variable['name']}")


def groups(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    assert match, text
    return match.groups()


@pytest.mark.parametrize(("query", "legend"), list(queries()))
def test_queries(query: str, legend: str) -> None:
    """Query only series that there are, by labels that they have."""
    names = set(re.findall(r"\bsgpu_\w+", query))
    assert names
    assert names <= SERIES.keys()
    labels = ADDED.union(*(SERIES[name] for name in names))
    for name, matchers in re.findall(r"\b(sgpu_\w+)\{(.*?)\}", query):
        assert set(re.findall(r"(\w+) ?(?:=~|!~|!=|=)", matchers)) <= SERIES[name] | ADDED
    for grouped in re.findall(r"\b(?:by|on|group_left|ignoring|without) \((.*?)\)", query):
        assert set(grouped.split(", ")) <= labels
    made = set(re.findall(r'"(\w+)", "/"', query))  # by label_join
    assert set(re.findall(r"{{(\w+)}}", legend)) <= labels | made
    assert set(re.findall(r"\$(\w+)", query)) <= VARIABLES | BUILT_IN


@pytest.mark.parametrize("series", sorted(SERIES.keys() - DERIVED))
def test_series(series: str) -> None:
    """Show each series somewhere."""
    assert any(series in target["expr"] for panel in PANELS for target in panel["targets"])


def test_data_source() -> None:
    """Query only the data source that is chosen, so that the dashboard can be provisioned anywhere."""
    sources = [panel["datasource"] for panel in PANELS]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert "datasource" in VARIABLES
    assert "__inputs" not in DASHBOARD


def test_layout() -> None:
    """Have no two panels in one place, none beyond the edge, and an id and a description for each."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["type"] == "row" or panel["description"]
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


@pytest.mark.parametrize("panel", TABLES, ids=lambda panel: panel["title"])
def test_tables(panel: dict[str, Any]) -> None:
    """Order and name only columns that there are."""
    (organize,) = (step["options"] for step in panel["transformations"] if step["id"] == "organize")
    targets = panel["targets"]
    columns = {"Value"} if len(targets) == 1 else {f"Value #{target['refId']}" for target in targets}
    columns.update(*(groups(r"by \((.*?)\)", target["expr"])[0].split(", ") for target in targets))
    for option in ("excludeByName", "indexByName", "renameByName"):
        assert organize[option].keys() <= columns | {"Time"}
    shown = {organize["renameByName"].get(column, column) for column in columns}
    assert {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]} <= shown
