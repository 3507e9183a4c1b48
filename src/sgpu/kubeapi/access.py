"""Where the API server is and what proves who we are: Kubernetes puts both into every pod with a service account."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs
import trio

from sgpu.kubeapi.error import ApiServerError

#: Where the kubelet mounts what belongs to a pod's service account.
DIRECTORY: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Seconds after which the files are read again. The kubelet replaces a token of one hour after 48 minutes.
FRESH: Final = 60.0


@attrs.frozen
class Access:
    """The address of the API server, and the files with the token and the certificate authority.

    `manifest` is the one that gives a pod this access and its rights, for messages. Without files, a proxy speaks for
    us, over plain HTTP.
    """

    url: str
    token_file: Path | None = None
    ca_file: Path | None = None
    manifest: str = "its manifest"


def find_access(proxy: str, environment: Mapping[str, str], needed_by: str, manifest: str) -> Access:
    """Return the access through a proxy (`HOST:PORT`), or else what a pod has. Raises ApiServerError for neither.

    `needed_by` is the setting that needs it, and `manifest` gives it to a pod.
    """
    if proxy:
        return Access(f"http://{proxy}", manifest=manifest)
    return in_cluster(environment, needed_by, manifest)


def in_cluster(environment: Mapping[str, str], needed_by: str, manifest: str, directory: Path = DIRECTORY) -> Access:
    """Return the access that a pod has. Raises ApiServerError outside of one."""
    host, port = (environment.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
    if not (host and port):
        raise ApiServerError(f"KUBERNETES_SERVICE_HOST and _PORT are not set: {needed_by} needs sgpu to run in a pod")
    if ":" in host:
        host = f"[{host}]"
    return Access(f"https://{host}:{port}", directory / "token", directory / "ca.crt", manifest)


class Credentials:
    """The token and the authority, as their files have them: read again each minute, and when a token is refused."""

    def __init__(self, access: Access, clock: Callable[[], float] = trio.current_time) -> None:
        #: Given to each new connection.
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.manifest = access.manifest
        self._access = access
        self._clock = clock
        self._token = ""
        self._authority = ""
        self._until = float("-inf")

    async def token(self) -> str:
        """Return the token (empty: none), and accept what the authority's file names. Raises ApiServerError."""
        if self._clock() >= self._until:
            await self._read()
            self._until = self._clock() + FRESH
        return self._token

    def expire(self) -> None:
        """Read the files again before the next request."""
        self._until = float("-inf")

    async def _read(self) -> None:
        access = self._access
        if access.token_file is None or access.ca_file is None:
            return
        try:
            self._token = (await trio.Path(access.token_file).read_text()).strip()
            authority = await trio.Path(access.ca_file).read_text()
            if authority != self._authority or not authority:
                # An authority that is being replaced stands beside the new one for a while, so adding is enough.
                self.tls.load_verify_locations(cadata=authority)
            self._authority = authority
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            hint = f"does the pod have automountServiceAccountToken: true, as in {self.manifest}?"
            raise ApiServerError(f"cannot read the service account's credentials: {error}; {hint}") from error
