"""Which pod has which uid, by the targets of the kubelet's links to containers' logs. Blocks as files do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def pods_by_uid(container_logs: Path) -> Iterator[tuple[str, str, str]]:
    """Yield uid, namespace and name for each link: `… → …/<namespace>_<pod>_<uid>/<container>/0.log`."""
    try:
        links = os.listdir(container_logs)
    except OSError:  # not mounted: the pods are known by their uids
        return
    for link in links:
        try:
            namespace, pod, uid = PurePosixPath(os.readlink(container_logs / link)).parts[-3].split("_")
        except (OSError, IndexError, ValueError):  # no link, or none of the kubelet's
            continue
        yield uid, namespace, pod


def pod_uid(container_logs: Path, pod: str) -> str:
    """Return the uid of a pod (`namespace/name`) that has a container here; empty where it is unknown."""
    return next((uid for uid, *names in pods_by_uid(container_logs) if "/".join(names) == pod), "")
