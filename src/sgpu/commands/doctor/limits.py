"""Checks of memory limits: cgroups, the driver's branch, and who keeps limits. They set none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.config.load import Loaded
from sgpu.driver.messages import Report
from sgpu.pods.cgroup_tree import CgroupTree

SUBJECT: Final = "memory limits"
#: The first driver branch that has them.
BRANCH: Final = 615


def check_limits(loaded: Loaded, report: Report | None) -> Iterator[Finding]:
    """Check all that limits need, where some are wanted. Only the daemon shows whether the driver enforces them."""
    if not _wanted(loaded):
        yield ok(SUBJECT, "off; a share is no limit (-memory-limits)")
        return
    cgroups = Path(loaded.settings.cgroup_directory)
    yield _check_cgroups(cgroups)
    yield _check_driver(report)
    if report and any(gpu.mig_mode for gpu in report.gpus):
        yield ok(SUBJECT, "shares of MIG instances have none: an instance is a hard wall, and nobody is limited within")


def _wanted(loaded: Loaded) -> bool:
    policy = loaded.policy
    return bool(policy.limit_factor or any(rule.limit_factor for rule in policy.rules))


def _check_cgroups(root: Path) -> Finding:
    mount = "mount the host's /sys/fs/cgroup there, as k8s/components/memory-limits does, or set -cgroup-directory"
    if not (root / "cgroup.controllers").exists():
        return fail(
            SUBJECT, f"{root} is no cgroup v2 tree, which limits need", f"{mount}; the node has to use cgroup v2"
        )
    tree = CgroupTree(root, None)
    tree.scan()
    parents = tree.parents()
    if not parents:
        return fail(SUBJECT, f"the kubelet has no cgroup below {root}", mount)
    if os.statvfs(root).f_flag & os.ST_RDONLY:
        return fail(SUBJECT, f"{root} is mounted read-only", mount)
    return _check_backend(parents)


def _check_backend(parents: Iterable[str]) -> Finding:
    """Check who keeps limits: the kernel's dmem controller where a cgroup has its files, else the driver's own."""
    without = [parent for parent in parents if "dmem" in _words(parent, "cgroup.controllers")]
    without = [parent for parent in without if "dmem" not in _words(parent, "cgroup.subtree_control")]
    if without:
        return warn(
            SUBJECT,
            f"{without[0]}/cgroup.subtree_control lacks dmem, so that limits of its pods are refused",
            "add +dmem there, as runc does and crun does not, or boot with cgroup_disable=dmem",
        )
    has_files = any(os.path.exists(f"{parent}/dmem.max") for parent in parents)
    return ok(SUBJECT, f"the kubelet's cgroups are found; {'dmem' if has_files else 'the driver itself'} keeps limits")


def _check_driver(report: Report | None) -> Finding:
    if report is None:
        return skip(SUBJECT, "because NVML does not answer")
    branch = report.driver_version.partition(".")[0]
    if not branch.isdigit() or int(branch) < BRANCH:
        return fail(
            SUBJECT,
            f"driver {report.driver_version} has none; they need R{BRANCH} or later",
            "install a newer driver, or switch -memory-limits off",
        )
    return ok(SUBJECT, f"driver {report.driver_version} has them; `sgpu status` shows which are enforced")


def _words(directory: str, name: str) -> list[str]:
    try:
        return Path(directory, name).read_text().split()
    except OSError:
        return []
