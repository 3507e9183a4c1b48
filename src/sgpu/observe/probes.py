"""The answers to the kubelet's probes: does the daemon live, and do its GPUs reach the kubelet? Pure.

Liveness is about what a restart of the daemon would cure. Any answer proves that the event loop turns. A loop that is
stuck in one of its waits is noticed by the watchdog; loops that only react to an event that may never come can't be
late. No driver, no kubelet, an unhealthy GPU: a restart cures none of these.
"""

from __future__ import annotations

from collections.abc import Mapping

from sgpu.observe.snapshot import Snapshot


def stuck(expired: Mapping[str, float]) -> str:
    """Name the loops that are stuck, which are late by so many seconds; empty if there are none."""
    return "; ".join(f"{loop} is stuck: {seconds:.0f} s late" for loop, seconds in sorted(expired.items()))


def unready(snapshot: Snapshot) -> str:
    """Say why the kubelet can't hand out the node's shares; empty if it can, or if a standby lacks only the place."""
    if not snapshot.gpus:
        return f"waiting for the driver: {snapshot.waiting}" if snapshot.waiting else "no GPU has been seen yet"
    offered = {gpu.resource for gpu in snapshot.gpus if gpu.resource}
    if not offered:
        return "all GPUs are excluded by the rules of the -config file"
    if snapshot.standby:
        return ""
    for resource in snapshot.resources:
        if resource.name in offered and not resource.registered:
            return f"{resource.name} is not registered with the kubelet"
        if resource.name in offered and not resource.streams:
            return f"the kubelet has no ListAndWatch stream open for {resource.name}"
        if resource.name in offered and resource.unpublished:
            return f"the scheduler does not know {resource.name}: {resource.unpublished}"
    return ""
