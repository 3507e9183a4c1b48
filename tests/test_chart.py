"""k8s/chart gives what the kustomizations give, and passes on what its values say."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import helm_chart
import kustomize
import pytest
import yaml

pytestmark = pytest.mark.static

K8S: Final = helm_chart.K8S
BASE: Final = K8S / "base"
OVERLAYS: Final = sorted(path.parent for path in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS: Final = helm_chart.components()
VALUES_FILES: Final = sorted(helm_chart.CHART.glob("values/*.yaml"))
#: What each value is set to, and where it is to be found as it is: below `spec.template.spec`, or in its container.
POD: Final[dict[str, Any]] = {
    "imagePullSecrets": [{"name": "registry"}],
    "tolerations": [{"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute", "tolerationSeconds": 7}],
    "affinity": {"nodeAffinity": None, "podAntiAffinity": {"x": [1]}},
    "nodeSelector": {"pool": "a"},
    "runtimeClassName": "nvidia",
    "serviceAccountName": "own",
    "automountServiceAccountToken": True,
    "priorityClassName": "high",
    "hostPID": False,
    "hostNetwork": True,
    "dnsPolicy": "ClusterFirstWithHostNet",
    "terminationGracePeriodSeconds": 0,
}
CONTAINER: Final[dict[str, Any]] = {
    "resources": {"limits": {"memory": "1Gi", "example.com/x": 1}, "claims": [{"name": "c"}]},
    "envFrom": [{"configMapRef": {"name": "e", "optional": True}}],
    "args": ["-v=1"],
    "ports": [{"name": "metrics", "containerPort": 9400, "hostPort": 9400}],
    "livenessProbe": {"tcpSocket": {"port": 1}, "httpGet": None, "timeoutSeconds": None},
    "readinessProbe": {"exec": {"command": ["true"]}, "httpGet": None},
    "securityContext": {"privileged": False, "capabilities": {"add": ["X"]}},
}
VALUE_FROM: Final = {"valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}

with_helm = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not there")


def helm(*arguments: str | Path) -> str:
    done = subprocess.run(["helm", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return done.stdout


def template(tmp_path: Path, *files: str, release: str = "sgpu", **values: object) -> list[dict[str, Any]]:
    """The objects that Helm makes with these values files, and values on top."""
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(values))
    flags: list[str | Path] = ["-n", "kube-system"]
    for file in (*(helm_chart.CHART / "values" / f"{name}.yaml" for name in files), own):
        flags += ["-f", file]
    made = yaml.safe_load_all(helm("template", release, helm_chart.CHART, *flags))
    return [thing for thing in made if thing is not None]


def normalized(objects: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The objects with their named lists in the order of the names, which means the same."""
    found: list[Any] = copy.deepcopy(sorted(objects, key=kustomize.identity))
    for thing in found:
        if thing["kind"] == "DaemonSet":
            pod = thing["spec"]["template"]["spec"]
            pod["volumes"].sort(key=lambda each: each["name"])
            for each in (*pod["containers"], *pod.get("initContainers", ())):
                each.get("env", []).sort(key=lambda variable: variable["name"])
                each["volumeMounts"].sort(key=lambda mount: mount["mountPath"])
        if thing["kind"] == "ConfigMap":
            thing["data"] = {name: yaml.safe_load(text) for name, text in thing["data"].items()}
    return found


def test_the_committed_files_are_what_the_manifests_generate() -> None:
    """`tox -e generate` makes them anew; one values file for each overlay and component."""
    made = helm_chart.files()
    by_hand = {"templates/daemonset.yaml", "templates/_helpers.tpl"}
    files = {str(path.relative_to(helm_chart.CHART)) for path in helm_chart.CHART.rglob("*") if path.is_file()}
    assert files == made.keys() | by_hand
    out_of_date = [name for name, text in made.items() if (helm_chart.CHART / name).read_text() != text]
    assert out_of_date == [], "run `tox -e generate`"
    assert sorted(path.stem for path in VALUES_FILES) == sorted(path.name for path in (*OVERLAYS, *COMPONENTS))


@pytest.mark.parametrize("file", VALUES_FILES, ids=lambda path: path.stem)
def test_values_files_without_helm(file: Path) -> None:
    """The schema takes what each values file says, and what it stands for adds is all in the templates."""
    import jsonschema

    values = yaml.safe_load(file.read_text())
    jsonschema.validate(values, json.loads((helm_chart.CHART / "values.schema.json").read_text()))
    for directory in (path for path in (*OVERLAYS, *COMPONENTS) if path.name == file.stem):
        for value, path in helm_chart.added(directory):
            assert values[value] is True
            template = (helm_chart.CHART / "templates" / f"{value}.yaml").read_text()
            kinds = Counter(thing["kind"] for thing in yaml.safe_load_all(path.read_text()))
            assert all(template.count(f"\nkind: {kind}\n") >= count for kind, count in kinds.items())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, ""),
        ({"tolerations": None, "env": {"SGPU_V": 1, "X": {"valueFrom": {}}}, "global": {}}, ""),
        ({"toleration": []}, "toleration"),
        ({"image": {"name": "sgpu"}}, "name"),
        ({"tolerations": {}}, "tolerations"),
        ({"env": {"SGPU_V": ["1"]}}, "SGPU_V"),
        ({"env": [{"name": "SGPU_V", "value": "1"}]}, "env"),
    ],
    ids=["nothing", "right", "misspelt", "in image", "no list", "no value", "list of env"],
)
def test_the_schema_is_closed(values: Mapping[str, Any], problem: str) -> None:
    """A value that is misspelt or of the wrong type is refused, and named."""
    import jsonschema  # here, because it is only where `tox -e 3.13-all` is

    schema = json.loads((helm_chart.CHART / "values.schema.json").read_text())
    errors = list(jsonschema.Draft7Validator(schema).iter_errors(values))
    assert bool(errors) is bool(problem)
    assert all(problem in f"{error.json_path} {error.message}" for error in errors)


