"""Serve the calls of one connection: one task a call that has to wait, none of which outlives its connection.

What needs no waiting is answered in the turn of the event loop in which it was read, and written in it too: each turn
costs a tenth of an Allocate.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Final

import attrs
import trio
from purerpc import StatusCode
from purerpc.grpclib import events

from sgpu.lib.concurrency import Broadcast, wait_until
from sgpu.rpc.protocol import (
    RECEIVE_BYTES,
    BrokenPeerError,
    MessageRefused,
    Protocol,
    RpcError,
    StreamReset,
    frame,
    quoted,
)
from sgpu.rpc.routing import Route

logger = logging.getLogger(__name__)

#: Bytes of a message given to the writer at a time: the calls of a connection take turns.
_SEND_BYTES: Final = 64 * 1024
#: Unwritten bytes beyond which calls wait for the writer: a peer that is slow to read does not make us hoard.
_CALLS_WAIT: Final = 64 * 1024
#: Unwritten bytes beyond which the reader waits too: what only answers a peer's frames (PING) has no other bound.
_READER_WAITS: Final = 256 * 1024

#: Called for each call that ended: its method's name, the status, and the seconds it took (a stream: until its end).
Ended = Callable[[str, str, float], None]


def _ignore(method: str, code: str, seconds: float) -> None:
    """Ignore the outcome."""


async def serve_connection(table: Mapping[str, Route], stream: trio.abc.Stream, ended: Ended = _ignore) -> None:
    """Serve one connection until the peer closes it or breaks the protocol; then every call on it is cancelled.

    Never raises for anything the peer does. A handler's own error is logged and answered with UNKNOWN.
    """
    async with stream:
        await _Connection(table, stream, ended).run()


@attrs.define(eq=False)
class _Call:
    """A call whose request is coming in or being answered."""

    stream_id: int
    path: str
    message: bytes | None = None
    refusal: RpcError | None = None  # for what came in; the rest is not looked at
    started: bool = False  # whether the response's headers are out
    began: float = attrs.Factory(trio.current_time)
    code: StatusCode = StatusCode.CANCELLED  # what it ends with
    cancel_scope: trio.CancelScope = attrs.Factory(trio.CancelScope)


class _Connection:
    def __init__(self, table: Mapping[str, Route], stream: trio.abc.Stream, ended: Ended) -> None:
        self._table = table
        self._ended = ended
        self._stream = stream
        self._protocol = Protocol(client_side=False)
        self._calls: dict[int, _Call] = {}
        self._descriptor = stream.socket.fileno() if isinstance(stream, trio.SocketStream) else None
        self._writing = False
        self._output_ready = Broadcast()
        self._room = Broadcast()  # the peer opened a window, or the writer took the output
        self._reading = trio.CancelScope()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            async with trio.open_nursery() as calls:
                self._flush()
                await self._read(calls)
                # The peer is gone or not to be trusted: a call that is still running would answer nobody.
                for call in self._calls.values():
                    call.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        """Read until the peer closes the connection, and answer each complete request."""
        with self._reading:
            try:
                while data := await self._receive():
                    ready = [self._react(event, nursery) for event in self._protocol.receive(data)]
                    for call in ready:  # now, because the last of what was read may be that the first is reset
                        if call is not None and not call.cancel_scope.cancel_called:
                            self._answer_now(call, nursery)
                    self._flush()
                    while len(self._protocol.output) > _READER_WAITS:
                        await self._room.next.wait()
            except trio.BrokenResourceError:
                pass  # a peer that vanished without a word, which is no different from one that closed
            except BrokenPeerError as error:
                self._flush()
                logger.warning("closed a connection whose peer broke the protocol: %s", error)

    async def _receive(self) -> bytes:
        """Read what there is, once there is some. trio's stream tries first: in vain, as the peer awaits an answer."""
        if self._descriptor is None:
            return bytes(await self._stream.receive_some(RECEIVE_BYTES))
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            try:
                return os.read(self._descriptor, RECEIVE_BYTES)
            except BlockingIOError:
                pass
            except ConnectionError as error:
                raise trio.BrokenResourceError(str(error)) from error

    def _react(self, event: events.Event, nursery: trio.Nursery) -> _Call | None:
        """Handle an event. Returns a call that can be answered without a task."""
        call = self._calls.get(event.stream_id)
        if isinstance(event, events.WindowUpdated):
            self._room.notify()
        elif isinstance(event, events.RequestReceived):
            path = f"/{event.service_name}/{event.method_name}"
            self._calls[event.stream_id] = _Call(event.stream_id, path)
        elif call is None:
            pass  # about a call that was refused and answered before it was complete
        elif isinstance(event, StreamReset):
            del self._calls[call.stream_id]
            call.cancel_scope.cancel()
        elif call.refusal is not None:
            pass
        elif isinstance(event, MessageRefused):
            self._refuse(call, event.error, nursery)
        elif isinstance(event, events.MessageReceived):
            if call.message is not None:
                self._refuse(call, RpcError(StatusCode.INVALID_ARGUMENT, "more than one message"), nursery)
            call.message = event.data
        elif isinstance(event, events.RequestEnded):
            route = self._table.get(call.path)
            if route is not None and not route.streams:
                return call
            nursery.start_soon(self._answer, call)
        return None

    def _refuse(self, call: _Call, error: RpcError, nursery: trio.Nursery) -> None:
        call.refusal = error
        nursery.start_soon(self._answer, call)

    def _answer_now(self, call: _Call, nursery: trio.Nursery) -> None:
        """Answer without a task, if neither the handler nor the peer has to be waited for."""
        with self._answering(call):
            answer = self._handle(call)
            waits = inspect.isawaitable(answer)
            data = memoryview(b"") if waits else frame(answer)
            if waits or len(data) > self._room_for(call):
                nursery.start_soon(self._answer, call, answer)
                return
            self._send_part(call, data)
            self._end(call, StatusCode.OK, "")
        self._forget(call)

    async def _answer(self, call: _Call, answer: Any = None) -> None:  # noqa: ANN401  # as `_handle` gave it
        try:
            with self._answering(call), call.cancel_scope:
                await self._respond(call, self._handle(call) if answer is None else answer)
                self._end(call, StatusCode.OK, "")
        finally:
            self._forget(call)

    @contextmanager
    def _answering(self, call: _Call) -> Iterator[None]:
        """Answer with the error where there is one."""
        try:
            yield
        except RpcError as error:
            self._end(call, error.code, error.message)
        except Exception:
            logger.exception("%s failed", call.path)
            self._end(call, StatusCode.UNKNOWN, f"{call.path} failed; the plugin's log says why")

    def _forget(self, call: _Call) -> None:
        if call.path in self._table:  # a name that the peer made up is not counted
            self._ended(call.path.rpartition("/")[2], call.code.name, trio.current_time() - call.began)
        self._calls.pop(call.stream_id, None)

    def _handle(self, call: _Call) -> Any:  # noqa: ANN401  # what the route's handler returns
        if call.refusal is not None:
            raise call.refusal
        route = self._table.get(call.path)
        if route is None:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"no method {quoted(call.path)} here")
        return route.handler(route.parse(call.message))

    async def _respond(self, call: _Call, answer: Any) -> None:  # noqa: ANN401  # as `_handle` gave it
        if self._table[call.path].streams:
            generator: AsyncGenerator[Any, None] = answer
            async with aclosing(generator) as responses:
                async for response in responses:
                    await self._send(call, frame(response))
        else:
            await self._send(call, frame(await answer if inspect.isawaitable(answer) else answer))

    async def _send(self, call: _Call, data: memoryview) -> None:
        while data:
            # A call that was reset ends here, before it touches its stream; one that has much to say lets others in.
            await trio.lowlevel.checkpoint()
            size = min(self._room_for(call), len(data))
            if size > 0:
                self._send_part(call, data[:size])
                self._flush()
                data = data[size:]
            else:
                await self._room.next.wait()

    def _room_for(self, call: _Call) -> int:
        """Return how many bytes can be sent now."""
        if len(self._protocol.output) > _CALLS_WAIT:
            return 0
        return min(self._protocol.room(call.stream_id), _SEND_BYTES)

    def _send_part(self, call: _Call, data: memoryview) -> None:
        if not call.started:
            self._protocol.start_response(call.stream_id)
            call.started = True
        self._protocol.send_data(call.stream_id, data)

    def _end(self, call: _Call, code: StatusCode, message: str) -> None:
        if call.cancel_scope.cancel_called:
            return  # the peer reset the call, or is gone
        call.code = code
        self._protocol.end_response(call.stream_id, code, message, started=call.started)
        if call.refusal is not None:
            self._protocol.give_up(call.stream_id)
        self._flush()

    def _flush(self) -> None:
        """Write what can be written without waiting. The rest, and any error, is the writer's."""
        output = self._protocol.output
        if output and self._descriptor is not None and not self._writing:
            with suppress(OSError):
                del output[: os.write(self._descriptor, output)]
        if output:
            self._output_ready.notify()

    async def _write(self) -> None:
        """Write what the protocol has to say. A task by itself, so that cancelling a call never cuts a frame."""
        while True:
            await wait_until(lambda: bool(self._protocol.output), self._output_ready)
            output = self._protocol.take_output()
            self._room.notify()
            self._writing = True
            try:
                await self._stream.send_all(output)
            except trio.BrokenResourceError:
                self._reading.cancel()  # whatever it asks for now, it will not hear the answer
                return
            self._writing = False
