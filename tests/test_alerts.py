"""docs/prometheus-rules.yaml: what fires when, with the series of a real daemon, and where its runbook is."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import prometheus_rule
import pytest
import yaml
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from fake_status import GPU, SNAPSHOT
from grpc import StatusCode
from node import RESOURCE, Node
from stub_driver import GIB
from test_dashboard import SERIES
from test_docs import anchors
from test_seen import SHARES, seen
from watching import wait_until

from sgpu.node.usage import ContainerUse
from sgpu.observe.counters import Counters
from sgpu.observe.metrics import Pages

ROOT: Final = Path(__file__).parents[1]
RULES: Final = [
    rule for group in yaml.safe_load(prometheus_rule.RULES.read_text())["groups"] for rule in group["rules"]
]
ALERTS: Final = [rule for rule in RULES if "alert" in rule]
#: Of one container, where there are memory limits.
LIMITED: Final = {"sgpu_container_memory_limit_bytes", "sgpu_container_memory_limit_enforced"}
INSTANCE: Final = "node-a"

with_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not there")


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.static
class TestFile:
    def test_the_prometheus_rule_is_made_from_it(self) -> None:
        """`tox -e generate` makes it anew."""
        made = prometheus_rule.prometheus_rule()
        assert prometheus_rule.RULE.read_text() == made, "run `tox -e generate`"
        assert yaml.safe_load(made)["spec"] == yaml.safe_load(prometheus_rule.RULES.read_text())

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
    def test_series(self, rule: Mapping[str, Any]) -> None:
        """Ask only for series that there are, or that are recorded."""
        text = str(rule["expr"]) + str(rule.get("annotations", ""))
        recorded = {each["record"] for each in RULES if "record" in each}
        names = set(re.findall(r"(?<![\w:])sgpu_\w+", text)) | set(re.findall(r"namespace:\w+:\w+", text))
        assert names or "kube_" in text
        assert names <= SERIES.keys() | LIMITED | recorded

    @pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
    def test_runbook(self, alert: Mapping[str, Any]) -> None:
        """Each alert has a section in docs."""
        page, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert anchor == alert["alert"].lower()
        assert anchor in anchors(ROOT / page)

    @with_promtool
    def test_promtool_takes_it(self) -> None:
        """As a rules file of Prometheus."""
        promtool("check", "rules", prometheus_rule.RULES)


def series(text: str, minutes: int) -> list[dict[str, str]]:
    """A scrape as promtool takes it: each value again every minute; an age grows meanwhile."""
    lines = re.findall(r"^(sgpu_\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE)
    assert lines
    return [
        {
            "series": f'{name}{{{labels}{"," if labels else ""}instance="{INSTANCE}"}}',
            "values": f"{value}+{60 if name == 'sgpu_sample_age_seconds' and float(value) > 1 else 0}x{minutes}",
        }
        for name, labels, value in lines
    ]


def check(tmp_path: Path, inputs: Sequence[Mapping[str, str]], **tests: object) -> None:
    """Have promtool evaluate the rules over half an hour."""
    test = {"interval": "1m", "input_series": list(inputs), **tests}
    content = {"rule_files": [str(prometheus_rule.RULES)], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(content))
    promtool("test", "rules", tmp_path / "tests.yaml")


def firing(*names: str) -> dict[str, object]:
    """What promtool is to find after half an hour: these alerts, each once, and no others."""
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {"promql_expr_test": [{"expr": query, "eval_time": "30m", "exp_samples": expected}]}


@with_promtool
@pytest.mark.soak
class TestDaemon:
    def test_healthy(self, node: Node, tmp_path: Path) -> None:
        """Nothing fires, and hours are counted by namespace: a quarter of a GPU, 2 GiB."""
        (gpu,) = node.driver.gpus(1)
        node.driver.change(gpu, used=2 * GIB, compute=((7, 2 * GIB),))
        node.start_process(7, "team/web/main")
        memory = f"sgpu_container_memory_used_bytes{{container=main,namespace=team,pod=web,uuid={gpu.uuid}}}"
        with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods) as pods, seen(node) as daemon:
            kubelet.wait_devices(SHARES)
            pods.assign("team", "web", "main", [f"{gpu.uuid}::0"])
            daemon.wait_series(memory, 2 * GIB)
            scraped = daemon.get("/metrics")[1]
        check(tmp_path, series(scraped, 30), **firing())
        hours = [("gpu", SHARES**-1), ("gib", 2)]
        tests = [
            {
                "expr": f"namespace:sgpu_{name}_hours:1h",
                "eval_time": "3h",
                "exp_samples": [{"labels": f'namespace:sgpu_{name}_hours:1h{{namespace="team"}}', "value": value}],
            }
            for name, value in hours
        ]
        check(tmp_path, series(scraped, 180), promql_expr_test=tests)

    def test_full_and_down(self, node: Node, tmp_path: Path) -> None:
        """One GPU is full of one container, the other has a fault; the reason is in the alert."""
        full, down = node.driver.gpus(2)
        node.driver.change(full, used=full.total - full.reserved, compute=((7, 10 * GIB),))
        node.driver.change(down, rows_pending=1)
        node.start_process(7, "team/big/main")
        with FakeKubelet(node.plugins) as kubelet, FakePodResources(node.pods) as pods, seen(node) as daemon:
            kubelet.wait_devices(2 * SHARES)
            pods.assign("team", "big", "main", [f"{full.uuid}::0"])
            daemon.wait_series(f"sgpu_gpu_healthy{{uuid={down.uuid}}}", 0)
            labels = f"container=main,namespace=team,pod=big,uuid={full.uuid}"
            daemon.wait_series(f"sgpu_container_shares{{{labels}}}", 1)
            daemon.wait_series(f"sgpu_container_memory_used_bytes{{{labels}}}", 10 * GIB)
            scraped = daemon.get("/metrics")[1]
        reason = re.findall(r'sgpu_gpu_unhealthy_info\{reason="(.*?)"', scraped)[0]
        (alert,) = (alert for alert in ALERTS if alert["alert"] == "SgpuGpuDown")
        annotations = {
            **alert["annotations"],
            "summary": f"GPU {down.uuid} of {INSTANCE} is down",
            "description": f"{reason}. No pod gets a share of it; pods that have one may hang or fail.",
        }
        labels_of = {"severity": "critical", "uuid": down.uuid, "instance": INSTANCE}
        expected = [{"exp_labels": labels_of, "exp_annotations": annotations}]
        tests = [{"alertname": "SgpuGpuDown", "eval_time": "30m", "exp_alerts": expected}]
        fired = firing("SgpuGpuDown", "SgpuMemoryFull", "SgpuContainerOverItsPart")
        check(tmp_path, series(scraped, 30), alert_rule_test=tests, **fired)

    def test_unregistered_and_hung(self, node: Node, tmp_path: Path) -> None:
        """The kubelet refuses the plugin, and the driver no longer answers."""
        with FakeKubelet(node.plugins) as kubelet, seen(node) as daemon:
            kubelet.refuse(StatusCode.UNKNOWN, "unsupported version")
            kubelet.restart()
            daemon.wait_series(f"sgpu_registered{{resource={RESOURCE}}}", 0)
            node.driver.hang("nvmlDeviceGetMemoryInfo")
            wait_until(lambda: daemon.series()["sgpu_sample_age_seconds{}"] > 1, "an old sample")
            scraped = daemon.get("/metrics")[1]
            node.driver.works("nvmlDeviceGetMemoryInfo")
        check(tmp_path, series(scraped, 30), **firing("SgpuNotRegistered", "SgpuSamplesOld"))

    def test_no_gpu(self, node: Node, tmp_path: Path) -> None:
        """The daemon waits for a driver."""
        node.driver.set(gpus=[])
        with seen(node) as daemon:
            scraped = daemon.get("/metrics")[1]
        check(tmp_path, series(scraped, 30), **firing("SgpuNoGpu"))


@with_promtool
@pytest.mark.static
class TestOthers:
    def test_a_limit_that_is_not_enforced(self, tmp_path: Path) -> None:
        """An enforced one silences the alert about memory: the driver holds the container."""
        limited = ContainerUse("team", "a", "main", 1, GPU.memory_total, memory_limit=GIB, limit_state="refused")
        held = attrs.evolve(limited, pod="b", limit_state="enforced")
        full = attrs.evolve(GPU, memory_used=GPU.memory_total, shares=4, containers=(limited, held))
        scraped = Pages().page(attrs.evolve(SNAPSHOT, gpus=(full,)), Counters(), "", "").text.decode()
        names = ("SgpuMemoryFull", "SgpuMemoryLimitNotEnforced", "SgpuContainerOverItsPart")
        check(tmp_path, series(scraped, 30), **firing(*names))

    def test_agent_missing(self, tmp_path: Path) -> None:
        """A labelled node needs a pod that is Ready; one without the label needs none."""
        inputs = [
            *(f'kube_node_labels{{node="{node}",label_deepomatic_com_shared_gpu="true"}}' for node in "abc"),
            'kube_node_labels{node="d"}',
            *(
                f'kube_pod_info{{namespace="kube-system",pod="{pod}",node="{node}",'
                f'created_by_kind="DaemonSet",created_by_name="sgpu"}}'
                for pod, node in (("sgpu-1", "a"), ("sgpu-2", "b"))
            ),
            'kube_pod_status_ready{namespace="kube-system",pod="sgpu-1",condition="true"}',
        ]
        expected = [{"labels": f'{{node="{node}"}}', "value": 1} for node in "bc"]
        query = 'count by (node) (ALERTS{alertname="SgpuAgentMissing",alertstate="firing"})'
        tests = [{"expr": query, "eval_time": "30m", "exp_samples": expected}]
        check(tmp_path, [{"series": each, "values": "1x30"} for each in inputs], promql_expr_test=tests)
