"""Scrapes, read back by the parsers of both formats."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterable

import attrs
import pytest
from fake_status import GPU, SNAPSHOT
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from sgpu.lib.sizes import GIB
from sgpu.node.container import StaleAnswer
from sgpu.node.usage import ContainerUse
from sgpu.observe.counters import Counters
from sgpu.observe.metrics import Page, Pages
from sgpu.observe.snapshot import CordonSnapshot, ResourceSnapshot, Snapshot

RESOURCE = "example.com/gpu"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

WEB = ContainerUse(
    "team",
    "web",
    "main",
    shares=2,
    memory_used=GIB,
    utilization=7,
    processes=1,
    memory_limit=3 * GIB,
    limit_state="enforced",
)
TRAIN = ContainerUse("team", "train", "main", shares=1, memory_limit=GIB, limit_state="refused")
STRAY = ContainerUse("", "", "", shares=0, memory_used=2 * GIB, processes=3)
USES = (WEB, TRAIN, STRAY)
CORDON = CordonSnapshot("bad row", 5.0)
UP = attrs.evolve(GPU, uuid="GPU-a", resource=RESOURCE, withheld=97, containers=USES, memory_claimed=GIB, cordon=CORDON)
DOWN = attrs.evolve(
    UP,
    cordon=None,
    uuid="GPU-b",
    healthy=False,
    reason='XID 79: "off the bus"',
    memory_total=None,
    memory_used=None,
    memory_free=None,
    utilization=None,
    allocated=None,
    withheld=0,
    containers=(),
)
NODE = attrs.evolve(
    SNAPSHOT,
    time=1000.0,
    sampled_at=997.5,
    stale_answers=(StaleAnswer("team/web", ("/dev/nvidia1",), ("/dev/nvidia0",)),),
    resources=(ResourceSnapshot(RESOURCE, True, 1, ""), ResourceSnapshot("example.com/none", False, 0)),
    gpus=(UP, DOWN),
)
UNKNOWN = attrs.evolve(NODE, sampled_at=None, stale_answers=None, gpus=(attrs.evolve(DOWN, healthy=True, reason=""),))


def counted() -> Counters:
    counters = Counters(kubelet_restarts=1)
    counters.registrations.update({(RESOURCE, True): 2, (RESOURCE, False): 1, ("example.com/none", False): 3})
    for seconds in (0.0009, 0.003, 30.0):
        counters.called("Allocate", "OK", seconds)
    counters.reloaded(usable=False)
    counters.nvml_errors["nvmlDeviceGetMemoryInfo", "15"] += 4
    counters.guard_actions["GPU-a", "team", "web", "main", "warn"] += 2
    return counters


def series(snapshot: Snapshot, counters: Counters, accept: str = "") -> dict[str, float]:
    """Values by name and labels as people write them, of sgpu's own series."""
    text = page(snapshot, counters, accept, "").text.decode()
    # Neither is the other: what one of them lets pass, the other may refuse.
    parse: Callable[[str], Iterable[Metric]] = parse_openmetrics if "openmetrics" in accept else parse_prometheus
    return {
        f"{sample.name}{{{','.join(f'{name}={value}' for name, value in sorted(sample.labels.items()))}}}": sample.value
        for family in parse(text)
        for sample in family.samples
        if sample.name.startswith("sgpu_")
    }


