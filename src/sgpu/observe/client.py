"""Asks the running daemon on its unix socket, by blocking HTTP/1.1. Knows nothing of how the answer looks."""

from __future__ import annotations

import http.client
import socket
from contextlib import closing, suppress
from typing import Final

from sgpu import __version__
from sgpu.lib.logs import printable
from sgpu.observe.orders import Done, Order, decode_done, encode
from sgpu.observe.snapshot import Snapshot, decode, program

#: Seconds that any step of asking may take. The daemon answers from memory, so this is long.
TIMEOUT: Final = 5.0
#: What to look at, and with, when the daemon does not answer.
POD: Final = "kubectl -n kube-system get pods -l app=sgpu -o wide"
LOG: Final = "kubectl -n kube-system logs -l app=sgpu"


class NoAnswerError(Exception):
    """There is no answer to show. One line: why, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OrderRefusedError(Exception):
    """The daemon does not do what it was told. One line: why, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def fetch(path: str, timeout: float = TIMEOUT) -> Snapshot:
    """Return what the daemon behind this socket knows now. Raises NoAnswerError."""
    status, body = _ask(path, timeout, "GET", "/status")
    if status != http.client.OK:
        raise NoAnswerError(f"the daemon on {path} has no answer (HTTP status {status}); its log: {LOG}")
    try:
        return decode(body)
    except ValueError as error:
        raise NoAnswerError(
            f"the daemon on {path} is {program(body)}, and this is sgpu {__version__}, which can't read its answer: "
            "run the `status` of the daemon's own image, as with kubectl exec in its pod"
        ) from error


def send(path: str, verb: str, order: Order, timeout: float = TIMEOUT) -> Done:
    """Have the daemon behind this socket `cordon` or `uncordon` a GPU. Raises NoAnswerError or OrderRefusedError."""
    status, body = _ask(path, timeout, "POST", f"/{verb}", encode(order))
    if status in (http.client.NOT_FOUND, http.client.REQUEST_ENTITY_TOO_LARGE):  # where nothing is posted
        raise NoAnswerError(f"the daemon on {path} is of a version that knows no `{verb}`: update it")
    if status in (http.client.BAD_REQUEST, http.client.CONFLICT):
        raise OrderRefusedError(body.decode("utf-8", "replace").strip())
    try:
        return decode_done(body)
    except ValueError as error:
        raise NoAnswerError(f"the daemon on {path} has no answer (HTTP status {status}); its log: {LOG}") from error


def _ask(path: str, timeout: float, method: str, target: str, content: bytes = b"") -> tuple[int, bytes]:
    """Return the status and the body of the answer. Raises NoAnswerError."""
    if not path:
        raise NoAnswerError("-status-socket is empty, so that the daemon can't be asked: set it to the daemon's")
    try:
        return _exchange(path, timeout, method, target, content)
    except FileNotFoundError:
        raise NoAnswerError(f"no daemon answers on {path} (there is no such socket): {_is_it_running()}") from None
    except ConnectionRefusedError:
        raise NoAnswerError(f"no daemon answers on {path} (connection refused): {_is_it_running()}") from None
    except PermissionError:
        raise NoAnswerError(
            f"only root may ask the daemon on {path}: run this as root, or in the daemon's pod"
        ) from None
    except TimeoutError:
        raise NoAnswerError(
            f"the daemon on {path} does not answer within {timeout:g} s, so it hangs or this node is overloaded; "
            f"its log: {LOG}"
        ) from None
    except (http.client.RemoteDisconnected, http.client.IncompleteRead, ConnectionError) as error:
        raise NoAnswerError(f"the daemon on {path} hung up before it had answered, as when it restarts") from error
    except http.client.HTTPException as error:
        raise NoAnswerError(f"what listens on {path} does not speak as sgpu does ({_describe(error)})") from error
    except OSError as error:
        raise NoAnswerError(f"the daemon on {path} can't be asked ({_describe(error)}); its log: {LOG}") from error


class _UnixConnection(http.client.HTTPConnection):
    """HTTP to a path instead of a host and port."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _exchange(path: str, timeout: float, method: str, target: str, content: bytes) -> tuple[int, bytes]:
    with closing(_UnixConnection(path, timeout)) as connection:
        with suppress(BrokenPipeError):  # an answer that refuses a body can be there before all of it is sent
            connection.request(method, target, content or None)
        response = connection.getresponse()
        return response.status, response.read()


def _is_it_running() -> str:
    return f"is the DaemonSet's pod running on this node? {POD}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
