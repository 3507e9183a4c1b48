"""Kubernetes 1.9 (where its plugin API suffices) and today's accept what is in k8s/, and it fits the daemon."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import kustomize
import plain
import pytest
import yaml

from sgpu import __version__
from sgpu.cli import COMMANDS
from sgpu.config.flags import parse_flags
from sgpu.config.load import load
from sgpu.config.settings import Settings
from sgpu.config.values import split_address
from sgpu.dra.slices import DEVICE_TYPE, DRIVER
from sgpu.observe import node_labels

# What `tox -e 3.13-all` installs for them is a hundred megabytes; and no interpreter sees anything else in YAML.
pytestmark = pytest.mark.static

K8S = plain.DIRECTORY
BASE = K8S / "base"
OVERLAYS = sorted(path.parent for path in K8S.glob("overlays/*/kustomization.yaml"))
SIMULATED = K8S / "overlays" / "simulated"
EXAMPLES = sorted(K8S.glob("examples/*.yaml"))
#: Added to any of them, for newer Kubernetes.
SURGE = K8S / "components" / "surge"
#: All at once: the plugin, and a pod that asks for a share.
FIRST_LOOK = K8S / "examples" / "simulated"
#: An overlay with a -config file.
CONFIGURED = K8S / "examples" / "config"
#: With dynamic resource allocation, each made of another one; and pods for it. For Kubernetes 1.36 and later.
DRA = {K8S / "overlays" / "dra": K8S / "overlays" / "host-driver", K8S / "overlays" / "dra-simulated": SIMULATED}
DRA_EXAMPLES = sorted(K8S.glob("examples/dra/*.yaml"))
OLDER = [BASE, *(path for path in OVERLAYS if path not in DRA), FIRST_LOOK, CONFIGURED]
KUSTOMIZATIONS = [*OLDER, *DRA]
#: The plugin's manifests: all that run it.
RUNNING = [BASE, *(path for path in OVERLAYS if path.name not in ("alerts", "monitoring") and path not in DRA)]
SHARE = Settings().resource_name
#: Where kubernetes-validate 1.13 is installed, which knows Kubernetes 1.9; `tox -e 3.13-all` sets it.
OLD_SCHEMAS = "SGPU_OLD_SCHEMAS"

with_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not there")
each_source = pytest.mark.parametrize("source", [plain.PLAIN, *EXAMPLES, *OLDER], ids=lambda path: path.stem)
each_running = pytest.mark.parametrize("directory", RUNNING, ids=lambda path: path.name)


def objects(source: Path) -> list[Mapping[str, Any]]:
    """All of Kubernetes itself. The Prometheus operator's schemas are nowhere to be had as a package."""
    found = kustomize.render(source).objects if source.is_dir() else kustomize.load(source)
    return [thing for thing in found if thing["kind"] not in ("PodMonitor", "PrometheusRule")]


def daemon_set(directory: Path) -> Mapping[str, Any]:
    """The plugin's own object."""
    (thing,) = (thing for thing in kustomize.render(directory).objects if thing["kind"] == "DaemonSet")
    return thing


def pod_spec(directory: Path) -> Mapping[str, Any]:
    """The specification of the plugin's pods."""
    spec: Mapping[str, Any] = daemon_set(directory)["spec"]["template"]["spec"]
    return spec


def container(directory: Path) -> Mapping[str, Any]:
    """The plugin's own container."""
    (found,) = pod_spec(directory)["containers"]
    assert isinstance(found, dict)
    return found


def settings_of(directory: Path) -> Settings:
    """The settings that the daemon gets: all by variables, so that a command in the same container has them too."""
    found = container(directory)
    assert not found.keys() & {"args", "command"}
    loaded = load({}, {variable["name"]: variable["value"] for variable in found.get("env", ())})
    assert loaded.warnings == ()
    return loaded.settings


