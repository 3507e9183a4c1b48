"""The real daemon as in a pod: with a service account, and with a fake API server where Kubernetes has one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from daemon_process import short_directory
from fake_api_server import FakeApiServer, serving

#: The daemon, with another directory of the service account: a test can't make the one that the kubelet mounts.
_DAEMON = """
import sys
from pathlib import Path
from sgpu.__main__ import main
from sgpu.kubeapi import access
access.in_cluster.__defaults__ = (Path(sys.argv.pop(1)),)
main()
"""


@contextmanager
def in_pod(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Yield the command of the daemon in a pod of the cluster that has this API server."""
    with short_directory() as account, serving(server, account) as access:
        address = urlsplit(access.url)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(address.hostname))
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))
        yield (sys.executable, "-c", _DAEMON, str(account))
