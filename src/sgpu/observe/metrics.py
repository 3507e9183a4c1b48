"""A snapshot and a record → what Prometheus scrapes. The only module that knows prometheus_client.

Imported when the first one scrapes: it takes some 0.8 MB. Takes values and may be called in a thread. What is not known
has no sample; labels are names of few things (a GPU, a container, a method), never of a share or a process.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

import attrs

from sgpu.lib.postpone import postponed
from sgpu.node.cgroup_limit import LimitState
from sgpu.observe.counters import BUCKETS, Counters
from sgpu.observe.snapshot import Snapshot

#: prometheus_client's own servers and clients, which nobody uses here: 2 MB.
UNUSED: Final = {
    "http.server": ("BaseHTTPRequestHandler",),
    "urllib.request": (
        *("BaseHandler", "HTTPHandler", "HTTPRedirectHandler", "HTTPSHandler", "Request"),
        "build_opener",
    ),
    "wsgiref.simple_server": ("WSGIRequestHandler", "WSGIServer", "make_server"),
    "prometheus_client.asgi": ("make_asgi_app",),
    "prometheus_client.gc_collector": ("GC_COLLECTOR", "GCCollector"),
    "prometheus_client.platform_collector": ("PLATFORM_COLLECTOR", "PlatformCollector"),
    "prometheus_client.metrics": (
        *("Counter", "Enum", "Gauge", "Histogram", "Info", "Summary"),
        *("disable_created_metrics", "enable_created_metrics"),
    ),
}

with postponed(UNUSED):
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder, gzip_accepted
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector

#: Of gzip. More makes it hardly smaller.
COMPRESSION: Final = 1
#: Ends a page of OpenMetrics.
END: Final = b"# EOF\n"
RESULTS: Final = {True: "success", False: "failure"}
CONTAINER: Final = ("uuid", "namespace", "pod", "container")
#: As Prometheus writes them in `le`.
BOUNDS: Final = (*(str(bound) for bound in BUCKETS), "+Inf")

Encoder = Callable[[Collector], bytes]
Labels = Sequence[str]
Sample = tuple[Labels, tuple[Any, ...]]
Samples = Iterable[tuple[Labels, float | None]]


@attrs.frozen
class Page:
    """The response to a scrape: the text, its content type, and its encoding (empty: none)."""

    text: bytes
    content_type: str
    encoding: str


class Pages:
    """Makes the pages, one at a time. Keeps the text of each family, and the line of each sample of a gauge: what is as
    before is not written again.
    """

    def __init__(self) -> None:
        self._content_type = ""
        self._written: dict[str, tuple[Family, bytes]] = {}
        self._lines: dict[str, Mapping[Sample, bytes]] = {}

    def page(self, snapshot: Snapshot, counters: Counters, accept: str, accept_encoding: str) -> Page:
        """Return the page as the request's headers ask for it: OpenMetrics or Prometheus' format, compressed or not."""
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # a version that is none
            encode, content_type = choose_encoder("")
        if content_type != self._content_type:
            self._content_type, self._written, self._lines = content_type, {}, {}
        for family in families(snapshot, counters):
            if self._written.get(family.name, ())[:1] != (family,):
                self._written[family.name] = (family, self._write(family, encode))
        process = encode(_Metrics(ProcessCollector(registry=CollectorRegistry()).collect()))
        text = b"".join((*(text for _, text in self._written.values()), process))
        if gzip_accepted(accept_encoding):
            return Page(gzip.compress(text, COMPRESSION, mtime=0), content_type, "gzip")
        return Page(text, content_type, "")

    def _write(self, family: Family, encode: Encoder) -> bytes:
        if family.kind is not GaugeMetricFamily:
            return family.text(encode)
        known = self._lines.get(family.name, {})
        new = [sample for sample in family.samples if sample not in known]
        *lines, end = attrs.evolve(family, samples=new).text(encode).split(b"\n")
        first = len(lines) - len(new)
        known = {**known, **dict(zip(new, lines[first:], strict=True))}
        self._lines[family.name] = {sample: known[sample] for sample in family.samples}
        return b"\n".join((*lines[:first], *self._lines[family.name].values(), end))


class _Metrics(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


@attrs.frozen
class Family:
    """All series of one name. A sample is the labels' values, and what else `add_metric` of its kind takes."""

    kind: Any
    name: str
    meaning: str
    labels: Labels
    samples: Sequence[Sample]

    def metric(self) -> Metric:
        """Return the family as prometheus_client has it."""
        metric = self.kind(self.name, self.meaning, labels=self.labels)
        for labels, value in self.samples:
            metric.add_metric([_utf8(label) for label in labels], *value)
        assert isinstance(metric, Metric)
        return metric

    def text(self, encode: Encoder) -> bytes:
        """Return the family's part of a page."""
        return encode(_Metrics([self.metric()])).removesuffix(END)


