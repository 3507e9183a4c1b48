"""Call methods of a gRPC server on a unix socket: one call at a time on a channel, no task behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio
from google.protobuf.message import DecodeError
from purerpc import StatusCode
from purerpc.grpclib import events

from sgpu.lib.logs import cut
from sgpu.rpc.protocol import (
    MAX_MESSAGE_BYTES,
    MAX_STATUS_MESSAGE,
    RECEIVE_BYTES,
    MessageRefused,
    Protocol,
    RpcError,
    StreamReset,
    frame,
)

Response = TypeVar("Response")


@asynccontextmanager
async def open_channel(path: Path, max_message_bytes: int = MAX_MESSAGE_BYTES) -> AsyncIterator[Channel]:
    """Connect to the server that listens on the socket at `path`. Raises OSError when none does.

    A longer answer than `max_message_bytes` is an RpcError, RESOURCE_EXHAUSTED.
    """
    async with await trio.open_unix_socket(str(path)) as stream:
        yield Channel(stream, Protocol(client_side=True, max_message_bytes=max_message_bytes))


async def unary_call(
    path: Path,
    method: str,
    request: Any,  # noqa: ANN401  # a protobuf message
    response_type: Callable[[], Response],
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> Response:
    """Connect, make one call (`/package.Service/Method`), and disconnect.

    Raises OSError when nobody listens, trio.BrokenResourceError when the server goes away, BrokenPeerError when it
    does not speak gRPC, RpcError when it answers something other than OK. There is no deadline: put one around it.
    """
    async with open_channel(path, max_message_bytes) as channel:
        return await channel.unary(method, request, response_type)


@attrs.frozen
class Channel:
    """A connection to a server. Use it from one task, for one call after the other, and no more once one is cancelled.

    A stream of responses that is left before its end is given up; surround it with `aclosing`.
    """

    stream: trio.abc.Stream
    protocol: Protocol

    async def unary(self, method: str, request: Any, response_type: Callable[[], Response]) -> Response:  # noqa: ANN401
        """Call a method that answers one message. Raises as `unary_call` does."""
        responses: list[Response] = []
        async with aclosing(self.streaming(method, request, response_type)) as stream:
            async for response in stream:
                responses.append(response)
                if len(responses) > 1:
                    break
        if len(responses) != 1:
            count = "more than one message" if responses else "no message"
            raise RpcError(StatusCode.INTERNAL, f"{method} answered {count}")
        return responses[0]

    async def streaming(
        self,
        method: str,
        request: Any,  # noqa: ANN401
        response_type: Callable[[], Response],
    ) -> AsyncGenerator[Response, None]:
        """Call a method that answers any number of messages. Raises as `unary_call` does."""
        stream_id = self.protocol.start_request(method)
        unsent = frame(request)
        ended = False  # in both directions
        try:
            while True:
                unsent = self._send(stream_id, unsent)
                for event in await self._receive():
                    if event.stream_id != stream_id:
                        continue  # the window of the whole connection, or a straggler of a call before
                    if isinstance(event, events.MessageReceived):
                        yield _parse(method, response_type, event.data)
                    elif isinstance(event, MessageRefused):
                        raise event.error
                    elif isinstance(event, StreamReset):
                        ended = True
                        raise RpcError(StatusCode.CANCELLED, f"the server reset {method} ({event.reason})")
                    elif isinstance(event, events.ResponseEnded):
                        ended = not unsent
                        if event.status.status_code is not StatusCode.OK:
                            message = cut(event.status.status_message, MAX_STATUS_MESSAGE)
                            raise RpcError(event.status.status_code, message)
                        return
        finally:
            if not ended:
                self.protocol.give_up(stream_id)

    def _send(self, stream_id: int, unsent: memoryview) -> memoryview:
        """Send as much as the server's windows admit. Returns the rest."""
        if unsent and (size := min(self.protocol.room(stream_id), len(unsent))) > 0:
            self.protocol.send_data(stream_id, unsent[:size], end=size == len(unsent))
            unsent = unsent[size:]
        return unsent

    async def _receive(self) -> list[events.Event]:
        await self.stream.send_all(self.protocol.take_output())
        data = await self.stream.receive_some(RECEIVE_BYTES)
        if not data:
            raise trio.BrokenResourceError("the server closed the connection")
        return self.protocol.receive(bytes(data))


def _parse(method: str, response_type: Callable[[], Response], data: bytes) -> Response:
    response: Any = response_type()
    try:
        response.ParseFromString(data)
    except DecodeError as error:
        name = type(response).__name__
        raise RpcError(StatusCode.INTERNAL, f"{method} answered what is not a {name}: {error}") from error
    return response  # type: ignore[no-any-return]
