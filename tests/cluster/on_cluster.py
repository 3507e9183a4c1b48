"""The simulated overlay on a real cluster: offered, allocated, restarted under running pods, and gone without a trace.

`tox -e cluster` runs it against whatever KUBECONFIG points to; the suite does not collect files of this name.
SGPU_IMAGE is the image of sgpu that the nodes have or can pull, SGPU_POD_IMAGE one with a shell for the pods. Whatever
happens but SIGKILL, what was made is deleted again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import yaml

from sgpu import __version__
from sgpu.config.settings import Settings

pytestmark = [
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG is not set"),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not there"),
]

K8S: Final = Path(__file__).parent.parent.parent / "k8s"
IMAGE: Final = os.environ.get("SGPU_IMAGE") or f"sgpu:{__version__}"
POD_IMAGE: Final = os.environ.get("SGPU_POD_IMAGE") or "busybox"
RESOURCE: Final = Settings().resource_name
#: As the overlay simulates them.
GPUS: Final = 2
SHARES: Final = GPUS * Settings().gpu_duplication_factor
#: Seconds for anything that a cluster is asked for: images are pulled, and kubelets report every 10 s at times.
TIMEOUT: Final = 180


def kubectl(*arguments: str | Path, given: str | None = None) -> str:
    """Return kubectl's output. Raises AssertionError with its error."""
    # A session of its own: Ctrl-C is for us, and must not end the kubectl that cleans up.
    done = subprocess.run(
        ["kubectl", *map(str, arguments)],
        input=given,
        capture_output=True,
        text=True,
        timeout=TIMEOUT + 30,
        start_new_session=True,
    )
    assert done.returncode == 0, f"kubectl {' '.join(map(str, arguments))}: {done.stderr}{done.stdout}"
    return done.stdout


def get(*arguments: str) -> Mapping[str, Any]:
    """An object or a list of them."""
    answer: Mapping[str, Any] = json.loads(kubectl("get", "-o", "json", *arguments))
    return answer


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    """Wait until the cluster is as it should be."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"not seen within {TIMEOUT} s: {what}\n{state()}"
        time.sleep(0.5)


def state() -> str:
    """Return the cluster's state, for a failed test."""
    commands = ("get pods -A -o wide", "-n kube-system describe pods -l app=sgpu", "-n kube-system logs -l app=sgpu")
    runs = [subprocess.run(["kubectl", *line.split()], capture_output=True, text=True) for line in commands]
    return "\n".join(f"{run.stdout}{run.stderr}" for run in runs)


def allocatable() -> dict[str, int]:
    """How many shares can be had, by node."""
    nodes = get("nodes")["items"]
    return {node["metadata"]["name"]: int(node["status"]["allocatable"].get(RESOURCE, 0)) for node in nodes}


def plugin_pods() -> list[Mapping[str, Any]]:
    """The pods of the DaemonSet."""
    return list(get("pods", "-n", "kube-system", "-l", "app=sgpu")["items"])


def is_offered() -> bool:
    """Return whether every node that runs the plugin has all of its shares."""
    nodes = {pod["spec"].get("nodeName") for pod in plugin_pods()}
    there = allocatable()
    return bool(nodes) and all(there.get(node) == SHARES for node in nodes)


@attrs.frozen
class Cluster:
    """The cluster, with the overlay applied and a namespace for our pods."""

    overlay: Path
    namespace: str

    def start_pod(self, name: str, shares: int) -> None:
        """Start a pod that prints its environment and stays."""
        container = {
            "name": "main",
            "image": POD_IMAGE,
            "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", "env; trap exit TERM; sleep 3600 & wait"],
            "resources": {"limits": {RESOURCE: str(shares)}},
        }
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {"tolerations": [{"operator": "Exists"}], "containers": [container]},
        }
        kubectl("-n", self.namespace, "create", "-f", "-", given=json.dumps(pod))

    def running(self, name: str) -> tuple[str, int]:
        """The id of the pod's container and how often it was restarted, once it runs."""

        def runs() -> bool:
            status = get("pod", "-n", self.namespace, name)["status"]
            assert status["phase"] in ("Pending", "Running"), f"{name}: {status}"
            return any("running" in each["state"] for each in status.get("containerStatuses", ()))

        wait_until(f"{name} runs", runs)
        (status,) = get("pod", "-n", self.namespace, name)["status"]["containerStatuses"]
        return str(status["containerID"]), int(status["restartCount"])

    def environment(self, name: str) -> dict[str, str]:
        """Return the pod's log."""
        self.running(name)
        wait_until(f"{name} has printed", lambda: "SGPU_SHARES=" in kubectl("-n", self.namespace, "logs", name))
        lines = kubectl("-n", self.namespace, "logs", name).splitlines()
        return dict(line.split("=", 1) for line in lines if line.startswith("SGPU_"))


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, which lets pytest take fixtures down."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Neither Ctrl-C nor SIGTERM ends this part."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def our_overlay() -> dict[str, Any]:
    """The simulated overlay with the image under test, as a kustomization."""
    name, at, digest = IMAGE.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, ""
    image = {"name": "sgpu", "newName": repository, **({"digest": digest} if at else {"newTag": tag or "latest"})}
    pull = [{"op": "add", "path": "/spec/template/spec/containers/0/imagePullPolicy", "value": "IfNotPresent"}]
    return {"images": [image], "patches": [{"target": {"kind": "DaemonSet"}, "patch": json.dumps(pull)}]}