def families(snapshot: Snapshot, counters: Counters) -> Iterator[Family]:
    """Yield all of them, except those of the process. The node's are the serving daemon's, not the standby's."""
    if snapshot.standby:
        snapshot = attrs.evolve(snapshot, gpus=(), resources=())
    yield from _of_gpus(snapshot)
    yield from _of_containers(snapshot)
    yield from _of_daemon(snapshot, counters)


def _of_gpus(snapshot: Snapshot) -> Iterator[Family]:
    gpus = snapshot.gpus
    yield _info(
        "sgpu_gpu",
        "A GPU of the node, or a MIG instance; parent is the UUID of its GPU.",
        ("uuid", "name", "pci_bus_id", "resource", "parent", "mig_profile"),
        [(gpu.uuid, gpu.name, gpu.pci_bus_id, gpu.resource, gpu.parent, gpu.mig_profile) for gpu in gpus],
    )
    yield _info(
        "sgpu_gpu_unhealthy",
        "Why a GPU is down.",
        ("uuid", "reason"),
        [(gpu.uuid, gpu.reason) for gpu in gpus if not gpu.healthy],
    )
    per_gpu: tuple[tuple[str, str, list[float | None]], ...] = (
        ("healthy", "Whether a GPU is healthy (1) or down (0).", [gpu.healthy for gpu in gpus]),
        ("memory_total_bytes", "Memory of a GPU.", [gpu.memory_total for gpu in gpus]),
        (
            "memory_used_bytes",
            "Memory that is used, by containers and by the driver.",
            [gpu.memory_used for gpu in gpus],
        ),
        ("memory_free_bytes", "Memory that is free.", [gpu.memory_free for gpu in gpus]),
        ("memory_claimed_bytes", "Memory that claims take (DRA).", [gpu.memory_claimed for gpu in gpus]),
        ("utilization_ratio", "Part of the time that a GPU was busy.", [_ratio(gpu.utilization) for gpu in gpus]),
        ("shares", "Shares that a GPU is offered as.", [gpu.shares for gpu in gpus]),
        ("shares_allocated", "Shares that containers have.", [gpu.allocated for gpu in gpus]),
        (
            "shares_withheld",
            "Free shares that are not given away, for want of memory or because of a cordon.",
            [gpu.withheld for gpu in gpus],
        ),
        ("cordoned", "Whether an operator has cordoned a GPU (1).", [gpu.cordon is not None for gpu in gpus]),
    )
    for name, meaning, values in per_gpu:
        yield _gauge(
            f"sgpu_gpu_{name}",
            meaning,
            ["uuid"],
            (((gpu.uuid,), value) for gpu, value in zip(gpus, values, strict=True)),
        )


