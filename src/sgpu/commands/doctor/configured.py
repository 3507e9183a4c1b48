"""Settings that contradict each other, the node's GPUs, or the running daemon. Knows no driver: GPUs come as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.host import Host, why_not_writable
from sgpu.config.flags import UsageError, parse_flags
from sgpu.config.load import Loaded, load
from sgpu.config.settings import SETTINGS
from sgpu.deviceplugin.messages import TooManySharesError, check_size
from sgpu.driver.messages import GpuReport
from sgpu.node.gpu import Gpu, MigInstance, units_or_whole
from sgpu.node.offers import offers
from sgpu.node.policy import Policy, PolicyConflictError

#: Directories that every image has: what is mounted over one hides what is in it.
OF_IMAGES: Final = frozenset("/ /bin /dev /etc /lib /lib64 /proc /root /sbin /sys /tmp /usr /var".split())
OF_IMAGES_BELOW_USR: Final = frozenset("/usr/bin /usr/lib /usr/lib64 /usr/lib/x86_64-linux-gnu /usr/local".split())
#: Seconds. In that time a pod that starts can fill a GPU from empty.
LONG_INTERVAL: Final = 60.0
#: Settings that are about the log alone.
_ABOUT_THE_LOG: Final = frozenset({"log-format", "v", "logtostderr"})


def check_settings(loaded: Loaded, host: Host) -> Iterator[Finding]:
    """Check for settings that contradict each other, whichever GPUs there are."""
    parts = (warning.rpartition("; ") for warning in loaded.warnings)
    warnings = [warn("settings", problem, advice) for problem, _, advice in parts]
    yield from [*warnings, *_contradictions(loaded, host)] or [ok("settings", "no contradictions")]


def _contradictions(loaded: Loaded, host: Host) -> Iterator[Finding]:
    settings, subject = loaded.settings, "settings"
    if str(PurePosixPath(settings.container_path)) in OF_IMAGES | OF_IMAGES_BELOW_USR:
        message = f"-container-path {settings.container_path} is mounted over what images have there: containers fail"
        yield fail(subject, message, "choose a directory of its own, as /usr/local/nvidia")
    if settings.simulate and host.module_version():
        message = f"-simulate {settings.simulate} offers GPUs that are not there, on a node with a driver"
        yield warn(subject, message, "leave out -simulate where pods should get the real ones")
    for name in ("simulate-faults", "simulate-mig"):
        if getattr(settings, name.replace("-", "_")) and not settings.simulate:
            yield warn(subject, f"-{name} does nothing without -simulate", "set both, or neither")
    yield from _guard_contradictions(loaded)
    faults = Path(settings.simulate_faults or "/nowhere")
    if faults.exists() and not faults.is_file():
        yield warn(subject, f"-simulate-faults {faults} is no file, so that no GPU is faulty", "make it a file")
    if settings.multi_share == "strict-distinct":
        message = "-multi-share strict-distinct refuses pods (UnexpectedAdmissionError) that the scheduler sends again"
        yield warn(subject, message, "use it only where no container asks for more shares than a node has GPUs")
    watching = [("-memory-watermark", settings.memory_watermark > 0), ("-memory-guard", settings.memory_guard != "off")]
    names = " and ".join(name for name, is_on in watching if is_on)
    if names and settings.sample_interval > LONG_INTERVAL:
        message = f"-sample-interval {settings.sample_interval:g} is long for {names}: GPUs fill sooner"
        yield warn(subject, message, "a few seconds cost little; or switch the watermark off with 0, and the guard")
    if settings.state_file and (problem := _unwritable(Path(settings.state_file))):
        message = (
            f"-state-file {settings.state_file} can't be written ({problem}): a restart forgets which GPUs are faulty"
        )
        yield warn(subject, message, "mount a directory of the host there, writable; empty, nothing is kept")


def _guard_contradictions(loaded: Loaded) -> Iterator[Finding]:
    settings, subject = loaded.settings, "settings"
    given = [
        name for name, origin in loaded.origins.items() if name.startswith("memory-guard-") and origin != "default"
    ]
    if settings.memory_guard == "off":
        if given:
            message = f"-{', -'.join(given)} do nothing, as -memory-guard is off"
            yield warn(subject, message, "set -memory-guard to warn or terminate, or leave them out")
        return
    if settings.simulate:
        message = f"-memory-guard {settings.memory_guard} does nothing with -simulate {settings.simulate}"
        yield warn(subject, message, "leave it out: no process uses simulated GPUs")
    if settings.memory_guard_threshold == 1:
        message = (
            f"-memory-guard {settings.memory_guard} never acts, as no GPU is fuller than -memory-guard-threshold 1"
        )
        yield warn(subject, message, "set a lower threshold, as 0.95")


def _unwritable(path: Path) -> str:
    place = next(place for place in path.absolute().parents if place.exists())  # the daemon makes what is missing
    problem = why_not_writable(place)
    return problem and f"{place}: {problem}"


def check_rules(loaded: Loaded, gpus: Sequence[Gpu] | None) -> Iterator[Finding]:
    """Check what the node's GPUs are offered as; None where they are unknown."""
    subject = "rules per GPU"
    if gpus is None:
        yield skip(subject, "because the GPUs are not known")
        return
    try:
        offered = offers(loaded.policy, gpus, {})
        for each in offered.values():
            check_size(each)
    except PolicyConflictError as error:
        yield fail(subject, str(error), "leave one of the two out: the daemon does not start with both")
        return
    except TooManySharesError as error:
        yield fail(subject, str(error), "the daemon does not start with more")
        return
    for rule in loaded.policy.unmatched([unit for gpu in gpus for unit in units_or_whole(gpu)]):
        message = f"rule {rule} matches no GPU of this node"
        yield warn(subject, message, "no harm where the file is for several kinds of node")
    counts = {resource: sum(offer.shares for offer in each) for resource, each in offered.items()}
    total = ", ".join(f"{count} x {resource}" for resource, count in counts.items() if count)
    if total:
        yield ok(subject, f"{len(gpus)} GPU(s) are offered as {total}")
    else:
        message = "every GPU is excluded, or in MIG mode without instances to offer, so nothing is offered"
        yield fail(subject, message, "see `gpus` in the -config file, and -mig")


