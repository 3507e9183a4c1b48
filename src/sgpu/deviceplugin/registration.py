"""The kubelet as seen from here: its socket, and registering with it. Knows nothing of NVML."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio
from google.protobuf.message import Message
from purerpc import StatusCode

from sgpu import rpc
from sgpu.api import v1alpha_pb2, v1beta1_pb2
from sgpu.lib.limits import explain

SOCKET: Final = "kubelet.sock"
#: Seconds. Within `Register` the kubelet dials back, and gives that 10 s of its own.
REGISTER_TIMEOUT: Final = 15
#: What kubelets that know the service but not the version say, after the version.
VERSION_REFUSED: Final = "is not supported by kubelet"


class RegistrationFailedError(Exception):
    """The kubelet is not there, or did not take the registration. The message says which, and what it answered."""


@contextmanager
def pinned(path: Path) -> Iterator[rpc.Identity | None]:
    """Yield the identity of the file at `path` (None if there is none); no other file gets it while this is open.

    Without the open descriptor a kubelet that restarts can get the very inode number its old socket had. Raises
    OSError where there is a file that can't be opened.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        status = os.fstat(descriptor)
        yield rpc.Identity(status.st_dev, status.st_ino)
    finally:
        os.close(descriptor)


async def register(
    kubelet_socket: Path, endpoint: str, resource_name: str, options: v1beta1_pb2.DevicePluginOptions
) -> str:
    """Register the plugin that listens on `endpoint`, a name in the kubelet's directory.

    The plugin must be serving: the kubelet calls it back before it answers. Returns the version of the API that the
    kubelet took. Raises RegistrationFailedError.
    """
    beta = v1beta1_pb2.RegisterRequest(
        version="v1beta1", endpoint=endpoint, resource_name=resource_name, options=options
    )
    # Kubernetes 1.10 and later; 1.9; 1.8.
    attempts: tuple[tuple[str, Message], ...] = (
        ("/v1beta1.Registration/Register", beta),
        ("/deviceplugin.Registration/Register", _alpha_request("v1alpha2", endpoint, resource_name)),
        ("/deviceplugin.Registration/Register", _alpha_request("v1alpha1", endpoint, resource_name)),
    )
    refusals = []
    for method, request in attempts:
        try:
            with trio.fail_after(REGISTER_TIMEOUT):
                await rpc.unary_call(kubelet_socket, method, request, v1beta1_pb2.Empty)
        except rpc.RpcError as error:
            refusals.append(error)
            if error.code is not StatusCode.UNIMPLEMENTED and VERSION_REFUSED not in error.message:
                break
        except (OSError, trio.BrokenResourceError, rpc.BrokenPeerError) as error:
            raise RegistrationFailedError(unanswered(kubelet_socket, error)) from error
        except trio.TooSlowError as error:
            raise RegistrationFailedError(
                f"the kubelet did not answer on {kubelet_socket} within {REGISTER_TIMEOUT} s"
            ) from error
        else:
            return str(getattr(request, "version"))  # noqa: B009  # Message does not declare it
    # The last refusal that is about the request and not about the version, or else the first.
    telling = [error for error in refusals if error.code is not StatusCode.UNIMPLEMENTED] or refusals
    raise RegistrationFailedError(f"the kubelet refused {resource_name}: {telling[-1]}") from telling[-1]


def unanswered(kubelet_socket: Path, error: Exception) -> str:
    """Return what to say of a kubelet that does not answer."""
    cure = "is it down, or is -plugin-directory not its own?"
    return f"the kubelet does not answer on {kubelet_socket}: {explain(error, cure)}"


def _alpha_request(version: str, endpoint: str, resource_name: str) -> v1alpha_pb2.RegisterRequest:
    return v1alpha_pb2.RegisterRequest(version=version, endpoint=endpoint, resource_name=resource_name)