@pytest.fixture(scope="session")
def old_definitions() -> Mapping[str, Any]:
    """The schemas of Kubernetes 1.9, which allow no field that they do not know."""
    if not os.environ.get(OLD_SCHEMAS):
        pytest.skip(f"{OLD_SCHEMAS} is not set; `tox -e 3.13-all` sets it")
    directory = Path(os.environ[OLD_SCHEMAS]) / "kubernetes_validate/kubernetes-json-schema/v1.9.0-local-strict"
    definitions: Mapping[str, Any] = json.loads((directory / "_definitions.json").read_text())["definitions"]
    return definitions


def problems_in_old(thing: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[str]:
    """Return what Kubernetes 1.9 refuses in an object, a line each."""
    import jsonschema  # here and below, because it is only where `tox -e 3.13-all` is

    package = {"v1": "core.v1", "apps/v1": "apps.v1"}[thing["apiVersion"]]
    schema = {"$ref": f"#/definitions/io.k8s.api.{package}.{thing['kind']}", "definitions": definitions}
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(thing)]


class TestTaken:
    @each_source
    def test_by_kubernetes_1_9(self, source: Path, old_definitions: Mapping[str, Any]) -> None:
        """Nothing is newer than the oldest release that the manifests are for."""
        assert [problem for thing in objects(source) for problem in problems_in_old(thing, old_definitions)] == []

    @pytest.mark.parametrize("version", ["1.25", "1.37"])
    @each_source
    def test_by_current_kubernetes(self, source: Path, version: str) -> None:
        """Nothing has been taken out of the API since, or is misspelled."""
        import kubernetes_validate

        for thing in objects(source):
            kubernetes_validate.validate(thing, version, strict=True)

    @pytest.mark.parametrize("version", ["1.36", "1.37"])
    @pytest.mark.parametrize("source", [*DRA, *DRA_EXAMPLES], ids=lambda path: path.stem)
    def test_with_dynamic_resource_allocation(self, source: Path, version: str) -> None:
        """By the releases that have it, as far as their schemas go."""
        import kubernetes_validate

        for thing in objects(source):
            kubernetes_validate.validate(thing, version, strict=True)

    def test_the_checks_see_what_is_too_new_or_wrong(self, old_definitions: Mapping[str, Any]) -> None:
        """A field that came with 1.20, and one that never was."""
        import kubernetes_validate

        (thing,) = kustomize.load(plain.PLAIN)
        pod = thing["spec"]["template"]["spec"]
        pod["containers"][0]["startupProbe"] = pod["containers"][0]["livenessProbe"]
        assert "startupProbe" in " ".join(problems_in_old(thing, old_definitions))
        pod["containers"][0]["imagePolicy"] = "Always"
        with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
            kubernetes_validate.validate(thing, "1.25", strict=True)


@pytest.mark.parametrize("version", ["1.25", "1.37"])
@pytest.mark.parametrize("path", ["cluster-view/role.yaml", "components/own-namespace/namespace.yaml"])
def test_the_cluster_view_is_taken(path: str, version: str) -> None:
    """Kubernetes takes the role and the namespace. The role lets its holder read, in that namespace alone."""
    import kubernetes_validate

    for thing in kustomize.load(K8S / path):
        kubernetes_validate.validate(thing, version, strict=True)
        for rule in thing.get("rules", ()):
            assert (thing["kind"], thing["metadata"]["namespace"]) == ("Role", "sgpu")
            assert set(rule["verbs"]) <= {"list", "get"}


def combined(tmp_path: Path, overlay: str, *components: str) -> subprocess.CompletedProcess[str]:
    """What kubectl makes of an overlay with components, as a kustomization of one's own has them."""
    below = os.path.relpath(K8S, tmp_path)
    parts = {
        "resources": [f"{below}/overlays/{overlay}"],
        "components": [f"{below}/components/{c}" for c in components],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    command = ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(tmp_path)]
    return subprocess.run(command, capture_output=True, check=False, text=True)


@with_kubectl
def test_own_namespace(tmp_path: Path) -> None:
    """The component moves all of an overlay into the namespace, also the account with rights, and adds the role."""
    done = combined(tmp_path, "simulated", "service-account", "events", "own-namespace")
    things = list(yaml.safe_load_all(done.stdout))
    assert {thing["kind"] for thing in things} == {
        *("DaemonSet", "Namespace", "ResourceQuota", "Role", "ServiceAccount", "ClusterRole", "ClusterRoleBinding")
    }
    assert {thing["metadata"].get("namespace", "sgpu") for thing in things} == {"sgpu"}
    assert [each["namespace"] for thing in things for each in thing.get("subjects", ())] == ["sgpu"]


