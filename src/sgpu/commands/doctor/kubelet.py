"""The kubelet and what is registered with it, seen without registering, and without a stream that others would lose.

Of other plugins only the options are asked: a second ListAndWatch takes events from the kubelet's in some of them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs
import trio
from purerpc import StatusCode

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.host import why_not_writable
from sgpu.commands.doctor.peer import Peer, call, failure
from sgpu.commands.doctor.silence import silence
from sgpu.config.settings import Settings, endpoint
from sgpu.deviceplugin.registration import SOCKET
from sgpu.deviceplugin.session import is_removed
from sgpu.lib.logs import few
from sgpu.node.container import STALE_ADVICE
from sgpu.node.gpu import Gpu, label
from sgpu.pods import holders
from sgpu.pods.checkpoint import FILE, Checkpoint, read_checkpoint, strangers
from sgpu.pods.held import Held, other_uses
from sgpu.pods.holders import PodResourcesError
from sgpu.pods.stale import stale_answers
from sgpu.pods.unlisted import Unlisted

#: No kubelet has it: the answer to it is all that is wanted.
HARMLESS: Final = "/v1beta1.Registration/Doctor"
OPTIONS: Final = "/v1beta1.DevicePlugin/GetDevicePluginOptions"
_TWO_PLUGINS: Final = (
    "two plugins that offer one GPU give it away twice, and two with one resource name disturb each other: remove the "
    "other one, or exclude GPUs by `gpus` rules, so that each is offered once"
)
#: Seconds for the PodResources API.
TIMEOUT: Final = 3.0


def check_directory(directory: Path) -> Finding:
    """Check that a socket can be created there, without creating one."""
    if problem := why_not_writable(directory):
        place = "/var/lib/kubelet/device-plugins of the host"
        advice = f"set -plugin-directory to the kubelet's: in a pod, to where {place} is mounted, writable for root"
        return fail("plugin directory", f"{directory}: {problem}", advice)
    if is_removed(directory):
        message = f"{directory} was removed on the host, and this container keeps seeing the removed one"
        return fail("plugin directory", message, "restart this pod: delete it")
    return ok("plugin directory", f"{directory} is writable")


async def check_kubelet(directory: Path) -> Finding:
    """Check that a kubelet answers on kubelet.sock."""
    path = directory / SOCKET
    peer = await call(path, HARMLESS)
    if peer.absent:
        return fail(
            SOCKET,
            f"there is none in {directory}, so it is not a kubelet's plugin directory",
            "set -plugin-directory to (the mount of) the kubelet's, <root-dir>/device-plugins; is the kubelet running?",
        )
    if peer.code is StatusCode.UNIMPLEMENTED:
        return ok(SOCKET, f"the kubelet answers on {path}")
    return fail(SOCKET, f"{path}: {peer.message}", "restart the kubelet (`systemctl restart kubelet`) and see its log")


@attrs.frozen
class Daemon:
    """The daemon that answers on sgpu's socket of a resource, if any."""

    resource: str
    finding: Finding
    peer: Peer

    @property
    def serves(self) -> bool:
        return self.peer.answered


async def find_daemon(directory: Path, resource: str, proc: Path) -> Daemon:
    """Find the daemon that serves this resource. `proc` is where its process is visible."""
    subject = f"daemon for {resource}"
    path = directory / endpoint(resource)
    peer = await call(path, OPTIONS)
    if peer.absent:
        advice = "is it running, with these settings? Its log says what it waits for"
        return Daemon(resource, warn(subject, f"no daemon serves it on this node (no {path})", advice), peer)
    if peer.answered:
        process = f", process {peer.pid}" if peer.pid else ""
        return Daemon(resource, ok(subject, f"it serves on {path}{process}"), peer)
    if peer.refused:
        message = f"it is gone and left {path} behind"
        return Daemon(resource, warn(subject, message, "start it; it removes what it left"), peer)
    seen = await trio.to_thread.run_sync(silence, proc, peer.pid, abandon_on_cancel=True)
    why, advice = seen or (f"{path}: {peer.message}", "restart its pod, and see its log")
    return Daemon(resource, fail(subject, why, advice), peer)


def other_plugins(directory: Path, resources: Sequence[str]) -> list[Path]:
    """Return the sockets in the plugin directory that are neither the kubelet's nor ours."""
    ours = {SOCKET, *map(endpoint, resources)}
    if not directory.is_dir():
        return []
    return [path for path in sorted(directory.iterdir()) if path.name not in ours and _is_socket(path)]


async def check_others(directory: Path, paths: Sequence[Path]) -> Finding:
    """Check whether those plugins live. Their resources can't be asked for without disturbing them."""
    subject = "other plugins"
    peers: dict[str, Peer] = {}

    async def ask(path: Path) -> None:
        peers[path.name] = await call(path, OPTIONS)

    async with trio.open_nursery() as nursery:
        for path in paths:
            nursery.start_soon(ask, path)
    alive = [path.name for path in paths if not peers[path.name].refused]
    left = [path.name for path in paths if peers[path.name].refused]
    message = f"{', '.join(alive) or 'none'} in {directory}"
    if left:
        message += f"; left behind by plugins that are gone: {', '.join(left)}"
    rivals = [name for name in alive if _may_be_rival(name)]
    if rivals:
        return warn(
            subject,
            f"{message}; {', '.join(rivals)} may offer the same GPUs",
            _TWO_PLUGINS,
        )
    return ok(subject, message)