def is_offered(policy: Policy, gpus: Sequence[Gpu], resource: str) -> bool:
    """Return whether any of these GPUs is offered as this resource. Of rules that contradict each other, it may be."""
    try:
        return bool(offers(policy, gpus, {})[resource])
    except PolicyConflictError:
        return True


def gpus(reports: Sequence[GpuReport]) -> list[Gpu]:
    """Return the GPUs of a report."""
    return [
        Gpu(
            report.uuid,
            report.name,
            report.pci_bus_id,
            report.device_nodes,
            report.figures.memory_usable,
            report.figures.memory_total,
            report.numa_node,
            mig_mode=report.mig_mode,
            mig_pending=report.mig_pending,
            instances=tuple(
                MigInstance(each.uuid, each.name, each.profile, each.memory_bytes, each.capability_nodes)
                for each in report.instances
            ),
        )
        for report in reports
    ]


def check_daemon_settings(loaded: Loaded, proc: Path, pid: int) -> Finding:
    """Check that the running daemon has the settings that the doctor was given."""
    subject = "daemon's settings"
    try:
        theirs = _settings_of(proc / str(pid))
    except (OSError, UsageError, ValueError) as error:
        return skip(subject, f"because those of the daemon can't be read ({error or 'it is not visible from here'})")
    other = [
        f"-{name} {_value(theirs, name)} (here {_value(loaded, name)})"
        for name in SETTINGS
        if name not in _ABOUT_THE_LOG and _value(theirs, name) != _value(loaded, name)
    ]
    if theirs.policy.rules != loaded.policy.rules:
        other.append("other rules per GPU")
    if other:
        message = f"it runs with {', '.join(other)}"
        return warn(subject, message, "give the doctor the daemon's flags, so that it looks where the daemon does")
    return ok(subject, "it runs with the settings that were checked here")


def _settings_of(process: Path) -> Loaded:
    """Return the settings of a running daemon. Raises OSError, ValueError or UsageError."""
    command_line = (process / "cmdline").read_bytes().split(b"\0")[:-1]
    arguments = [argument.decode(errors="surrogateescape") for argument in command_line]
    flags = parse_flags(arguments[_command(arguments) + 1 :])
    if flags.positional:
        raise ValueError("it is not a daemon")
    return load(flags.values, _environment(process))


def _command(arguments: Sequence[str]) -> int:
    """Return the index of sgpu in a command line: `python -m sgpu …`, or its console script."""
    for place, argument in enumerate(arguments[:4]):
        if argument == "sgpu" or PurePosixPath(argument).name == "sgpu":
            return place
    raise ValueError("it is another program")


def _environment(process: Path) -> Mapping[str, str]:
    variables = (process / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


def _value(loaded: Loaded, name: str) -> object:
    value = getattr(loaded.settings, name.replace("-", "_"))
    return "empty" if value == "" else value
