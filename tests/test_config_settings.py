"""Every setting: its default, and values that it takes and refuses."""

from __future__ import annotations

from typing import NamedTuple

import attrs
import pytest

from sgpu.config.settings import SETTINGS, Settings, endpoint

pytestmark = pytest.mark.pure


class Expected(NamedTuple):
    """Values that manifests and scripts rely on: the default, texts at the ends of the range, and just beyond."""

    default: object
    takes: tuple[str, ...]
    refuses: tuple[str, ...]


PATHS = (("/",), ("", "relative"))
FILES = (("", "file"), ("/",))
BOOLEANS = (("true", "false"), ("off",))
INTERVAL = (("0.1", "3600"), ("0", "3601"))
NUMBERS = (("", "13, 31"), ("x",))

EXPECTED = {
    "api": Expected("device-plugin", ("device-plugin", "dra", "auto"), ("DRA", "both")),
    "host-path": Expected("/home/kubernetes/bin/nvidia", *PATHS),
    "container-path": Expected("/usr/local/nvidia", *PATHS),
    "plugin-directory": Expected("/device-plugin", *PATHS),
    "gpu-duplication-factor": Expected(100, ("1", "100000"), ("0", "100001")),
    "resource-name": Expected("deepomatic.com/shared-gpu", ("a/b",), ("gpu", "kubernetes.io/gpu")),
    "mig": Expected("shared", ("shared", "profile", "off"), ("none", "mixed", "")),
    "mig-resource-name": Expected(
        "mig-{profile}",
        ("nvidia.com/mig-{profile}", "{profile}", "a.b/{profile}-gpu"),
        ("mig", "a.b/c", "{profile}-{profile}", "a.b/c/{profile}", "-{profile}", "x" * 50 + "{profile}", ""),
    ),
    "dev-directory": Expected("/dev", *PATHS),
    "sysfs-directory": Expected("/sys", *PATHS),
    "proc-directory": Expected("/proc", *PATHS),
    "container-log-directory": Expected("/var/log/containers", *PATHS),
    "placement": Expected("spread", ("spread", "pack"), ("binpack",)),
    "multi-share": Expected("distinct", ("distinct", "same", "strict-distinct"), ("strict",)),
    "memory-watermark": Expected(0.95, ("0", "1"), ("95",)),
    "memory-limits": Expected("off", ("fair", "burst=1.5"), ("on", "burst")),
    "memory-limits-failure": Expected("open", ("open", "closed"), ("fail",)),
    "cgroup-directory": Expected("/sys/fs/cgroup", *PATHS),
    "memory-guard": Expected("off", ("warn", "terminate"), ("on", "kill")),
    "memory-guard-tolerance": Expected("10%+512MiB", ("0%", "1GiB"), ("10", "")),
    "memory-guard-threshold": Expected(0.95, ("0", "1"), ("95",)),
    "memory-guard-grace": Expected(30.0, ("0", "3600"), ("3601",)),
    "memory-guard-exempt-namespaces": Expected("kube-system", ("", "a, b"), ("A", "a,,b")),
    "sample-interval": Expected(5.0, *INTERVAL),
    "pod-resources-socket": Expected("/var/lib/kubelet/pod-resources/kubelet.sock", *PATHS),
    "framework-hints": Expected(True, *BOOLEANS),
    "health-interval": Expected(5.0, *INTERVAL),
    "driver-timeout": Expected(10.0, *INTERVAL),
    "ignore-xids": Expected("", *NUMBERS),
    "critical-xids": Expected("", *NUMBERS),
    "state-file": Expected("/run/sgpu/state.json", *FILES),
    "cordon-file": Expected("/var/lib/sgpu/cordon.json", *FILES),
    "metrics-address": Expected(":2112", ("", "[::1]:0"), ("2112",)),
    "metrics-page": Expected(True, *BOOLEANS),
    "status-socket": Expected("/run/sgpu/status.sock", *FILES),
    "node-labels": Expected("off", ("off", "nfd", "api"), ("on",)),
    "node-labels-directory": Expected("/etc/kubernetes/node-feature-discovery/features.d", *PATHS),
    "events": Expected(False, *BOOLEANS),
    "standby": Expected(False, *BOOLEANS),
    "simulate": Expected(0, ("0", "64"), ("-1", "65")),
    "simulate-mig": Expected(
        "",
        ("1g.10gb", "1g.5gb+me,1c.3g.20gb,1g.12gb-me.all", "7g.141gb"),
        ("1g", "5gb", "1g.10gb,", "0g.5gb", "1g.5GB", "1g.5gb+", "a100", " 1g.10gb"),
    ),
    "simulate-faults": Expected("", *FILES),
    "node-name": Expected("", ("", "node-a.example"), ("Node", "a_b", "a" * 254)),
    "api-server": Expected("", ("", "127.0.0.1:8001"), ("http://127.0.0.1:8001",)),
    "dra-registry-directory": Expected("/var/lib/kubelet/plugins_registry", *PATHS),
    "dra-plugin-directory": Expected("/var/lib/kubelet/plugins", *PATHS),
    "dra-memory-default": Expected("none", ("none", "fair"), ("0",)),
    "dra-evict": Expected(False, *BOOLEANS),
    "cdi-directory": Expected("/var/run/cdi", *PATHS),
    "log-format": Expected("text", ("text", "json"), ("JSON",)),
    "v": Expected(0, ("0", "10"), ("-1", "11")),
    "logtostderr": Expected(True, *BOOLEANS),
}


def test_defaults() -> None:
    """Every field is a setting, named with dashes, whose default manifests and scripts count on."""
    defaults = {name.replace("-", "_"): expected.default for name, expected in EXPECTED.items()}
    assert attrs.asdict(Settings()) == defaults
    assert list(SETTINGS) == list(EXPECTED)


@pytest.mark.parametrize("name", SETTINGS)
def test_values(name: str) -> None:
    """Every setting takes its own default, says what it is for, and refuses what is beyond its range."""
    kind, expected = SETTINGS[name].metadata["kind"], EXPECTED[name]
    assert kind.from_file(expected.default) == expected.default
    assert SETTINGS[name].metadata["meaning"]
    for text in expected.takes:
        kind.from_text(text)
    for text in expected.refuses:
        with pytest.raises(ValueError):  # noqa: PT011  # its text is not shown
            kind.from_text(text)


@pytest.mark.parametrize(
    ("resource", "socket"),
    [
        pytest.param("deepomatic.com/shared-gpu", "sgpu-deepomatic.com_shared-gpu.sock", id="default"),
        pytest.param("a.b/c_d", "sgpu-a.b_c_d.sock", id="underscore in the name"),
    ],
)
def test_endpoint(resource: str, socket: str) -> None:
    """A resource's socket has its name without a slash. A domain has no underscore, so that no two clash."""
    assert endpoint(resource) == socket