def _of_containers(snapshot: Snapshot) -> Iterator[Family]:
    uses = [((gpu.uuid, use.namespace, use.pod, use.container), use) for gpu in snapshot.gpus for use in gpu.containers]
    yield _gauge(
        "sgpu_container_shares",
        "Shares of a GPU that a container has.",
        CONTAINER,
        ((names, use.shares) for names, use in uses),
    )
    yield _gauge(
        "sgpu_container_memory_used_bytes",
        "Memory of a GPU that a container's processes use; those of no pod are together under empty names.",
        CONTAINER,
        ((names, use.memory_used) for names, use in uses),
    )
    yield _gauge(
        "sgpu_container_memory_limit_bytes",
        "Memory of a GPU that a container may use, where there are limits.",
        CONTAINER,
        ((names, use.memory_limit) for names, use in uses),
    )
    yield _gauge(
        "sgpu_container_memory_limit_enforced",
        "Whether the driver reads that limit back (1), or it is only wanted (0).",
        CONTAINER,
        (
            (names, None if use.memory_limit is None else use.limit_state == LimitState.ENFORCED.value)
            for names, use in uses
        ),
    )
    yield _gauge(
        "sgpu_container_utilization_ratio",
        "Part of the time that a container's processes kept a GPU busy.",
        CONTAINER,
        ((names, _ratio(use.utilization)) for names, use in uses),
    )


def _of_daemon(snapshot: Snapshot, counters: Counters) -> Iterator[Family]:
    yield _info("sgpu_build", "Versions.", ("version", "driver_version"), [(snapshot.version, snapshot.driver_version)])
    age = None if snapshot.sampled_at is None else max(snapshot.time - snapshot.sampled_at, 0)
    yield _gauge("sgpu_sample_age_seconds", "Time since the driver last answered.", (), [((), age)])
    stale = None if snapshot.stale_answers is None else len(snapshot.stale_answers)
    yield _gauge("sgpu_stale_answers", "Pods that would get wrong GPUs if they started again.", (), [((), stale)])
    yield _gauge(
        "sgpu_registered",
        "Whether the kubelet took the last registration of a resource.",
        ["resource"],
        (((resource.name,), resource.registered) for resource in snapshot.resources),
    )
    yield _gauge(
        "sgpu_published",
        "Whether the node's ResourceSlices are as they should be (DRA).",
        ["resource"],
        (((each.name,), None if each.unpublished is None else not each.unpublished) for each in snapshot.resources),
    )
    yield _counter(
        "sgpu_registrations",
        "Attempts to register with the kubelet.",
        ("resource", "result"),
        (
            ((resource, word), counters.registrations[resource, success])
            for resource in dict.fromkeys(resource for resource, _ in counters.registrations)
            for success, word in RESULTS.items()
        ),
    )
    yield _counter(
        "sgpu_kubelet_restarts", "Times that another kubelet was found.", (), [((), counters.kubelet_restarts)]
    )
    yield _counter(
        "sgpu_config_reloads",
        "Times that the settings were read again.",
        ["result"],
        (((word,), counters.reloads[usable]) for usable, word in RESULTS.items()),
    )
    yield _counter(
        "sgpu_nvml_errors",
        "Calls of the driver's library that failed.",
        ("function", "code"),
        counters.nvml_errors.items(),
    )
    yield _counter(
        "sgpu_guard_actions",
        "What the memory guard did about a container that uses more memory of a GPU than it may.",
        (*CONTAINER, "action"),
        counters.guard_actions.items(),
    )
    yield Family(
        HistogramMetricFamily,
        "sgpu_rpc_duration_seconds",
        "The kubelet's calls; a stream counts when it ends.",
        ("method", "code"),
        [
            (names, (list(zip(BOUNDS, accumulate(durations.counts), strict=True)), durations.total))
            for names, durations in counters.calls.items()
        ],
    )


def _ratio(percent: int | None) -> float | None:
    return None if percent is None else percent / 100


def _gauge(name: str, meaning: str, labels: Labels, samples: Samples) -> Family:
    return Family(GaugeMetricFamily, name, meaning, labels, _known(samples))


def _counter(name: str, meaning: str, labels: Labels, samples: Samples) -> Family:
    return Family(CounterMetricFamily, name, meaning, labels, _known(samples))


def _info(name: str, meaning: str, labels: Labels, samples: Iterable[Labels]) -> Family:
    return Family(InfoMetricFamily, name, meaning, labels, [(values, ({},)) for values in samples])


def _known(samples: Samples) -> list[Sample]:
    return [(labels, (value,)) for labels, value in samples if value is not None]


def _utf8(text: str) -> str:
    """Return the text without what is no UTF-8: names from drivers and file systems can have any bytes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
