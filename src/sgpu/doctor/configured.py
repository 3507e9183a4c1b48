"""Settings that fight each other, the node's GPUs, or the daemon that runs. Knows no driver: GPUs come as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from sgpu.device import Device
from sgpu.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.doctor.host import Host, why_not_writable
from sgpu.listing import TooManySharesError, check_size
from sgpu.load import Loaded, UsageError, load, parse_flags
from sgpu.policy import PolicyConflictError, divide
from sgpu.report import GpuReport
from sgpu.settings import KNOBS

#: Directories that every image has: what is mounted over one hides what is in it.
OF_IMAGES: Final = frozenset("/ /bin /dev /etc /lib /lib64 /proc /root /sbin /sys /tmp /usr /var".split())
OF_IMAGES_BELOW_USR: Final = frozenset("/usr/bin /usr/lib /usr/lib64 /usr/lib/x86_64-linux-gnu /usr/local".split())
#: Seconds. In that time a pod that starts can fill a GPU from empty.
LONG_INTERVAL: Final = 60.0
#: Settings that are about the log alone.
_ABOUT_THE_LOG: Final = frozenset({"log-format", "v", "logtostderr"})


def check_settings(loaded: Loaded, host: Host) -> Iterator[Finding]:
    """What contradicts something else, whichever GPUs there are."""
    yield from list(_contradictions(loaded, host)) or [ok("settings", "none contradicts another")]


def _contradictions(loaded: Loaded, host: Host) -> Iterator[Finding]:
    settings, subject = loaded.settings, "settings"
    if str(PurePosixPath(settings.container_path)) in OF_IMAGES | OF_IMAGES_BELOW_USR:
        words = f"-container-path {settings.container_path} is mounted over what images have there: containers fail"
        yield fail(subject, words, "choose a directory of its own, as /usr/local/nvidia")
    if settings.simulate and host.module_version():
        words = f"-simulate {settings.simulate} offers GPUs that are not there, on a node with a driver"
        yield warn(subject, words, "leave out -simulate where pods should get the real ones")
    if settings.simulate_faults and not settings.simulate:
        yield warn(subject, "-simulate-faults does nothing without -simulate", "set both, or neither")
    if settings.multi_share == "strict-distinct":
        words = "-multi-share strict-distinct refuses pods (UnexpectedAdmissionError) that the scheduler sends again"
        yield warn(subject, words, "use it only where nobody asks for more shares than a node has GPUs")
    if settings.memory_watermark and settings.sample_interval > LONG_INTERVAL:
        words = f"-sample-interval {settings.sample_interval:g} is long for -memory-watermark: GPUs fill sooner"
        yield warn(subject, words, "a few seconds cost little; or switch the watermark off with 0")
    if settings.state_file and (flaw := _unwritable(Path(settings.state_file))):
        words = f"-state-file {settings.state_file} can't be written ({flaw}): a restart forgets which GPUs are faulty"
        yield warn(subject, words, "mount a directory of the host there, writable; empty, nothing is kept")


def _unwritable(path: Path) -> str:
    place = next(place for place in path.absolute().parents if place.exists())  # the daemon makes what is missing
    flaw = why_not_writable(place)
    return flaw and f"{place}: {flaw}"


def check_rules(loaded: Loaded, devices: Sequence[Device] | None) -> Iterator[Finding]:
    """What the node's GPUs are offered as; None where they are not known."""
    subject = "rules per GPU"
    if devices is None:
        yield skip(subject, "because the GPUs are not known")
        return
    try:
        offered = divide(loaded.policy, devices, {})
        for each in offered.values():
            check_size(each)
    except PolicyConflictError as error:
        yield fail(subject, str(error), "leave one of the two out: the daemon does not start with both")
        return
    except TooManySharesError as error:
        yield fail(subject, str(error), "the daemon does not start with more")
        return
    for rule in loaded.policy.unmatched(devices):
        yield warn(
            subject, f"{rule} is about no GPU of this node", "no harm where the file is for several kinds of node"
        )
    counts = {resource: sum(device.shares for device in each) for resource, each in offered.items()}
    words = ", ".join(f"{count} x {resource}" for resource, count in counts.items() if count)
    if words:
        yield ok(subject, f"{len(devices)} GPU(s) are offered as {words}")
    else:
        yield fail(subject, "every GPU is excluded, so nothing is offered", "see `gpus` in the -config file")


def devices(loaded: Loaded, gpus: Sequence[GpuReport]) -> list[Device]:
    """The GPUs that the driver told of, before the rules."""
    shares = loaded.settings.gpu_duplication_factor
    return [
        Device(gpu.uuid, gpu.name, gpu.pci_bus_id, shares, gpu.device_nodes, numa_node=gpu.numa_node) for gpu in gpus
    ]


def check_daemon_settings(loaded: Loaded, proc: Path, pid: int) -> Finding:
    """Whether the daemon that runs has the settings that all of this was checked with."""
    subject = "daemon's settings"
    try:
        theirs = _settings_of(proc / str(pid))
    except (OSError, UsageError, ValueError) as error:
        return skip(subject, f"because those of the daemon can't be read ({error or 'it is not visible from here'})")
    other = [
        f"-{name} {_value(theirs, name)} (here {_value(loaded, name)})"
        for name in KNOBS
        if name not in _ABOUT_THE_LOG and _value(theirs, name) != _value(loaded, name)
    ]
    if theirs.policy.rules != loaded.policy.rules:
        other.append("other rules per GPU")
    if other:
        words = f"it runs with {', '.join(other)}"
        return warn(subject, words, "give the doctor the daemon's flags, so that it looks where the daemon does")
    return ok(subject, "it runs with the settings that were checked here")


def _settings_of(process: Path) -> Loaded:
    """What a running daemon was started with. Raises OSError, ValueError or UsageError."""
    words = [word.decode(errors="surrogateescape") for word in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
    flags = parse_flags(words[_command(words) + 1 :])
    if flags.words:
        raise ValueError("it is not a daemon")
    return load(flags.values, _environment(process))


def _command(words: Sequence[str]) -> int:
    """Where in a command line sgpu is: `python -m sgpu …`, or its console script."""
    for place, word in enumerate(words[:4]):
        if word == "sgpu" or PurePosixPath(word).name == "sgpu":
            return place
    raise ValueError("it is another program")


def _environment(process: Path) -> Mapping[str, str]:
    variables = (process / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


def _value(loaded: Loaded, name: str) -> object:
    value = getattr(loaded.settings, name.replace("-", "_"))
    return "empty" if value == "" else value
