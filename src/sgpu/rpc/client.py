"""Call methods of a gRPC server on a unix socket: one call at a time on a channel, no task behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio
from purerpc import StatusCode
from purerpc.grpclib import events

from sgpu.rpc.protocol import Protocol, RpcError, StreamReset, frame

#: Bytes taken off the socket at a time.
RECEIVE_BYTES = 64 * 1024

Response = TypeVar("Response")


@asynccontextmanager
async def open_channel(path: Path) -> AsyncIterator[Channel]:
    """Connect to the server that listens on the socket at `path`. Raises OSError when none does."""
    async with await trio.open_unix_socket(str(path)) as stream:
        yield Channel(stream, Protocol(client_side=True))


async def unary_call(path: Path, method: str, request: Any, response_type: Callable[[], Response]) -> Response:  # noqa: ANN401  # a protobuf message
    """Connect, make one call (`/package.Service/Method`), and disconnect.

    Raises OSError when nobody listens or the server goes away, RpcError when it answers something other than OK.
    There is no deadline: put one around it.
    """
    async with open_channel(path) as channel:
        return await channel.unary(method, request, response_type)


@attrs.frozen
class Channel:
    """A connection to a server. Use it from one task, for one call after the other."""

    stream: trio.abc.Stream
    protocol: Protocol

    async def unary(self, method: str, request: Any, response_type: Callable[[], Response]) -> Response:  # noqa: ANN401
        """Call a method that answers one message. Raises as `unary_call` does."""
        responses = [response async for response in self.streaming(method, request, response_type)]
        if len(responses) != 1:
            raise RpcError(StatusCode.INTERNAL, f"{method} answered {len(responses)} messages instead of one")
        return responses[0]

    async def streaming(
        self,
        method: str,
        request: Any,  # noqa: ANN401
        response_type: Callable[[], Response],
    ) -> AsyncGenerator[Response, None]:
        """Call a method that answers any number of messages. Raises as `unary_call` does."""
        service, name = method.strip("/").split("/")
        stream_id = self.protocol.get_next_available_stream_id()
        # The authority is what the kubelet's own dialler says; a socket has no host to name.
        self.protocol.start_request(stream_id, "http", service, name, None, "localhost", None, "+proto")
        await self._send(stream_id, frame(request))
        while True:
            for event in await self._receive():
                if isinstance(event, events.MessageReceived):
                    self.protocol.acknowledge(stream_id, event.flow_controlled_length)
                    response: Any = response_type()
                    response.ParseFromString(event.data)
                    yield response
                elif isinstance(event, events.ResponseEnded):
                    if event.status.status_code is not StatusCode.OK:
                        raise RpcError(event.status.status_code, event.status.status_message)
                    return
                elif isinstance(event, StreamReset):
                    raise RpcError(StatusCode.CANCELLED, f"the server reset {method}")

    async def _send(self, stream_id: int, data: memoryview) -> None:
        while data:
            size = min(self.protocol.flow_control_window(stream_id), len(data))
            self.protocol.send_data(stream_id, bytes(data[:size]), end_stream=size == len(data))
            data = data[size:]
            if data:
                await self._receive()  # the peer's leave to send more
        await self._flush()

    async def _receive(self) -> list[events.Event]:
        await self._flush()
        data = await self.stream.receive_some(RECEIVE_BYTES)
        if not data:
            raise trio.BrokenResourceError("the server closed the connection")
        return self.protocol.receive(bytes(data))

    async def _flush(self) -> None:
        await self.stream.send_all(self.protocol.data_to_send())
