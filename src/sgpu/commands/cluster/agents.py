"""A list of pods, as the API server has it, → the daemons to ask, and their answers. Pure: knows no connection."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final
from urllib.parse import quote, urlencode

import attrs

from sgpu.observe.snapshot import Snapshot

#: Where the manifests have sgpu listen, should a pod not name its port.
PORT: Final = 2112
PORT_NAME: Final = "metrics"
#: Stands for all namespaces.
EVERYWHERE: Final = "*"
#: Phases of pods that have ended: the node has another one, or will have.
ENDED: Final = ("Succeeded", "Failed")


@attrs.frozen
class Agent:
    """A daemon's pod. `problem` says why it can't be asked, empty if it can."""

    node: str
    namespace: str
    pod: str
    port: int = PORT
    problem: str = ""

    @property
    def path(self) -> str:
        """Return the path of its status at the API server."""
        return f"/api/v1/namespaces/{quote(self.namespace)}/pods/{quote(self.pod)}:{self.port}/proxy/status"


@attrs.frozen
class Answer:
    """A daemon's answer: its status, or the problem in its place."""

    node: str
    namespace: str
    pod: str
    problem: str
    snapshot: Snapshot | None


def list_path(namespace: str, selector: str) -> str:
    """Return the path of the list of daemons' pods. `namespace` may be EVERYWHERE."""
    place = "" if namespace == EVERYWHERE else f"namespaces/{quote(namespace)}/"
    return f"/api/v1/{place}pods?{urlencode({'labelSelector': selector})}"


def parse_agents(body: bytes) -> tuple[Agent, ...]:
    """Return the daemons in a PodList: those that have not ended and have a node. Raises ValueError."""
    try:
        pods = json.loads(body)["items"]
        return tuple(_agent(pod) for pod in pods if pod["spec"].get("nodeName") and _phase(pod) not in ENDED)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a list of pods: {error!r}") from error


def on_nodes(agents: Iterable[Agent], pattern: str) -> tuple[Agent, ...]:
    """Return those on nodes of this name, or pattern as in `gpu-*`; all of them where it is empty."""
    return tuple(agent for agent in agents if not pattern or fnmatchcase(agent.node, pattern))


def _agent(pod: Mapping[str, Any]) -> Agent:
    ports = [port for container in pod["spec"].get("containers", ()) for port in container.get("ports", ())]
    named = [port["containerPort"] for port in ports if port.get("name") == PORT_NAME]
    return Agent(
        node=pod["spec"]["nodeName"],
        namespace=pod["metadata"]["namespace"],
        pod=pod["metadata"]["name"],
        port=named[0] if named else PORT,
        problem=_problem(pod),
    )


def _phase(pod: Mapping[str, Any]) -> str:
    return str(pod.get("status", {}).get("phase", ""))


def _problem(pod: Mapping[str, Any]) -> str:
    """Return why the pod does not run, as in `its pod is Pending: ImagePullBackOff`."""
    status = pod.get("status", {})
    if _phase(pod) == "Running" and status.get("podIP"):
        return ""
    states = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    waiting = [state["state"]["waiting"] for state in states if "waiting" in state.get("state", {})]
    reasons = [each["reason"] for each in waiting if each.get("reason", "PodInitializing") != "PodInitializing"]
    why = f": {reasons[0]}" if reasons else ""
    return f"its sgpu pod {pod['metadata']['name']} is {_phase(pod) or 'not started'}{why}"
