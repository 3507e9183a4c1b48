"""What the kernel refuses with for want of something, and what helps. Imports nothing of sgpu."""

from __future__ import annotations

import errno
from typing import Final

#: `fork` says EAGAIN, and Python "can't start new thread", for want of processes, and that also for want of memory.
PROCESSES: Final = (
    "no more processes or threads can be started: raise podPidsLimit of the kubelet, pids.max of the cgroup, or the "
    "memory limit"
)
MEMORY: Final = "there is no memory left: raise the container's memory limit"
#: What accept(2) refuses a connection with, that may end by itself.
CONNECTIONS: Final = {
    errno.EMFILE: "this process has no file descriptor left: raise its limit (ulimit -n)",
    errno.ENFILE: "the node has no file descriptor left: raise fs.file-max",
    errno.ENOMEM: MEMORY,
    errno.ENOBUFS: "the node has no memory left for sockets",
}
_CURES: Final = {
    **CONNECTIONS,
    errno.EAGAIN: PROCESSES,
    errno.ENOSPC: "the file system is full: free space there",
    errno.EDQUOT: "the quota of the file system is used up: free space there",
    errno.EROFS: "the file system is mounted read-only: mount it writable",
}


def cure(error: Exception, otherwise: str = "") -> str:
    """Return what helps against an error: which limit to raise, if it is one; else `otherwise`."""
    return _CURES.get(getattr(error, "errno", None) or 0, otherwise)


def explain(error: Exception, otherwise: str = "") -> str:
    """Return the error with what helps, if anything."""
    return "; ".join(filter(None, (str(error), cure(error, otherwise))))
