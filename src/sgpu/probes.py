"""What the kubelet's probes are answered: does the daemon live, and do its GPUs reach the kubelet? Pure.

Liveness is about what a restart of the daemon would help against. That the event loop turns is proven by there being
an answer at all; what it can't prove is that a loop has not got stuck in one of its waits, so those say when they are
heard of again (`Record.expect`). Loops that only react to an event that may never come have nothing to be late with.
No driver, no kubelet, a GPU that is down: a restart helps against none of these.
"""

from __future__ import annotations

from collections.abc import Mapping

from sgpu.snapshot import Snapshot


def ailing(overdue: Mapping[str, float]) -> str:
    """Which loops hang, of those that are overdue by so many seconds; empty if none."""
    return "; ".join(
        f"{loop}: nothing heard of it for {seconds:.0f} s longer than due" for loop, seconds in sorted(overdue.items())
    )


def unready(snapshot: Snapshot) -> str:
    """Why the kubelet can't give away what the node has; empty if it can."""
    if not snapshot.gpus:
        return f"waiting for the driver: {snapshot.waiting}" if snapshot.waiting else "no GPU has been seen yet"
    offered = {gpu.resource for gpu in snapshot.gpus if gpu.resource}
    if not offered:
        return "all GPUs are excluded by the rules of the -config file"
    for resource in snapshot.resources:
        if resource.name in offered and not resource.registered:
            return f"{resource.name} is not registered with the kubelet"
        if resource.name in offered and not resource.streams:
            return f"the kubelet has no ListAndWatch stream open for {resource.name}"
    return ""