@pytest.fixture(params=["", OPENMETRICS], ids=["Prometheus", "OpenMetrics"])
def accept(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def page(snapshot: Snapshot, counters: Counters, accept: str, accept_encoding: str) -> Page:
    """The first one that is made."""
    return Pages().page(snapshot, counters, accept, accept_encoding)


class TestSeries:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("sgpu_build_info{driver_version=550.54,version=0.1.0}", 1),
            (
                "sgpu_gpu_info{mig_profile=,name=Tesla T4,parent=,pci_bus_id=00000000:3B:00.0,"
                "resource=example.com/gpu,uuid=GPU-a}",
                1,
            ),
            ("sgpu_gpu_memory_total_bytes{uuid=GPU-a}", 15 * GIB),
            ("sgpu_gpu_memory_used_bytes{uuid=GPU-a}", 7 * GIB),
            ("sgpu_gpu_memory_free_bytes{uuid=GPU-a}", 8 * GIB),
            ("sgpu_gpu_memory_claimed_bytes{uuid=GPU-a}", GIB),
            ("sgpu_gpu_utilization_ratio{uuid=GPU-a}", 0.37),
            ("sgpu_gpu_healthy{uuid=GPU-a}", 1),
            ("sgpu_gpu_healthy{uuid=GPU-b}", 0),
            ('sgpu_gpu_unhealthy_info{reason=XID 79: "off the bus",uuid=GPU-b}', 1),
            ("sgpu_gpu_shares{uuid=GPU-a}", 100),
            ("sgpu_gpu_shares_allocated{uuid=GPU-a}", 3),
            ("sgpu_gpu_shares_withheld{uuid=GPU-a}", 97),
            ("sgpu_gpu_cordoned{uuid=GPU-a}", 1),
            ("sgpu_gpu_cordoned{uuid=GPU-b}", 0),
            ("sgpu_container_shares{container=main,namespace=team,pod=web,uuid=GPU-a}", 2),
            ("sgpu_container_memory_used_bytes{container=main,namespace=team,pod=web,uuid=GPU-a}", GIB),
            ("sgpu_container_memory_limit_bytes{container=main,namespace=team,pod=web,uuid=GPU-a}", 3 * GIB),
            ("sgpu_container_memory_limit_enforced{container=main,namespace=team,pod=web,uuid=GPU-a}", 1),
            ("sgpu_container_memory_limit_bytes{container=main,namespace=team,pod=train,uuid=GPU-a}", GIB),
            ("sgpu_container_memory_limit_enforced{container=main,namespace=team,pod=train,uuid=GPU-a}", 0),
            ("sgpu_container_utilization_ratio{container=main,namespace=team,pod=web,uuid=GPU-a}", 0.07),
            ("sgpu_container_shares{container=,namespace=,pod=,uuid=GPU-a}", 0),
            ("sgpu_container_memory_used_bytes{container=,namespace=,pod=,uuid=GPU-a}", 2 * GIB),
            ("sgpu_registered{resource=example.com/gpu}", 1),
            ("sgpu_registered{resource=example.com/none}", 0),
            ("sgpu_published{resource=example.com/gpu}", 1),
            ("sgpu_registrations_total{resource=example.com/gpu,result=success}", 2),
            ("sgpu_registrations_total{resource=example.com/gpu,result=failure}", 1),
            ("sgpu_registrations_total{resource=example.com/none,result=success}", 0),
            ("sgpu_kubelet_restarts_total{}", 1),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=0.0005,method=Allocate}", 0),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=0.001,method=Allocate}", 1),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=10.0,method=Allocate}", 2),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=+Inf,method=Allocate}", 3),
            ("sgpu_rpc_duration_seconds_count{code=OK,method=Allocate}", 3),
            ("sgpu_rpc_duration_seconds_sum{code=OK,method=Allocate}", 30.0039),
            ("sgpu_stale_answers{}", 1),
            ("sgpu_sample_age_seconds{}", 2.5),
            ("sgpu_nvml_errors_total{code=15,function=nvmlDeviceGetMemoryInfo}", 4),
            ("sgpu_guard_actions_total{action=warn,container=main,namespace=team,pod=web,uuid=GPU-a}", 2),
            ("sgpu_config_reloads_total{result=success}", 0),
            ("sgpu_config_reloads_total{result=failure}", 1),
        ],
    )
    def test_present(self, accept: str, name: str, value: float) -> None:
        """Show what is known, in both formats."""
        assert series(NODE, counted(), accept)[name] == pytest.approx(value)

    def test_unknown(self, accept: str) -> None:
        """Leave out what is unknown, instead of 0, which would be a figure; and no value is NaN or infinite."""
        names = {name.partition("{")[0] for name in series(UNKNOWN, Counters(), accept)}
        assert not names & {
            "sgpu_gpu_memory_total_bytes",
            "sgpu_gpu_memory_used_bytes",
            "sgpu_gpu_memory_free_bytes",
            "sgpu_gpu_utilization_ratio",
            "sgpu_gpu_shares_allocated",
            "sgpu_gpu_unhealthy_info",
            "sgpu_sample_age_seconds",
            "sgpu_stale_answers",
        }
        found = series(NODE, counted(), accept)
        train = {name.partition("{")[0] for name in found if "pod=train" in name}
        limit = {"sgpu_container_memory_limit_bytes", "sgpu_container_memory_limit_enforced"}
        assert train == {"sgpu_container_shares", *limit}
        assert not limit & {name.partition("{")[0] for name in found if "pod=," in name}
        assert all(map(math.isfinite, found.values()))

    def test_the_clock_was_set(self) -> None:
        """Show no negative age."""
        assert series(attrs.evolve(NODE, sampled_at=1001.0), counted())["sgpu_sample_age_seconds{}"] == 0

    def test_labels(self) -> None:
        """Have no label for a share or a process, so that there are never more series than containers."""
        text = page(NODE, counted(), "", "").text.decode()
        assert "::" not in text
        assert "pid" not in text

    @given(st.text(), st.text())
    def test_any_text(self, reason: str, name: str) -> None:
        """Escape what a driver says, so that both parsers read it back."""
        odd = attrs.evolve(NODE, gpus=(attrs.evolve(DOWN, reason=reason, name=name),))
        for accepted in ("", OPENMETRICS):
            assert f"sgpu_gpu_unhealthy_info{{reason={reason},uuid=GPU-b}}" in series(odd, counted(), accepted)

    def test_stray_bytes(self) -> None:
        """Replace bytes that were no UTF-8."""
        odd = attrs.evolve(NODE, gpus=(attrs.evolve(DOWN, reason=os.fsdecode(b"/x\xff")),))
        assert "sgpu_gpu_unhealthy_info{reason=/x?,uuid=GPU-b}" in series(odd, counted())

    def test_the_process(self) -> None:
        """Show the memory and the processor time of the process, as any process does."""
        text = page(NODE, counted(), "", "").text.decode()
        assert "process_resident_memory_bytes" in text
        assert "process_cpu_seconds_total" in text


