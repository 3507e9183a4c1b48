"""What is scraped, read back by the parsers of both formats."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from sgpu.metrics import page
from sgpu.record import Record
from sgpu.snapshot import ContainerUse, GpuSnapshot, ResourceSnapshot, Snapshot

RESOURCE = "example.com/gpu"
GIB = 1 << 30
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

WEB = ContainerUse("team", "web", "main", shares=2, memory_used=GIB, utilisation=7, processes=1)
TRAIN = ContainerUse("team", "train", "main", shares=1)
STRAY = ContainerUse("", "", "", shares=0, memory_used=2 * GIB, processes=3)
UP = GpuSnapshot(
    uuid="GPU-a",
    name="Tesla T4",
    pci_bus_id="00000000:3B:00.0",
    resource=RESOURCE,
    healthy=True,
    reason="",
    since=1.5,
    memory_total=16 * GIB,
    memory_used=4 * GIB,
    memory_free=12 * GIB,
    utilisation=30,
    shares=100,
    allocated=3,
    withheld=97,
    containers=(WEB, TRAIN, STRAY),
)
DOWN = attrs.evolve(
    UP,
    uuid="GPU-b",
    healthy=False,
    reason='XID 79: "off the bus"',
    memory_total=None,
    memory_used=None,
    memory_free=None,
    utilisation=None,
    allocated=None,
    withheld=0,
    containers=(),
)
NODE = Snapshot(
    version="0.1.0",
    time=1000.0,
    driver_version="550.54",
    waiting="",
    sampled_at=997.5,
    holders_known=True,
    processes_trouble="",
    resources=(ResourceSnapshot(RESOURCE, registered=True, streams=1),),
    gpus=(UP, DOWN),
)
UNKNOWN = attrs.evolve(NODE, sampled_at=None, gpus=(attrs.evolve(DOWN, healthy=True, reason=""),))


def recorded() -> Record:
    record = Record(lambda: 0.0)
    with record.session(RESOURCE):
        record.attempted(RESOURCE, "one", success=False)
        record.attempted(RESOURCE, "one", success=True)
        record.attempted(RESOURCE, "two", success=True)
    record.called("Allocate", "OK", 0.0009)
    record.called("Allocate", "OK", 0.003)
    record.called("Allocate", "OK", 30.0)
    record.reloaded(usable=False)
    record.nvml_errors["nvmlDeviceGetMemoryInfo", "15"] += 4
    return record


Series = dict[str, float]


def series(snapshot: Snapshot, record: Record, accept: str = "") -> Series:
    """Values by name and labels as people write them, of sgpu's own series."""
    text = page(snapshot, record, accept, "").text.decode()
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


