"""Other plugins' configurations, as configuration of ours that the daemon takes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sgpu.cli import FAILED, OK, USAGE, main
from sgpu.commands.import_config import convert
from sgpu.commands.import_config.imported import MOST_NOTES, UnreadableError
from sgpu.config.load import Loaded, load

UUID = "GPU-1d6f6dfc-1f2a-4b7e-a9d1-6e1f4a3b2c1d"
#: As the GPU operator's documentation shows them, and as HAMi's chart makes them, in parts.
TIME_SLICING = {
    "version": "v1",
    "flags": {"migStrategy": "none", "nvidiaDriverRoot": "/run/nvidia/driver", "plugin": {"passDeviceSpecs": True}},
    "sharing": {"timeSlicing": {"resources": [{"name": "nvidia.com/gpu", "replicas": 4}]}},
}
DEVICES = {
    "nvidia": {
        "resourceCountName": "nvidia.com/gpu",
        "resourceMemoryName": "nvidia.com/gpumem",
        "overwriteEnv": "false",
        "defaultMemory": 0,
        "defaultGPUNum": 1,
        "deviceSplitCount": 7,
        "deviceMemoryScaling": 1.5,
        "deviceCoreScaling": 1,
    },
    "cambricon": {"resourceCountName": "cambricon.com/vmlu"},
}
#: What does not carry over of the first one.
DROPPED = ("resourceMemoryName", "overwriteEnv", "deviceMemoryScaling")
NODES = {
    "nodeconfig": [
        {"name": "a", "operatingmode": "hami-core", "devicesplitcount": 5, "migstrategy": "none"},
        {"name": "b", "filterdevices": {"uuid": [UUID, UUID], "index": [1]}},
    ]
}


def config_map(**data: object) -> dict[str, Any]:
    return {"kind": "ConfigMap", "data": {key: json.dumps(value, indent="\t") for key, value in data.items()}}


def sliced(*resources: dict[str, Any], method: str = "timeSlicing", **rest: object) -> dict[str, Any]:
    return {"sharing": {method: {"resources": list(resources), **rest}}}


def loaded(tmp_path: Path, content: object, name: str = "") -> tuple[Loaded, str]:
    """What the daemon makes of what is printed, and the text."""
    text = convert(yaml.safe_dump(content, sort_keys=False).encode(), name).text("theirs.yaml")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load({"config": str(file)}, {}), text


GPU = {"name": "nvidia.com/gpu", "replicas": 4}
KEYS = st.sampled_from(["resources", "name", "replicas", "devices", "uuid", "index", "plugin"]) | st.text()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@pytest.mark.parametrize(
    ("content", "name", "shares", "resource"),
    [
        (TIME_SLICING, "", 4, "nvidia.com/gpu"),
        (config_map(any=TIME_SLICING), "", 4, "nvidia.com/gpu"),
        (config_map(any=TIME_SLICING, t4=sliced({**GPU, "replicas": 2})), "t4", 2, "nvidia.com/gpu"),
        (sliced(GPU, renameByDefault=True), "", 4, "nvidia.com/gpu.shared"),
        (sliced({**GPU, "name": "gpu", "rename": "small"}, method="mps"), "", 4, "nvidia.com/small"),
        ({"version": "v1", "flags": {}}, "", 1, "nvidia.com/gpu"),
        (DEVICES, "", 7, "nvidia.com/gpu"),
        (config_map(**{"device-config.yaml": {"nvidia": {}}}), "", 10, "nvidia.com/gpu"),
        (NODES, "a", 5, "deepomatic.com/shared-gpu"),
        (config_map(**{"config.json": NODES}), "a", 5, "deepomatic.com/shared-gpu"),
    ],
    ids=["NVIDIA", "map", "by key", "renamed", "MPS", "not shared", "HAMi", "HAMi's defaults", "node", "node in a map"],
)
def test_shares(tmp_path: Path, content: object, name: str, shares: int, resource: str) -> None:
    """The daemon offers as many shares, and pods ask for them by the name they know."""
    settings = loaded(tmp_path, content, name)[0].settings
    assert (settings.gpu_duplication_factor, settings.resource_name) == (shares, resource)


@pytest.mark.parametrize(
    ("content", "name", "rule"),
    [
        (sliced({**GPU, "devices": [UUID, UUID, 0]}), "", {"uuid": UUID, "shares": 4}),
        (NODES, "b", {"uuid": UUID, "exclude": True}),
    ],
    ids=["some shared", "some filtered"],
)
def test_rules(tmp_path: Path, content: object, name: str, rule: dict[str, Any]) -> None:
    """Devices that are named by their UUID become a rule each; those that are numbered don't carry over."""
    found, text = loaded(tmp_path, content, name)
    assert [{key: getattr(each, key) for key in rule} for each in found.policy.rules] == [rule]
    assert "nvidia-smi -L" in text


