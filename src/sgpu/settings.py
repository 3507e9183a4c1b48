"""Every knob: its default, what it takes, what it means. Values only: imports nothing of sgpu."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, Final

import attrs

#: DNS-1123 subdomain and qualified name, as `k8s.io/apimachinery/pkg/util/validation` has them.
_LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NAME: Final = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
#: Characters. The kubelet also checks `requests.` + the name, which must be a subdomain as well.
_DOMAIN_LENGTH: Final = 253 - len("requests.")
_NAME_LENGTH: Final = 63
#: As people write numbers; `int` takes more (underscores, blanks, other scripts' digits).
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
_DECIMAL: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_ADDRESS: Final = re.compile(
    r"(\[(?P<v6>[0-9a-fA-F:.]+(%[\w.-]+)?)\]|(?P<host>[\w.-]*)):(?P<port>[0-9]{1,5})", re.ASCII
)
_MAX_PORT: Final = 65535
#: What Go's flag package takes, in any case.
_BOOLEANS: Final = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@attrs.frozen
class Kind:
    """What a setting takes. `check` says whether a value of the right type is in range."""

    takes: str
    type: type
    check: Callable[[Any], bool]
    example: str = "VALUE"
    #: A type that YAML may give the same thing in a file: `5` for seconds, `79` for a list of one number.
    also: object = None

    def from_text(self, text: str) -> object:
        """The value of a flag or an environment variable. Raises ValueError."""
        value: object = text
        if self.type is int:
            value = int(text) if _INTEGER.fullmatch(text) else text
        elif self.type is float:
            value = float(text) if _DECIMAL.fullmatch(text) else text
        elif self.type is bool:
            value = _BOOLEANS.get(text.lower())
        return self.from_file(value)

    def from_file(self, value: object) -> object:
        """The value of a key in the file, which has a type of its own. Raises ValueError."""
        if type(value) is self.also:
            value = self.type(value)
        if type(value) is not self.type or not self.check(value):
            raise ValueError(value)
        return value


def integer(low: int, high: int) -> Kind:
    """A whole number in a range, both ends included."""
    return Kind(f"a whole number from {low} to {high}", int, lambda value: low <= value <= high, "N")


def choice(*words: str) -> Kind:
    """One of a few words."""
    return Kind(" or ".join(words), str, lambda value: value in words, "|".join(words))


def is_extended_resource(name: str) -> bool:
    """Whether Kubernetes takes `name` for an extended resource (`IsExtendedResourceName`)."""
    domain, slash, rest = name.partition("/")
    return (
        bool(slash)
        and "kubernetes.io/" not in name
        and not name.startswith("requests.")
        and len(domain) <= _DOMAIN_LENGTH
        and len(rest) <= _NAME_LENGTH
        and _DOMAIN.fullmatch(domain) is not None
        and _NAME.fullmatch(rest) is not None
    )


def seconds(low: float, high: float) -> Kind:
    """A number of seconds in a range, both ends included."""
    return Kind(
        f"a number of seconds from {low:g} to {high:g}", float, lambda value: low <= value <= high, "SECONDS", int
    )


def fraction() -> Kind:
    """A part of a whole."""
    return Kind("a number from 0 to 1", float, lambda value: 0 <= value <= 1, "PART", int)


def split_address(text: str) -> tuple[str, int] | None:
    """Host (empty: all interfaces) and port (0: any free one) of an address; None if it is none."""
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > _MAX_PORT:
        return None
    return found["v6"] or found["host"], int(found["port"])


def _are_numbers(text: str) -> bool:
    return not text or all(_NUMBER.fullmatch(number.strip()) for number in text.split(","))


BOOLEAN: Final = Kind("true or false", bool, lambda value: True, "true|false")
PATH: Final = Kind(
    "an absolute path", str, lambda value: PurePosixPath(value).is_absolute() and "\0" not in value, "PATH"
)
FILE: Final = Kind(
    "the path of a file",
    str,
    lambda value: "\0" not in value and (not value or bool(PurePosixPath(value).name)),
    "FILE",
)
ADDRESS: Final = Kind(
    "an address as in :2112, 127.0.0.1:2112 or [::1]:2112, or nothing",
    str,
    lambda value: not value or split_address(value) is not None,
    "HOST:PORT",
)
SHARES: Final = integer(1, 100_000)
NUMBERS: Final = Kind("numbers with commas between, as in 13,31", str, _are_numbers, "N,N", int)
RESOURCE: Final = Kind(
    "the name of an extended resource, as in example.com/name (not kubernetes.io)", str, is_extended_resource, "NAME"
)


def knob(default: object, kind: Kind, meaning: str) -> Any:  # noqa: ANN401  # attrs' fields are typed so
    """A field of Settings that a user can set."""
    return attrs.field(default=default, metadata={"kind": kind, "meaning": meaning})


@attrs.frozen(kw_only=True)
class Settings:
    """What the daemon was told. The flag of a field is its name with dashes (`host_path`: `-host-path`)."""

    host_path: str = knob(
        "/home/kubernetes/bin/nvidia",
        PATH,
        "directory on the host with the NVIDIA libraries; also where libnvidia-ml is loaded from",
    )
    container_path: str = knob("/usr/local/nvidia", PATH, "where it is mounted, read-only, in containers")
    plugin_directory: str = knob(
        "/device-plugin", PATH, "directory of kubelet.sock, where the plugin's own socket goes"
    )
    gpu_duplication_factor: int = knob(100, SHARES, "shares per GPU")
    resource_name: str = knob("deepomatic.com/shared-gpu", RESOURCE, "name of the extended resource")
    dev_directory: str = knob("/dev", PATH, "where the device nodes are")
    sysfs_directory: str = knob("/sys", PATH, "where the kernel tells the NUMA nodes of GPUs")
    proc_directory: str = knob("/proc", PATH, "the host's processes, to tell which pod uses a GPU (needs hostPID)")
    container_log_directory: str = knob(
        "/var/log/containers", PATH, "the kubelet's links to the logs of containers, by which a process is its pod's"
    )
    placement: str = knob("spread", choice("spread", "pack"), "which GPU a pod gets: the emptiest, or the fullest")
    multi_share: str = knob(
        "distinct",
        choice("distinct", "same", "strict-distinct"),
        "where several shares of one container come from: different GPUs, or one",
    )
    memory_watermark: float = knob(
        0.95, fraction(), "part of a GPU's memory above which its free shares are withheld; 0: never"
    )
    sample_interval: float = knob(5.0, seconds(0.1, 3600), "seconds between two looks at memory, utilisation and pods")
    pod_resources_socket: str = knob(
        "/var/lib/kubelet/pod-resources/kubelet.sock", PATH, "socket on which the kubelet tells who has which share"
    )
    framework_hints: bool = knob(True, BOOLEAN, "keep TensorFlow and JAX from taking a whole GPU as they start")
    health_interval: float = knob(5.0, seconds(0.1, 3600), "seconds between polls of the driver")
    driver_timeout: float = knob(10.0, seconds(0.1, 3600), "seconds after which a call of the driver is given up")
    ignore_xids: str = knob("", NUMBERS, "XIDs that are no fault of the GPU, beside those in docs/xids.md")
    critical_xids: str = knob("", NUMBERS, "XIDs after which the GPU needs a reset, whatever docs/xids.md says")
    state_file: str = knob(
        "/run/sgpu/state.json",
        FILE,
        "what is down and why, for a restart in the same boot; empty: nothing is kept",
    )
    metrics_address: str = knob(
        ":2112", ADDRESS, "where metrics and probes are served; without a host: everywhere; empty: nowhere"
    )
    status_socket: str = knob(
        "/run/sgpu/status.sock", FILE, "socket on which `sgpu status` asks, for root only; empty: none"
    )
    simulate: int = knob(0, integer(0, 64), "number of simulated GPUs in place of the driver; 0: none")
    simulate_faults: str = knob(
        "", FILE, "with -simulate: file with the numbers of GPUs that are down, one to a line; read while running"
    )
    log_format: str = knob("text", choice("text", "json"), "how each line of the log is written")
    v: int = knob(0, integer(0, 10), "verbosity of the log; 1 and more: debugging")
    logtostderr: bool = knob(True, BOOLEAN, "accepted for the manifests that have it; the log always goes there")


def endpoint(resource: str) -> str:
    """The name of the plugin's socket: one to a resource, whoever serves it."""
    return f"sgpu-{resource.replace('/', '_')}.sock"


#: Flag (without the dash) → field.
KNOBS: Final = {field.name.replace("_", "-"): field for field in attrs.fields(Settings)}