@with_helm
class TestHelm:
    @pytest.mark.parametrize("directory", [BASE, *OVERLAYS], ids=lambda path: path.name)
    def test_overlays(self, directory: Path, tmp_path: Path) -> None:
        """Make what kustomize makes; an overlay that is applied beside others comes with the base."""
        objects = kustomize.render(directory).objects
        if not any(thing["kind"] == "DaemonSet" for thing in objects):
            objects = (*kustomize.render(BASE).objects, *objects)
        files = () if directory == BASE else (directory.name,)
        assert normalized(template(tmp_path, *files)) == normalized(objects)

    @pytest.mark.parametrize("overlay", [BASE, K8S / "overlays/host-driver"], ids=lambda path: path.name)
    @pytest.mark.parametrize("component", COMPONENTS, ids=lambda path: path.name)
    def test_components(self, component: Path, overlay: Path, tmp_path: Path) -> None:
        """Make what kustomize makes of an overlay with a component."""
        files = () if overlay == BASE else (overlay.name,)
        made = template(tmp_path, *files, component.name)
        assert normalized(made) == normalized(kustomize.with_components(overlay, component))

    @pytest.mark.parametrize(
        ("overlay", "components"),
        [("dra", ["events", "node-labels-api"]), ("host-driver", ["service-account", "events", "node-labels-api"])],
        ids=["its own account", "an account"],
    )
    def test_several_components(self, overlay: str, components: list[str], tmp_path: Path) -> None:
        """Make what kustomize makes of those that share a service account."""
        made = template(tmp_path, overlay, *components)
        expected = kustomize.with_components(
            K8S / "overlays" / overlay, *(K8S / "components" / each for each in components)
        )
        assert normalized(made) == normalized(expected)

    def test_config(self, tmp_path: Path) -> None:
        """Put the configuration file into a ConfigMap, as the example does."""
        example = kustomize.render(K8S / "examples/config").objects
        (config_map,) = (thing for thing in example if thing["kind"] == "ConfigMap")
        made = template(tmp_path, "host-driver", config=yaml.safe_load(config_map["data"]["config.yaml"]))
        assert normalized(made) == normalized(example)

    @pytest.mark.parametrize("files", [(), *((path.stem,) for path in VALUES_FILES)], ids=lambda files: "".join(files))
    def test_lint(self, files: tuple[str, ...]) -> None:
        """Pass Helm's own checks, with each values file."""
        flags = [argument for name in files for argument in ("-f", helm_chart.CHART / "values" / f"{name}.yaml")]
        helm("lint", "--strict", helm_chart.CHART, *flags)

    def test_passed_on_whole(self, tmp_path: Path) -> None:
        """Whatever Kubernetes takes under a name arrives as it is."""
        values = {
            **POD,
            **CONTAINER,
            "env": {"SGPU_HOST_PATH": None, "SGPU_V": 10_000_000, "SGPU_STANDBY": True, "A": VALUE_FROM},
            "image": {"repository": "r/sgpu", "digest": "sha256:" + "0" * 64, "pullPolicy": "Always"},
            "labels": {"team": "a"},
            "annotations": {"note": "b"},
            "podLabels": {"team": "c"},
            "podAnnotations": {"prometheus.io/scrape": None, "note": "d"},
            "podSecurityContext": {"fsGroup": 1},
        }
        (made,) = template(tmp_path, release="pool-a", **values)
        pod = made["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"] == {"fsGroup": 1}
        assert {key: pod[key] for key in POD} == without_null(POD)
        for key, value in without_null(CONTAINER).items():
            found = container[key]
            assert found == ({**found, **value} if isinstance(value, dict) else value), key
        assert container["env"] == [
            {"name": "A", **VALUE_FROM},
            {"name": "SGPU_STANDBY", "value": "true"},
            {"name": "SGPU_V", "value": "10000000"},
        ]
        assert container["image"] == "r/sgpu@sha256:" + "0" * 64
        assert container["imagePullPolicy"] == "Always"
        assert made["metadata"] == {
            "name": "pool-a",
            "namespace": "kube-system",
            "labels": {"app": "pool-a", "team": "a"},
            "annotations": {"note": "b"},
        }
        metadata = made["spec"]["template"]["metadata"]
        assert metadata["labels"] == {"app": "pool-a", "team": "c"}
        assert metadata["annotations"]["note"] == "d"
        assert "prometheus.io/scrape" not in metadata["annotations"]

    def test_two_releases(self, tmp_path: Path) -> None:
        """Pools with settings of their own have DaemonSets and monitors that don't select each other's pods."""
        values = {"namespaceOverride": "gpus", "monitorLabels": {"release": "p"}}
        made = template(tmp_path, "monitoring", "alerts", release="pool-a", **values)
        assert {(thing["metadata"]["name"], thing["metadata"]["namespace"]) for thing in made} == {("pool-a", "gpus")}
        for thing in made:
            selector = thing["spec"].get("selector", {}).get("matchLabels", {"app": "pool-a"})
            assert selector == {"app": "pool-a"}
            if thing["kind"] != "DaemonSet":
                assert thing["metadata"]["labels"] == {"app": "pool-a", "release": "p"}

    def test_a_misspelt_value(self, tmp_path: Path) -> None:
        """Refuse it, by name."""
        with pytest.raises(AssertionError, match="toleration"):
            template(tmp_path, toleration=[])


def without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is left when null has removed what is there by default."""
    found = {key: without_null(each) if isinstance(each, dict) else each for key, each in values.items()}
    return {key: each for key, each in found.items() if each is not None}