def own(text: bytes) -> list[bytes]:
    """The lines that do not change by themselves."""
    return [line for line in text.splitlines() if not line.startswith(b"process_")]


class TestFormat:
    @pytest.mark.parametrize(
        ("accept", "content_type"),
        [
            ("", "text/plain; version=0.0.4; charset=utf-8"),
            ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
            (OPENMETRICS, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ("application/openmetrics-text;version=rubbish", "text/plain; version=0.0.4; charset=utf-8"),
        ],
        ids=["nothing", "anything", "OpenMetrics", "rubbish"],
    )
    def test_accept(self, accept: str, content_type: str) -> None:
        """Use Prometheus' own format, unless the other is asked for."""
        made = page(NODE, counted(), accept, "")
        assert made.content_type.startswith(content_type)
        assert made.text.endswith(b"# EOF\n") is ("openmetrics" in made.content_type)

    def test_compression(self) -> None:
        """Compress the same text where that is accepted."""
        plain, compressed = (page(NODE, Counters(), "", encoding) for encoding in ("identity", "gzip, br"))
        assert (plain.encoding, compressed.encoding) == ("", "gzip")

        assert own(gzip.decompress(compressed.text)) == own(plain.text)

    def test_the_next_page(self) -> None:
        """Make of what was kept what would be made anew, whatever has changed since."""
        pages = Pages()
        less = attrs.evolve(UP, containers=(WEB, attrs.evolve(TRAIN, shares=2)))
        for gpus in ((UP, DOWN), (UP, DOWN), (less, DOWN), ()):
            snapshot = attrs.evolve(NODE, gpus=gpus)
            for wanted in (OPENMETRICS, OPENMETRICS, ""):
                text = pages.page(snapshot, counted(), wanted, "").text
                assert own(text) == own(page(snapshot, counted(), wanted, "").text)


def test_instance(accept: str) -> None:
    """A MIG instance has the series of a GPU, with its GPU and its profile in the information."""
    instance = attrs.evolve(UP, uuid="MIG-a", parent="GPU-p", mig_profile="1g.5gb", utilization=None)
    found = series(attrs.evolve(NODE, gpus=(instance,)), Counters(), accept)
    assert any("parent=GPU-p" in name and "mig_profile=1g.5gb" in name and "uuid=MIG-a" in name for name in found)
    assert found["sgpu_container_memory_used_bytes{container=main,namespace=team,pod=web,uuid=MIG-a}"] == GIB
    assert "sgpu_gpu_utilization_ratio{uuid=MIG-a}" not in found