@with_kubectl
@pytest.mark.parametrize(
    ("overlay", "components"),
    [
        ("simulated", ["service-account", "events"]),
        ("host-driver", ["service-account", "node-labels-api", "events"]),
        ("dra-simulated", ["events", "node-labels-api"]),
    ],
    ids=["events", "both", "with DRA"],
)
def test_components_of_one_account(overlay: str, components: list[str], tmp_path: Path) -> None:
    """Rights are those of the account that the pods have, the settings fit, and Kubernetes takes all of it."""
    import kubernetes_validate

    done = combined(tmp_path, overlay, *components)
    things = list(yaml.safe_load_all(done.stdout))
    paths = (K8S / "components" / each for each in components)
    ours = kustomize.with_components(K8S / "overlays" / overlay, *paths)
    assert sorted(things, key=kustomize.identity) == sorted(ours, key=kustomize.identity)
    (account,) = (thing["metadata"] for thing in things if thing["kind"] == "ServiceAccount")
    subjects = [each for thing in things for each in thing.get("subjects", ())]
    assert {(each["name"], each["namespace"]) for each in subjects} == {(account["name"], account["namespace"])}
    (pod,) = (thing["spec"]["template"]["spec"] for thing in things if thing["kind"] == "DaemonSet")
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == (account["name"], True)
    env = {each["name"]: each for each in pod["containers"][0]["env"]}
    assert env["SGPU_NODE_NAME"]["valueFrom"]["fieldRef"] == {"fieldPath": "spec.nodeName"}
    for thing in things:
        kubernetes_validate.validate(thing, "1.37", strict=True)


@with_kubectl
def test_two_accounts(tmp_path: Path) -> None:
    """The overlays with DRA have an account; another one is refused instead of being added in silence."""
    done = combined(tmp_path, "dra", "service-account")
    assert done.returncode
    assert "already registered id: ServiceAccount" in done.stderr


def test_rights_of_components() -> None:
    """Events can be created and nothing else; Nodes only where the policy holds sgpu to what it writes."""
    for name, right in (("events", (["events"], ["create"])), ("node-labels-api", (["nodes"], ["get", "patch"]))):
        role, _ = kustomize.load(K8S / f"components/{name}/rbac.yaml")
        assert [(rule["resources"], rule["verbs"]) for rule in role["rules"]] == [right]
    policy, binding = kustomize.load(K8S / "components/node-labels-api/admission.yaml")
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
    *_, labels, notes, _ = (each["expression"] for each in policy["spec"]["validations"])
    assert re.findall(r'startsWith\("(.*?)"\)', labels) == [*node_labels.OURS, *node_labels.OURS]
    assert re.findall(r'key == "(.*?)"', notes) == [node_labels.ANNOTATION] * 2
    for namespace in ("kube-system", "sgpu"):  # and where the component `own-namespace` moves it
        assert f'"system:serviceaccount:{namespace}:sgpu"' in policy["spec"]["matchConditions"][0]["expression"]


