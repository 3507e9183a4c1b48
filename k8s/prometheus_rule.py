"""Make k8s/overlays/alerts/prometheusrule.yaml: docs/prometheus-rules.yaml, as the Prometheus operator takes it."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent
from typing import Final

RULES: Final = Path(__file__).parents[1] / "docs" / "prometheus-rules.yaml"
RULE: Final = Path(__file__).parent / "overlays" / "alerts" / "prometheusrule.yaml"
HEADER: Final = """\
# Made from docs/prometheus-rules.yaml by `tox -e generate`: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: sgpu
  namespace: kube-system
  labels:
    app: sgpu # add the labels by which your Prometheus selects rules
spec:
"""


def prometheus_rule() -> str:
    """Return the text of the file."""
    _, groups, rest = RULES.read_text().partition("groups:\n")
    return HEADER + indent(groups + rest, "  ", lambda line: bool(line.strip()))


if __name__ == "__main__":
    RULE.write_text(prometheus_rule())