class TestSeries:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("sgpu_build_info{driver_version=550.54,version=0.1.0}", 1),
            ("sgpu_gpu_info{name=Tesla T4,pci_bus_id=00000000:3B:00.0,resource=example.com/gpu,uuid=GPU-a}", 1),
            ("sgpu_gpu_memory_total_bytes{uuid=GPU-a}", 16 * GIB),
            ("sgpu_gpu_memory_used_bytes{uuid=GPU-a}", 4 * GIB),
            ("sgpu_gpu_memory_free_bytes{uuid=GPU-a}", 12 * GIB),
            ("sgpu_gpu_utilization_ratio{uuid=GPU-a}", 0.3),
            ("sgpu_gpu_healthy{uuid=GPU-a}", 1),
            ("sgpu_gpu_healthy{uuid=GPU-b}", 0),
            ('sgpu_gpu_unhealthy_info{reason=XID 79: "off the bus",uuid=GPU-b}', 1),
            ("sgpu_gpu_shares{uuid=GPU-a}", 100),
            ("sgpu_gpu_shares_allocated{uuid=GPU-a}", 3),
            ("sgpu_gpu_shares_withheld{uuid=GPU-a}", 97),
            ("sgpu_container_shares{container=main,namespace=team,pod=web,uuid=GPU-a}", 2),
            ("sgpu_container_memory_used_bytes{container=main,namespace=team,pod=web,uuid=GPU-a}", GIB),
            ("sgpu_container_utilization_ratio{container=main,namespace=team,pod=web,uuid=GPU-a}", 0.07),
            ("sgpu_container_shares{container=,namespace=,pod=,uuid=GPU-a}", 0),
            ("sgpu_container_memory_used_bytes{container=,namespace=,pod=,uuid=GPU-a}", 2 * GIB),
            ("sgpu_registered{resource=example.com/gpu}", 1),
            ("sgpu_registrations_total{resource=example.com/gpu,result=success}", 2),
            ("sgpu_registrations_total{resource=example.com/gpu,result=failure}", 1),
            ("sgpu_kubelet_restarts_total{}", 1),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=0.0005,method=Allocate}", 0),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=0.001,method=Allocate}", 1),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=10.0,method=Allocate}", 2),
            ("sgpu_rpc_duration_seconds_bucket{code=OK,le=+Inf,method=Allocate}", 3),
            ("sgpu_rpc_duration_seconds_count{code=OK,method=Allocate}", 3),
            ("sgpu_rpc_duration_seconds_sum{code=OK,method=Allocate}", 30.0039),
            ("sgpu_sample_age_seconds{}", 2.5),
            ("sgpu_nvml_errors_total{code=15,function=nvmlDeviceGetMemoryInfo}", 4),
            ("sgpu_config_reloads_total{result=success}", 0),
            ("sgpu_config_reloads_total{result=failure}", 1),
        ],
    )
    def test_it_is_there(self, accept: str, name: str, value: float) -> None:
        """In both formats."""
        assert series(NODE, recorded(), accept)[name] == pytest.approx(value)

    def test_what_is_not_known_is_absent(self, accept: str) -> None:
        """Rather than 0, which would be a figure."""
        names = {name.partition("{")[0] for name in series(UNKNOWN, Record(lambda: 0.0), accept)}
        assert not names & {
            "sgpu_gpu_memory_total_bytes",
            "sgpu_gpu_memory_used_bytes",
            "sgpu_gpu_memory_free_bytes",
            "sgpu_gpu_utilization_ratio",
            "sgpu_gpu_shares_allocated",
            "sgpu_gpu_unhealthy_info",
            "sgpu_sample_age_seconds",
        }
        train = "{container=main,namespace=team,pod=train,uuid=GPU-a}"
        found = series(NODE, recorded(), accept)
        assert f"sgpu_container_shares{train}" in found
        assert f"sgpu_container_memory_used_bytes{train}" not in found
        assert f"sgpu_container_utilization_ratio{train}" not in found

    def test_what_is_gone_is_absent(self, accept: str) -> None:
        """A pod that has ended, a GPU that is no longer there."""
        gone = attrs.evolve(NODE, gpus=(attrs.evolve(UP, containers=(WEB,)),))
        text = str(series(gone, recorded(), accept))
        assert "pod=web" in text
        assert "pod=train" not in text
        assert "GPU-b" not in text

    def test_a_sample_from_the_future(self, accept: str) -> None:
        """When somebody set the clock; ages are not negative."""
        assert series(attrs.evolve(NODE, sampled_at=1001.0), recorded(), accept)["sgpu_sample_age_seconds{}"] == 0

    def test_no_label_names_a_share_or_a_process(self, accept: str) -> None:
        """So that there are never more series than containers."""
        text = page(NODE, recorded(), accept, "").text.decode()
        assert "::" not in text
        assert "pid" not in text

    @given(st.text(), st.text())
    def test_any_words(self, reason: str, name: str) -> None:
        """Whatever a driver says, both parsers read it, and read back what it said."""
        odd = attrs.evolve(NODE, gpus=(attrs.evolve(DOWN, reason=reason, name=name),))
        for accepted in ("", OPENMETRICS):
            found = series(odd, recorded(), accepted)
            assert f"sgpu_gpu_unhealthy_info{{reason={reason},uuid=GPU-b}}" in found

    def test_stray_bytes(self) -> None:
        """Of something that was no UTF-8 once: replaced."""
        odd = attrs.evolve(NODE, gpus=(attrs.evolve(DOWN, reason=os.fsdecode(b"/x\xff")),))
        assert "sgpu_gpu_unhealthy_info{reason=/x?,uuid=GPU-b}" in series(odd, recorded())

    def test_the_process(self, accept: str) -> None:
        """Its memory and processor time are there as any process has them."""
        text = page(NODE, recorded(), accept, "").text.decode()
        assert "process_resident_memory_bytes" in text
        assert "process_cpu_seconds_total" in text

    def test_every_value_is_a_number(self, accept: str) -> None:
        """None of them is NaN or infinite."""
        assert all(map(math.isfinite, series(NODE, recorded(), accept).values()))


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
    def test_by_what_is_accepted(self, accept: str, content_type: str) -> None:
        """Prometheus' own, unless it asks for the other."""
        made = page(NODE, recorded(), accept, "")
        assert made.content_type.startswith(content_type)
        assert made.text.endswith(b"# EOF\n") is ("openmetrics" in made.content_type)

    def test_compressed(self) -> None:
        """If it is taken so; the same in it."""
        plain, compressed = (page(NODE, Record(lambda: 0.0), "", encoding) for encoding in ("identity", "gzip, br"))
        assert (plain.encoding, compressed.encoding) == ("", "gzip")

        def own(text: bytes) -> list[bytes]:
            return [line for line in text.splitlines() if not line.startswith(b"process_")]

        assert own(gzip.decompress(compressed.text)) == own(plain.text)