class TestRendered:
    def test_the_plain_file_is_made_from_the_base(self) -> None:
        """`tox -e generate` makes it anew."""
        assert plain.PLAIN.read_text() == plain.plain(), "k8s/daemonset.yaml is out of date: run `tox -e generate`"
        assert tuple(kustomize.load(plain.PLAIN)) == kustomize.render(BASE).objects

    @pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not there")
    @pytest.mark.parametrize("directory", KUSTOMIZATIONS, ids=lambda path: str(path.relative_to(K8S)))
    def test_kubectl_makes_the_same_of_it(self, directory: Path) -> None:
        """Our kustomize gives what kubectl would apply."""
        rendered = kustomize.render(directory)
        if rendered.remote:
            pytest.skip(f"needs {rendered.remote[0]}")
        output = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=True).stdout
        made = sorted(yaml.safe_load_all(output), key=kustomize.identity)  # kubectl sorts by kind
        assert made == sorted(rendered.objects, key=kustomize.identity)

    def test_what_others_publish_is_pinned(self) -> None:
        """To a commit: what an overlay applies does not change by itself."""
        pinned = r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/[\w./-]+\.yaml"
        addresses = [address for directory in OVERLAYS for address in kustomize.render(directory).remote]
        assert addresses
        assert [address for address in addresses if not re.fullmatch(pinned, address)] == []

    def test_the_readme_names_each_overlay_and_component(self) -> None:
        """And the first look, which takes one command."""
        assert {path.name for path in OVERLAYS} == {
            *("alerts", "gke-cos", "gke-ubuntu", "host-driver", "monitoring", "simulated", "dra", "dra-simulated")
        }
        readme = (K8S.parent / "README.md").read_text()
        for path in OVERLAYS:
            assert f"k8s/overlays/{path.name}" in readme
        for path in (K8S / "components").iterdir():
            assert f"[`{path.name}`]" in readme
        assert f"kubectl apply -k {FIRST_LOOK.relative_to(K8S.parent)}" in readme

    def test_the_readme_names_what_to_look_at(self) -> None:
        """The labels of nodes that a DaemonSet selects, and the container that a pod which does not start waits for."""
        readme = (K8S.parent / "README.md").read_text()
        affinity = daemon_set(BASE)["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        labels = {each["key"] for each in term["matchExpressions"]}
        assert set(re.findall(r"get nodes -L (\S+)", readme)[0].split(",")) == labels
        (init,) = pod_spec(K8S / "overlays/host-driver")["initContainers"]
        assert f"logs POD -c {init['name']}`" in readme


class TestPlugin:
    @each_running
    def test_what_the_settings_name_is_mounted(self, directory: Path) -> None:
        """The kubelet's sockets, the state, and what the driver has: at the same path inside, where pods get it too."""
        settings = settings_of(directory)
        volumes = {volume["name"]: volume["hostPath"]["path"] for volume in pod_spec(directory)["volumes"]}
        #: For each directory in the container, the one of the host and whether it can be written to.
        mounted = {
            mount["mountPath"]: (volumes[mount["name"]], not mount.get("readOnly", False))
            for mount in container(directory)["volumeMounts"]
        }
        assert mounted[settings.plugin_directory] == ("/var/lib/kubelet/device-plugins", True)
        pod_resources = str(Path(settings.pod_resources_socket).parent)
        assert mounted[pod_resources] == (pod_resources, False)
        for file in (settings.state_file, settings.status_socket):
            assert mounted[str(Path(file).parent)] == ("/run/sgpu", True)
        # /run is empty after a reboot.
        assert mounted[str(Path(settings.cordon_file).parent)] == ("/var/lib/sgpu", True)
        if not settings.simulate:
            assert mounted[settings.dev_directory] == ("/dev", True)
            assert mounted[settings.host_path] == (settings.host_path, False)

    @each_running
    def test_it_may_no_more_than_it_needs(self, directory: Path) -> None:
        """Privileged for the driver's sake only."""
        pod, found = pod_spec(directory), container(directory)
        simulated = settings_of(directory).simulate > 0
        assert pod["automountServiceAccountToken"] is False
        assert pod["priorityClassName"] == "system-node-critical"
        assert not pod.get("hostNetwork")
        assert pod.get("hostPID", False) is not simulated
        for each in (found, *pod.get("initContainers", ())):
            security = each["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            if each is not found or simulated:
                assert not security.get("privileged")
                assert security["allowPrivilegeEscalation"] is False
                assert security["capabilities"] == {"drop": ["ALL"]}

    @each_running
    def test_probes_and_scrapes_ask_where_the_daemon_answers(self, directory: Path) -> None:
        """At the port of -metrics-address; that the paths are served there, on_cluster.py shows."""
        found, address = container(directory), split_address(settings_of(directory).metrics_address)
        assert address
        assert found["ports"] == [{"name": "metrics", "containerPort": address[1]}]
        assert found["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        readiness = found["readinessProbe"]
        assert readiness["httpGet"] == {"path": "/readyz", "port": "metrics"}
        # sgpu listens after a second: no earlier, or a new pod has a failed probe, and soon, or it is Ready late.
        assert (readiness["initialDelaySeconds"], readiness["periodSeconds"]) == (2, 2)
        annotations = daemon_set(directory)["spec"]["template"]["metadata"]["annotations"]
        assert (annotations["prometheus.io/port"], annotations["prometheus.io/path"]) == (str(address[1]), "/metrics")

    @each_running
    def test_all_of_its_containers_are_ours(self, directory: Path) -> None:
        """Of this version, with options that they take, and the daemon's settings, so that both mean one directory."""
        init_containers = pod_spec(directory).get("initContainers", ())
        images = {each["image"] for each in (container(directory), *init_containers)}
        assert images == {f"sgpu:{__version__}"}
        for each in init_containers:
            name, *flags = each["args"]
            parsed = parse_flags(flags, {option: about.kind for option, about in COMMANDS[name].options.items()})
            assert not parsed.positional
            assert each["env"] == container(directory)["env"]

    @pytest.mark.parametrize("overlay", ["gke-cos", "gke-ubuntu"])
    def test_the_installer_s_directory_is_the_installer_s_to_make(self, overlay: str) -> None:
        """Ubuntu's makes a link there, and fails where there is a directory already."""
        volumes = pod_spec(K8S / "overlays" / overlay)["volumes"]
        types = {volume["hostPath"]["path"]: volume["hostPath"].get("type") for volume in volumes}
        assert types["/home/kubernetes/bin/nvidia"] == "Directory"
        assert not [path for path, kind in types.items() if kind == "DirectoryOrCreate" and path.startswith("/home")]


class TestSurge:
    @pytest.fixture
    def surging(self, directory: Path, tmp_path: Path) -> Path:
        """This overlay with the component, as docs/install.md shows."""
        parts = {"resources": [os.path.relpath(directory, tmp_path)], "components": [os.path.relpath(SURGE, tmp_path)]}
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
        return tmp_path

    @each_running
    def test_a_new_pod_stands_by(self, directory: Path, surging: Path) -> None:
        """The old one stops once the new one is Ready. All else is as it was, and Kubernetes 1.25 takes it."""
        import kubernetes_validate

        after = daemon_set(surging)
        kubernetes_validate.validate(after, "1.25", strict=True)
        kubernetes_validate.validate(after, "1.37", strict=True)
        assert after["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert settings_of(surging) == attrs.evolve(settings_of(directory), standby=True)
        assert not pod_spec(surging).get("hostNetwork")
        assert not any("hostPort" in port for port in container(surging)["ports"])

    @pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not there")
    @pytest.mark.parametrize("directory", [BASE], ids=["base"])
    def test_kubectl_makes_the_same_of_it(self, surging: Path) -> None:
        """Our kustomize gives what kubectl would apply."""
        output = subprocess.run(["kubectl", "kustomize", surging], capture_output=True, text=True, check=True).stdout
        assert tuple(yaml.safe_load_all(output)) == kustomize.render(surging).objects


@pytest.mark.parametrize("directory", DRA, ids=lambda path: path.name)
class TestDra:
    def test_what_differs(self, directory: Path) -> None:
        """The API server's token, the kubelet's directories at the same paths, and CDI; all else is as without it."""
        before, after = pod_spec(DRA[directory]), pod_spec(directory)
        assert after["automountServiceAccountToken"] is True
        assert {key for key in after if after[key] != before.get(key)} == {
            *("automountServiceAccountToken", "serviceAccountName", "containers", "volumes")
        }
        (old,), (new,) = before["containers"], after["containers"]
        added = {key: [each for each in new[key] if each not in old[key]] for key in new if new[key] != old[key]}
        assert added.keys() == {"env", "volumeMounts"}
        assert [variable["name"] for variable in added["env"]] == ["SGPU_API", "SGPU_NODE_NAME"]
        paths = {volume["name"]: volume["hostPath"]["path"] for volume in after["volumes"]}
        assert {mount["mountPath"]: paths[mount["name"]] for mount in added["volumeMounts"]} == {
            path: path
            for path in ("/var/lib/kubelet/plugins_registry", f"/var/lib/kubelet/plugins/{DRIVER}", "/var/run/cdi")
        }

    def test_the_class_selects_what_is_published(self, directory: Path) -> None:
        """By the driver's name, and by attributes that every device has."""
        (found,) = (thing for thing in kustomize.render(directory).objects if thing["kind"] == "DeviceClass")
        (selector,) = found["spec"]["selectors"]
        assert found["spec"]["extendedResourceName"] == SHARE
        wanted = {"type": DEVICE_TYPE, "resource": SHARE}
        terms = [f'device.attributes["{DRIVER}"].{name} == "{value}"' for name, value in wanted.items()]
        assert selector["cel"]["expression"].split(" && ") == [f'device.driver == "{DRIVER}"', *terms]

    def test_rights_and_the_policy_are_of_the_same_account(self, directory: Path) -> None:
        """Else one of them would be without effect."""
        rendered = {thing["kind"]: thing for thing in kustomize.render(directory).objects}
        account = pod_spec(directory)["serviceAccountName"]
        subject = {"kind": "ServiceAccount", "name": account, "namespace": "kube-system"}
        assert rendered["ClusterRoleBinding"]["subjects"] == [subject]
        (condition,) = rendered["ValidatingAdmissionPolicy"]["spec"]["matchConditions"]
        assert f'"system:serviceaccount:kube-system:{account}"' in condition["expression"]
        assert rendered["ServiceAccount"]["metadata"] == {"name": account, "namespace": "kube-system"}
        verbs = {rule["resources"][0]: rule["verbs"] for rule in rendered["ClusterRole"]["rules"]}
        assert verbs.keys() == {"resourceclaims", "resourceslices", "nodes"}
        assert {verb for each in verbs.values() for verb in each}.isdisjoint({"*", "patch", "deletecollection"})


class TestBeside:
    def test_the_pod_monitor_finds_the_pods_and_keeps_what_the_metrics_name(self) -> None:
        """Pods that use a GPU are in labels of the series; `instance`, the dashboard's Node, is the node."""
        (monitor,) = kustomize.render(K8S / "overlays" / "monitoring").objects
        pods, selector = daemon_set(BASE), monitor["spec"]["selector"]["matchLabels"]
        assert monitor["metadata"]["namespace"] == pods["metadata"]["namespace"]
        assert selector.items() <= pods["spec"]["template"]["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in [port["name"] for port in container(BASE)["ports"]]
        assert endpoint["honorLabels"] is True
        node = {"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "instance"}
        assert endpoint["relabelings"] == [node]

    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
    def test_examples_ask_for_shares_and_tolerate_the_taints(self, path: Path) -> None:
        """GKE's, and the one that the README proposes."""
        asking = 0
        for thing in kustomize.load(path):
            pod = thing["spec"] if thing["kind"] == "Pod" else thing.get("spec", {}).get("template", {}).get("spec")
            if pod:
                asking += sum(SHARE in each["resources"]["limits"] for each in pod["containers"])
                assert {"nvidia.com/gpu", SHARE} <= {each["key"] for each in pod["tolerations"]}
        assert asking

    def test_the_first_look(self) -> None:
        """The simulated overlay as it is, and a pod that asks for what it offers."""
        plugin, pod = kustomize.render(FIRST_LOOK).objects
        assert plugin == daemon_set(K8S / "overlays" / "simulated")
        assert pod["spec"]["containers"][0]["resources"]["limits"] == {SHARE: "1"}


def test_the_example_of_a_config_file(tmp_path: Path) -> None:
    """It is mounted where the variable says, and the daemon takes it."""
    found = container(CONFIGURED)
    (path,) = (variable["value"] for variable in found["env"] if variable["name"] == "SGPU_CONFIG")
    assert str(Path(path).parent) in [mount["mountPath"] for mount in found["volumeMounts"]]
    (config_map,) = (thing for thing in kustomize.render(CONFIGURED).objects if thing["kind"] == "ConfigMap")
    file = tmp_path / Path(path).name
    file.write_text(config_map["data"][file.name])
    assert load({"config": str(file)}, {}).policy.rules
