"""One harmless call of whoever listens on a socket, with a deadline. Knows no service."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

import attrs
import trio
from purerpc import StatusCode

from sgpu import rpc
from sgpu.api import v1beta1_pb2

#: Seconds. Who is asked answers from memory.
TIMEOUT: Final = 3.0


@attrs.frozen
class Peer:
    """The result of a call. `code` is None without an answer; `pid` is 0 if it is not visible.

    `absent`: there is no such socket; `refused`: nobody listens on it any more.
    """

    code: StatusCode | None = None
    message: str = ""
    pid: int = 0
    absent: bool = False
    refused: bool = False

    @property
    def answered(self) -> bool:
        """Return whether the method exists, and succeeded."""
        return self.code is StatusCode.OK


async def call(path: Path, method: str) -> Peer:
    """Call a method that takes nothing, and leave its answer unread."""
    pid = 0
    try:
        with trio.fail_after(TIMEOUT):
            async with rpc.open_channel(path) as channel:
                assert isinstance(channel.stream, trio.SocketStream)
                pid = rpc.peer_pid(channel.stream.socket)
                await channel.unary(method, v1beta1_pb2.Empty(), v1beta1_pb2.Empty)
    except rpc.RpcError as error:
        return Peer(error.code, f"it answers {error}", pid)
    except trio.TooSlowError:
        return Peer(message=f"it does not answer within {TIMEOUT:g} s", pid=pid)
    except (OSError, trio.BrokenResourceError, rpc.BrokenPeerError) as error:
        number = getattr(error, "errno", None)
        refused, absent = number == errno.ECONNREFUSED, number == errno.ENOENT
        return Peer(message="nobody listens on it" if refused else failure(error), absent=absent, refused=refused)
    return Peer(StatusCode.OK, "it answers", pid)


def failure(error: Exception) -> str:
    """Return the text of an error, without the number that OSError puts before it."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
