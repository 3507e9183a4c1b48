"""With `-api dra` or `auto`: the way that GPUs are offered, the driver's sockets, the directory of CDI files, and what
the API server has of this node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import trio

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.host import why_not_writable
from sgpu.commands.doctor.kubelet import Daemon
from sgpu.commands.doctor.peer import call
from sgpu.config.load import Loaded
from sgpu.config.settings import Settings
from sgpu.dra.choice import Choice
from sgpu.dra.registrar import sockets
from sgpu.dra.slices import DRIVER, MANIFEST, PATH
from sgpu.lib.quantity import parse_quantity
from sgpu.observe.client import NoAnswerError, fetch

CHOICE_SUBJECT = "-api auto"
DRIVER_SUBJECT = "DRA driver"
CDI_SUBJECT = "CDI directory"
API_SUBJECT = "API server"
#: Seconds for all that the API server is asked, and for the daemon.
TIMEOUT = 5.0
STATUS_TIMEOUT = 2.0


@attrs.frozen
class Chosen:
    """How GPUs are offered, as `-api` names it, and what to say of it."""

    api: str
    finding: Finding


async def find_chosen(loaded: Loaded) -> Chosen:
    """Return what the daemon has chosen with `-api auto`; where none answers, what it would choose now."""
    from sgpu.dra import auto  # here, because it brings HTTP and TLS

    try:
        snapshot = await trio.to_thread.run_sync(fetch, loaded.settings.status_socket, STATUS_TIMEOUT)
        if snapshot.api:
            return Chosen(snapshot.api, ok(CHOICE_SUBJECT, f"{snapshot.api}: {snapshot.api_reason}"))
        problem = "the daemon has not chosen yet"
    except NoAnswerError as error:
        problem = str(error)
    choice = Choice(dra=False, reason=f"the API server or the kubelet does not answer within {TIMEOUT:g} s")
    with trio.move_on_after(TIMEOUT):
        choice = await auto.decide(loaded.settings, loaded.policy, patience=0)
    api = "dra" if choice.dra else "device-plugin"
    advice = f"as things are, it would take {api}: {choice.reason}"
    return Chosen(api, warn(CHOICE_SUBJECT, problem, advice))


async def find_driver(settings: Settings) -> Daemon:
    """Find the daemon that serves the driver's registration."""
    choices = sockets(Path(settings.dra_plugin_directory), Path(settings.dra_registry_directory))
    for path in (each.registration for each in choices):
        peer = await call(path, "/pluginregistration.Registration/GetInfo")
        if peer.answered:
            process = f", process {peer.pid}" if peer.pid else ""
            return Daemon(DRIVER, ok(DRIVER_SUBJECT, f"it serves on {path}{process}"), peer)
        if not (peer.absent or peer.refused):
            finding = fail(DRIVER_SUBJECT, f"{path}: {peer.message}", "restart its pod, and see its log")
            return Daemon(DRIVER, finding, peer)
    message = f"no daemon serves {DRIVER} on this node (nobody listens on {choices[0].registration})"
    advice = "is it running, with these settings? Its log says what it waits for; pods that end wait for it"
    return Daemon(DRIVER, fail(DRIVER_SUBJECT, message, advice), peer)


def check_cdi(directory: Path) -> Finding:
    """Check that CDI files can be written."""
    if problem := why_not_writable(directory):
        advice = "mount the node's /var/run/cdi there, writable, or set -cdi-directory; it must be the runtime's"
        return fail(CDI_SUBJECT, f"{directory}: {problem}", advice)
    return ok(CDI_SUBJECT, f"{directory} is writable; the container runtime has to read it (containerd 2, CRI-O)")


async def check_api_server(settings: Settings, environment: Mapping[str, str], resources: Collection[str]) -> Finding:
    """Check that the API server answers, that no device plugin has the resources, and what is published."""
    from sgpu.kubeapi import ApiServerError, find_access, open_api_server  # here, because they bring HTTP and TLS

    if not settings.node_name:
        return skip(API_SUBJECT, "because -node-name is not set")
    try:
        with trio.fail_after(TIMEOUT):
            async with open_api_server(find_access(settings.api_server, environment, "-api dra", MANIFEST)) as api:
                node = await api.get(f"/api/v1/nodes/{settings.node_name}")
                selector = f"spec.driver={DRIVER},spec.nodeName={settings.node_name}"
                listed = await api.get(PATH, {"fieldSelector": selector})
    except ApiServerError as error:
        return fail(API_SUBJECT, str(error), "sgpu publishes GPUs and reads claims there: see docs/dra.md")
    except trio.TooSlowError:
        return fail(API_SUBJECT, f"it did not answer within {TIMEOUT:g} s", "see its log, and the node's network")
    return judge(node, listed, resources)


def judge(node: Mapping[str, Any], listed: Mapping[str, Any], resources: Collection[str]) -> Finding:
    """Return what the Node and the node's slices say."""
    allocatable = node.get("status", {}).get("allocatable") or {}
    live = [name for name in resources if parse_quantity(str(allocatable.get(name, "0")))]
    if live:
        advice = "stop that plugin, or use -api device-plugin: one resource can't be offered both ways"
        return fail(API_SUBJECT, f"a device plugin offers {', '.join(live)} on this node", advice)
    devices = list(_devices(listed))
    if not devices:
        advice = "the daemon's log says why; a kubelet that starts deletes them, and they are back within seconds"
        return fail(API_SUBJECT, "no ResourceSlice has a device of this node", advice)
    exclusive = [str(each["name"]) for each in devices if not each.get("allowMultipleAllocations")]
    if exclusive:
        advice = "turn on the feature gate DRAConsumableCapacity (on from Kubernetes 1.36 on)"
        return fail(API_SUBJECT, f"it would give all of {', '.join(exclusive)} to one pod", advice)
    tainted = [str(each["name"]) for each in devices if each.get("taints")]
    if tainted:
        advice = "they get no new pods: `kubectl get resourceslices -o yaml` says why"
        return warn(API_SUBJECT, f"{len(devices)} device(s) published, with taints: {', '.join(tainted)}", advice)
    return ok(API_SUBJECT, f"it has {len(devices)} device(s) of this node")


def _devices(listed: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for each in listed.get("items") or ():
        yield from each["spec"].get("devices") or ()