def delete(cluster: Cluster) -> None:
    """Delete what is there of ours, and wait until it is gone, the shares as well."""
    gone = ("--ignore-not-found", f"--timeout={TIMEOUT}s")
    try:
        kubectl("delete", "namespace", cluster.namespace, *gone)
    finally:
        kubectl("delete", "-k", cluster.overlay, "--cascade=foreground", *gone)
    wait_until("no shares", lambda: not any(allocatable().values()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster with the overlay applied. Nothing is touched where there is a plugin already."""
    assert not get("daemonsets", "-A", "-l", "app=sgpu")["items"], "sgpu is on this cluster: this would delete it"
    assert not any(allocatable().values()), f"another plugin offers {RESOURCE}: two would disturb each other"
    directory = tmp_path_factory.mktemp("overlay")
    overlay = {"resources": [os.path.relpath(K8S / "overlays" / "simulated", directory)], **our_overlay()}
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    made = Cluster(directory, f"sgpu-test-{secrets.token_hex(4)}")
    with stopped_by_sigterm():
        try:
            kubectl("create", "namespace", made.namespace)
            kubectl("apply", "-k", made.overlay)
            yield made
        finally:
            with undisturbed():
                delete(made)


def test_the_api_server_takes_all_of_it(cluster: Cluster) -> None:
    """The plain file, the examples, and the overlays that fetch nothing; nothing is made."""
    files = [K8S / "daemonset.yaml", *sorted(K8S.glob("examples/*.yaml"))]
    for path in files:
        kubectl("apply", "--dry-run=server", "-n", "kube-system", "-f", path)
    for directory in (K8S / "overlays" / "host-driver", K8S / "examples" / "simulated"):
        kubectl("apply", "--dry-run=server", "-k", directory)


def test_each_node_offers_its_shares(cluster: Cluster) -> None:
    """As many as the simulated GPUs have."""
    wait_until(f"{SHARES} shares a node", is_offered)
    kubectl("-n", "kube-system", "rollout", "status", "daemonset/sgpu", f"--timeout={TIMEOUT}s")
    assert all("True" in conditions(pod, "Ready") for pod in plugin_pods())


def conditions(pod: Mapping[str, Any], kind: str) -> list[str]:
    """The status of a condition of a pod."""
    return [each["status"] for each in pod["status"]["conditions"] if each["type"] == kind]


@pytest.mark.parametrize(("name", "shares", "gpus"), [("one-share", 1, 1), ("three-shares", 3, 2)])
def test_pods_get_what_they_ask_for(cluster: Cluster, name: str, shares: int, gpus: int) -> None:
    """The environment says how many shares, of which GPUs, and how much memory they stand for."""
    cluster.start_pod(name, shares)
    environment = cluster.environment(name)
    assert environment["SGPU_SHARES"] == str(shares)
    assert environment["SGPU_SIMULATED"] == "1"
    uuids = environment["SGPU_GPU_UUIDS"].split(",")
    assert len(set(uuids)) == gpus
    assert all(uuid.startswith("GPU-") for uuid in uuids)
    assert int(environment["SGPU_MEMORY_BYTES"]) > 0
    assert is_offered()  # allocatable is what can be had in all, used or not


def test_pods_run_on_when_the_plugin_restarts(cluster: Cluster) -> None:
    """It comes back with the same shares, and new pods get some."""
    before = {name: cluster.running(name) for name in ("one-share", "three-shares")}
    old = {pod["metadata"]["uid"] for pod in plugin_pods()}
    kubectl("-n", "kube-system", "rollout", "restart", "daemonset/sgpu")
    kubectl("-n", "kube-system", "rollout", "status", "daemonset/sgpu", f"--timeout={TIMEOUT}s")
    assert not old & {pod["metadata"]["uid"] for pod in plugin_pods()}
    wait_until(f"{SHARES} shares a node again", is_offered)
    assert {name: cluster.running(name) for name in before} == before
    cluster.start_pod("afterwards", 1)
    assert cluster.environment("afterwards")["SGPU_SHARES"] == "1"


def test_nothing_is_left(cluster: Cluster) -> None:
    """No object, no pod, no share."""
    delete(cluster)
    assert not get("daemonsets", "-A", "-l", "app=sgpu")["items"]
    assert not plugin_pods()
    assert cluster.namespace not in kubectl("get", "namespaces", "-o", "name")