@pytest.mark.parametrize(
    ("content", "name", "notes"),
    [
        (TIME_SLICING, "", ["flags.nvidiaDriverRoot"]),
        (sliced(GPU, failRequestsGreaterThanOne=True), "", ["sharing.timeSlicing.failRequestsGreaterThanOne"]),
        (sliced(GPU, {"name": "nvidia.com/mig-1g.5gb", "replicas": 2}), "", ["sharing.timeSlicing.resources[1]"]),
        (sliced(GPU, {"name": "nvidia.com/a100", "replicas": 2}), "", ["sharing.timeSlicing.resources[1]"]),
        (sliced({**GPU, "devices": 2}, method="mps"), "", ["sharing.mps.resources[0].devices", "sharing.mps"]),
        ({**TIME_SLICING, "flags": {"new": 1}, "x": {"y": [1]}}, "", ["flags.new", "x.y"]),
        (DEVICES, "", [*(f"nvidia.{key}" for key in DROPPED), "'cambricon'"]),
        (NODES, "a", ["operatingmode"]),
    ],
    ids=["driver", "more than one", "MIG", "named", "MPS", "unknown", "HAMi", "node"],
)
def test_what_does_not_carry_over(tmp_path: Path, content: object, name: str, notes: list[str]) -> None:
    """A comment line for each, with the reason; none for what sgpu does anyway."""
    lines = [line for line in loaded(tmp_path, content, name)[1].splitlines() if line.startswith("# not")]
    assert [line.split(": ")[1] for line in lines] == notes
    assert all(len(line.split(": ")) >= 3 for line in lines)


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        ([], "", "none of these"),
        ({"kind": "Pod"}, "", "none of these"),
        ({"kind": "ConfigMap"}, "", "no key"),
        (config_map(a=TIME_SLICING, b=TIME_SLICING), "", "choose one with -name: a, b"),
        (config_map(a=TIME_SLICING), "c", "there is no 'c'"),
        (NODES, "", "more than one node"),
        (NODES, "c", "no node 'c'"),
        ({"nodeconfig": 7}, "", "no node"),
        (TIME_SLICING, "t4", "there is no 't4'"),
        (sliced({**GPU, "replicas": 0}), "", "resources[0].replicas: 0 is not a whole number"),
        (sliced({**GPU, "name": "no name"}), "", "resources[0].name"),
        (sliced({**GPU, "rename": "kubernetes.io/x"}), "", "resources[0].rename"),
        ({"sharing": {"timeSlicing": {"resources": 7}}}, "", "not a list of mappings"),
        ({"sharing": 7, "flags": {}}, "", "sharing is not a mapping"),
        ({"nvidia": {"deviceSplitCount": "many"}}, "", "deviceSplitCount: 'many'"),
        ({"nodeconfig": [{"name": "a", "filterdevices": {"uuid": ["0"]}}]}, "", "not a list of UUIDs"),
    ],
)
def test_unreadable(content: object, name: str, problem: str) -> None:
    """One line says what is wrong where."""
    with pytest.raises(UnreadableError) as caught:
        convert(yaml.safe_dump(content).encode(), name)
    assert problem in str(caught.value)


def test_aliases() -> None:
    """A few lines that stand for a billion values are not written out."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    keys = "".join(f"k{n}: 1\n" for n in range(MOST_NOTES))
    text = convert(f"version: v1\n{bomb}{keys}".encode()).text("bomb.yaml")
    assert len(text) < 100_000
    assert text.endswith("too many values\n")


@given(ANYTHING)
def test_anything(value: object) -> None:
    """Whatever stands in the file is imported or refused in one line."""
    for content in (
        {"sharing": value},
        {"flags": value},
        {"sharing": {"mps": value}},
        {"nvidia": value},
        {"nodeconfig": [value]},
    ):
        try:
            text = convert(json.dumps(content).encode()).text("any")
        except UnreadableError:
            continue
        assert isinstance(yaml.safe_load(text), dict)


class TestCommand:
    def test_prints(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The file, and nothing else; the settings of the daemon don't matter."""
        file = tmp_path / "theirs.yaml"
        file.write_text(yaml.safe_dump(config_map(any=TIME_SLICING, b={})))
        assert main(["import-config", str(file), "-name", "any"], {"SGPU_V": "none"}) == OK
        printed = capsys.readouterr()
        assert printed.out.startswith("# From theirs.yaml, a configuration of NVIDIA's device plugin.")
        assert printed.err == ""

    def test_standard_input(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """As `kubectl get configmap -o yaml | sgpu import-config -`."""
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(TIME_SLICING).encode())))
        assert main(["import-config", "-"], {}) == OK
        assert "gpu-duplication-factor: 4" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("content", "problem"), [(None, "No such file"), (b"\xff", "not YAML"), (b"[", "not YAML")]
    )
    def test_fails(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, problem: str
    ) -> None:
        """One line, and exit code 1."""
        file = tmp_path / "theirs.yaml"
        if content is not None:
            file.write_bytes(content)
        assert main(["import-config", str(file)], {}) == FAILED
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line

    @pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "-v", "1"]])
    def test_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """One file, and no settings of the daemon."""
        assert main(["import-config", *arguments], {}) == USAGE
        assert re.match("sgpu: import-config (takes one FILE|does not take)", capsys.readouterr().err)