def check_registration(directory: Path, daemon: Daemon) -> Iterator[Finding]:
    """Check that the devices that the kubelet has under this resource name, by its checkpoint, are sgpu's."""
    subject = f"registration of {daemon.resource}"
    try:
        checkpoint = read_checkpoint(directory)
    except FileNotFoundError:
        yield skip(subject, f"because the kubelet has no record {directory / FILE}")
        return
    except (OSError, ValueError) as error:
        message = f"the kubelet's record {directory / FILE} can't be read: {failure(error)}"
        advice = "is it the kubelet's? It writes it anew when a plugin registers: restart this pod"
        yield warn(subject, f"{message}; shares that init containers have may be withheld", advice)
        return
    healthy = checkpoint.healthy.get(daemon.resource, ())
    if strange := strangers(healthy):
        message = f"the kubelet last had {len(strange)} device(s) of it that are not sgpu's, as {strange[0]}"
        advice = "remove the other device plugin of that name from the node, or choose another -resource-name"
        yield (fail if daemon.serves else warn)(subject, message, advice)
    elif not daemon.serves:
        of_before = f", and the kubelet's record of {len(healthy)} device(s) is from before" if healthy else ""
        yield skip(subject, f"because no daemon serves it{of_before}")
    elif healthy:
        yield ok(subject, f"the kubelet has {len(healthy)} healthy device(s), all of them sgpu's")
    else:
        message = "the kubelet has no healthy device of it, so allocatable is 0"
        advice = "the lines above say which GPU is not well, the daemon's log why, or what keeps it from registering"
        yield fail(subject, message, advice)
    if strange := strangers(checkpoint.held.get(daemon.resource, ())):
        message = f"containers still have {len(strange)} device(s) that are not sgpu's, as {strange[0]}"
        advice = "they run on, and fail to start after a reboot: drain the node once, or delete their pods"
        yield warn(subject, message, advice)


async def check_pod_resources(settings: Settings, resources: Sequence[str]) -> tuple[Finding, Held | None]:
    """Check that the kubelet lists which container has which share; returns what it lists as well."""
    subject, path = "PodResources", Path(settings.pod_resources_socket)
    off = "until then the memory watermark and per-pod figures are off, and shares in use are not kept by a reload"
    try:
        with trio.fail_after(TIMEOUT):
            async with holders.open_lister(path) as lister:
                held = await lister.list_holders(resources)
    except (PodResourcesError, trio.TooSlowError) as error:
        message = str(error) or f"the kubelet did not answer on {path} within {TIMEOUT:g} s"
        advice = "it takes Kubernetes 1.20; mount its directory, /var/lib/kubelet/pod-resources, or set"
        return warn(subject, message, f"{advice} -pod-resources-socket; {off}"), None
    containers = [container for shares in held.shares.values() for container in shares.values()]
    message = f"the kubelet answers on {path}: {len(set(containers))} container(s) have {len(containers)} share(s)"
    return ok(subject, message), held


def check_held(held: Held | None, unlisted: Unlisted, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Check what containers have of these GPUs: where the kubelet does not list it (None), nothing is known."""
    if held is None:
        yield skip("stored answers", "because the kubelet does not list which container has which share")
        return
    try:
        held = held.merge(unlisted.find(held))
        yield _stored_answers(unlisted.checkpoint, held, gpus)
    except (OSError, ValueError) as error:
        yield skip("stored answers", f"because the kubelet's record can't be read: {failure(error)}")
    yield from _other_uses(held, gpus)


def _other_uses(held: Held, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Find GPUs that another plugin gave to containers, whatever its socket is called."""
    for uuid, uses in other_uses(held.others, gpus).items():
        pods = few([f"{use.container} ({use.resource})" for use in uses])
        message = f"another device plugin gave it to containers, which placement counts: {pods}"
        yield warn(f"{label(uuid)} of another plugin", message, _TWO_PLUGINS)


def _stored_answers(checkpoint: Checkpoint, held: Held, gpus: Sequence[Gpu]) -> Finding:
    """Check that containers that start again get the GPUs of their shares, also after a reboot."""
    subject = "stored answers"
    if stale := stale_answers(checkpoint, held.shares, gpus):
        message = f"the kubelet gives the wrong GPU to containers that start again: {', '.join(map(str, stale))}"
        return warn(subject, message, f"GPUs have other device nodes since a reboot or a reset: {STALE_ADVICE}")
    return ok(subject, "containers that start again get the GPUs of their shares")


def _may_be_rival(name: str) -> bool:
    """Return whether the name of a plugin's socket suggests that it offers GPUs."""
    return any(word in name.lower() for word in ("gpu", "nvidia"))


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:  # gone just now
        return False
