"""Every setting: its default, the values it takes, what it means. Values only."""

from __future__ import annotations

from typing import Any, Final

import attrs

from sgpu.config.values import (
    ADDRESS,
    BOOLEAN,
    FILE,
    MEMORY_LIMITS,
    MIG,
    MIG_PROFILES,
    MIG_RESOURCE,
    NAMESPACES,
    NODE_NAME,
    NUMBERS,
    PATH,
    RESOURCE,
    SHARES,
    TOLERANCE,
    Kind,
    choice,
    fraction,
    integer,
    seconds,
)


def setting(default: object, kind: Kind, meaning: str) -> Any:  # noqa: ANN401  # attrs' fields are typed so
    """Return a field of Settings that a user can set."""
    return attrs.field(default=default, metadata={"kind": kind, "meaning": meaning})


@attrs.frozen(kw_only=True)
class Settings:
    """The daemon's settings. A field's flag is its name with dashes (`host_path`: `-host-path`)."""

    api: str = setting(
        "device-plugin",
        choice("device-plugin", "dra", "auto"),
        "how shares are offered: by a device plugin, by dynamic resource allocation (Kubernetes 1.36 or later), or by "
        "the latter where the cluster can and no pod has a share by the former",
    )
    host_path: str = setting(
        "/home/kubernetes/bin/nvidia",
        PATH,
        "directory on the host with the NVIDIA libraries; also where libnvidia-ml is loaded from",
    )
    container_path: str = setting(
        "/usr/local/nvidia", PATH, "where that directory is mounted, read-only, in containers"
    )
    plugin_directory: str = setting(
        "/device-plugin", PATH, "directory of kubelet.sock, where the plugin's own socket goes"
    )
    gpu_duplication_factor: int = setting(100, SHARES, "shares per GPU")
    resource_name: str = setting("deepomatic.com/shared-gpu", RESOURCE, "name of the extended resource")
    mig: str = setting(
        "shared",
        MIG,
        "how MIG instances are offered: as shares like GPUs, each as one device of a resource for its profile, or not",
    )
    mig_resource_name: str = setting(
        "mig-{profile}", MIG_RESOURCE, "with -mig profile: name of the resource of each profile"
    )
    dev_directory: str = setting("/dev", PATH, "where the device nodes are")
    sysfs_directory: str = setting("/sys", PATH, "where the kernel lists PCI devices with their NUMA nodes")
    proc_directory: str = setting(
        "/proc", PATH, "the host's processes, to attribute GPU memory to pods (needs hostPID), and MIG capabilities"
    )
    container_log_directory: str = setting(
        "/var/log/containers", PATH, "the kubelet's links to container logs, whose names attribute processes to pods"
    )
    placement: str = setting(
        "spread", choice("spread", "pack"), "which GPU a pod gets: the one with most room, or the fullest"
    )
    multi_share: str = setting(
        "distinct",
        choice("distinct", "same", "strict-distinct"),
        "whether several shares of one container come from different GPUs or from the same",
    )
    memory_watermark: float = setting(
        0.95, fraction(), "part of a GPU's memory above which its free shares are withheld; 0: never"
    )
    memory_limits: str = setting(
        "off",
        MEMORY_LIMITS,
        "memory that a container may use, enforced by the driver (R615 or later): its fair part, or N times that",
    )
    memory_limits_failure: str = setting(
        "open",
        choice("open", "closed"),
        "whether a container starts (open) or fails (closed) where its memory limit can't be enforced",
    )
    cgroup_directory: str = setting("/sys/fs/cgroup", PATH, "the host's cgroup v2 tree, for memory limits")
    memory_guard: str = setting(
        "off",
        choice("off", "warn", "terminate"),
        "what happens to a container that uses more of a full GPU's memory than it may: nothing, a warning, or its end",
    )
    memory_guard_tolerance: str = setting(
        "10%+512MiB", TOLERANCE, "memory that a container may use on top of its part before the guard acts"
    )
    memory_guard_threshold: float = setting(
        0.95, fraction(), "part of a GPU's memory that must be in use before the guard acts; 0: any"
    )
    memory_guard_grace: float = setting(
        30.0, seconds(0, 3600), "seconds from the guard's SIGTERM to its SIGKILL, if the process still runs"
    )
    memory_guard_exempt_namespaces: str = setting("kube-system", NAMESPACES, "namespaces that the guard leaves alone")
    sample_interval: float = setting(
        5.0, seconds(0.1, 3600), "seconds between polls of the driver and looks at pods: health, memory, utilization"
    )
    pod_resources_socket: str = setting(
        "/var/lib/kubelet/pod-resources/kubelet.sock",
        PATH,
        "socket on which the kubelet lists the containers that have shares",
    )
    framework_hints: bool = setting(
        True, BOOLEAN, "set variables that keep TensorFlow and JAX from taking a whole GPU as they start"
    )
    health_interval: float = setting(
        5.0, seconds(0.1, 3600), "another name for -sample-interval; where both are set, the smaller counts"
    )
    driver_timeout: float = setting(10.0, seconds(0.1, 3600), "seconds after which a call of the driver counts as hung")
    ignore_xids: str = setting("", NUMBERS, "XIDs to ignore, in addition to those that docs/xids.md ignores")
    critical_xids: str = setting("", NUMBERS, "XIDs after which the GPU needs a reset, overriding docs/xids.md")
    state_file: str = setting(
        "/run/sgpu/state.json",
        FILE,
        "where faults are kept over a restart of sgpu in the same boot; empty: nowhere",
    )
    cordon_file: str = setting(
        "/var/lib/sgpu/cordon.json",
        FILE,
        "where cordons are kept over a restart of sgpu and a reboot; empty: no GPU can be cordoned",
    )
    metrics_address: str = setting(
        ":2112", ADDRESS, "address of metrics and probes; without a host: all interfaces; empty: not served"
    )
    metrics_page: bool = setting(True, BOOLEAN, "show the node's status to browsers at / of the metrics address")
    status_socket: str = setting("/run/sgpu/status.sock", FILE, "socket for `sgpu status`, for root only; empty: none")
    node_labels: str = setting(
        "off",
        choice("off", "nfd", "api"),
        "who labels the node with what its GPUs are: nobody, Node Feature Discovery, or sgpu (needs -node-name)",
    )
    node_labels_directory: str = setting(
        "/etc/kubernetes/node-feature-discovery/features.d",
        PATH,
        "where Node Feature Discovery looks for feature files",
    )
    events: bool = setting(
        False, BOOLEAN, "write Kubernetes Events of the node and of pods: faults of GPUs, full memory; needs -node-name"
    )
    standby: bool = setting(
        False,
        BOOLEAN,
        "where another daemon serves the resource, wait and take over when it stops, instead of exiting (for surge)",
    )
    simulate: int = setting(0, integer(0, 64), "number of simulated GPUs to offer instead of real ones; 0: none")
    simulate_mig: str = setting(
        "", MIG_PROFILES, "with -simulate: the MIG instances that each simulated GPU has; empty: MIG mode is off"
    )
    simulate_faults: str = setting(
        "",
        FILE,
        "with -simulate: file with the numbers of unhealthy GPUs (or MIG instances: 0/1), one per line; read while "
        "running",
    )
    node_name: str = setting(
        "", NODE_NAME, "name of the Node, from the pod's spec.nodeName; for what uses the API server"
    )
    api_server: str = setting(
        "", ADDRESS, "address of a `kubectl proxy`, over plain HTTP; empty: the API server that the pod knows"
    )
    dra_registry_directory: str = setting(
        "/var/lib/kubelet/plugins_registry", PATH, "with -api dra: where the kubelet finds plugins"
    )
    dra_plugin_directory: str = setting(
        "/var/lib/kubelet/plugins", PATH, "with -api dra: the kubelet's directory of plugins, at the same path as there"
    )
    dra_memory_default: str = setting(
        "none",
        choice("none", "fair"),
        "with -api dra: memory of a claim that names none; fair: its part, as always where there are memory limits",
    )
    dra_evict: bool = setting(
        False, BOOLEAN, "with -api dra: end the pods of a GPU that needs a reset, instead of only sending no new ones"
    )
    cdi_directory: str = setting("/var/run/cdi", PATH, "with -api dra: where the container runtime reads CDI files")
    log_format: str = setting("text", choice("text", "json"), "format of the log's lines")
    v: int = setting(0, integer(0, 10), "verbosity of the log; 1 and more: debug messages")
    logtostderr: bool = setting(True, BOOLEAN, "accepted for the manifests that have it; the log always goes there")


def endpoint(resource: str) -> str:
    """Return the name of the plugin's socket: one for each resource, whichever process serves it."""
    return f"sgpu-{resource.replace('/', '_')}.sock"


#: Flag (without the dash) → field.
SETTINGS: Final = {field.name.replace("_", "-"): field for field in attrs.fields(Settings)}
