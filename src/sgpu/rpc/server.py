"""Serve the calls of one connection: one task a call, none of which outlives its connection."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import attrs
import h2.exceptions
import trio
from google.protobuf.message import DecodeError
from purerpc import Cardinality, Service, Status, StatusCode
from purerpc.grpclib import events

from sgpu.rpc.protocol import BrokenPeerError, Protocol, RpcError, StreamReset, frame

logger = logging.getLogger(__name__)

#: Bytes taken off the socket at a time.
RECEIVE_BYTES = 64 * 1024


@attrs.frozen
class Route:
    """What answers one method: `handler(message)`, a coroutine or, if `streams`, an asynchronous generator."""

    handler: Callable[[Any], Any]
    request_type: Callable[[], Any]
    streams: bool


def routes(services: Iterable[Service]) -> Mapping[str, Route]:
    """The routes of purerpc's generated servicers (their `.service`), by gRPC path (`/package.Service/Method`)."""
    table = {}
    for service in services:
        for name, bound in service.methods.items():
            cardinality = bound.signature.cardinality
            if cardinality not in (Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM):
                raise NotImplementedError(f"{service.name}/{name}: calls that stream requests are not served")
            table[f"/{service.name}/{name}"] = Route(
                handler=_drop_headers(bound.method_fn),
                request_type=bound.signature.request_type,
                streams=cardinality is Cardinality.UNARY_STREAM,
            )
    return table


def _drop_headers(method: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda message: method(message, request=None)


async def serve_connection(table: Mapping[str, Route], stream: trio.abc.Stream) -> None:
    """Serve one connection until the peer closes it or breaks the protocol; then every call on it is cancelled.

    Never raises for anything the peer does. A handler's own error is logged and answered with UNKNOWN.
    """
    async with stream:
        await _Connection(table, stream).run()


@attrs.define
class _Call:
    """A call whose request is coming in or being answered."""

    stream_id: int
    path: str
    messages: list[bytes] = attrs.Factory(list)
    started: bool = False  # whether the response's headers are out
    cancel_scope: trio.CancelScope = attrs.Factory(trio.CancelScope)


class _Connection:
    def __init__(self, table: Mapping[str, Route], stream: trio.abc.Stream) -> None:
        self._table = table
        self._stream = stream
        self._protocol = Protocol(client_side=False)
        self._calls: dict[int, _Call] = {}
        # Both are replaced at each use: whoever waits on the old one is woken.
        self._output_ready = trio.Event()
        self._window_opened = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            self._flush()
            await self._read(nursery)
            # The peer is gone or not to be trusted: a call that is still running would answer nobody.
            nursery.cancel_scope.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        """Until the peer closes the connection, start a task for each complete request."""
        try:
            while data := await self._stream.receive_some(RECEIVE_BYTES):
                for event in self._protocol.receive(bytes(data)):
                    self._react(event, nursery)
                self._flush()
        except trio.BrokenResourceError:
            pass  # a peer that vanished without a word, which is no different from one that closed
        except BrokenPeerError as error:
            logger.warning("closed a connection whose peer broke the protocol (%s)", error)

    def _react(self, event: events.Event, nursery: trio.Nursery) -> None:
        if isinstance(event, events.WindowUpdated):
            self._window_opened.set()
            self._window_opened = trio.Event()
        elif isinstance(event, events.RequestReceived):
            path = f"/{event.service_name}/{event.method_name}"
            self._calls[event.stream_id] = _Call(event.stream_id, path)
        elif isinstance(event, events.MessageReceived):
            self._protocol.acknowledge(event.stream_id, event.flow_controlled_length)
            self._calls[event.stream_id].messages.append(event.data)
        elif isinstance(event, events.RequestEnded):
            nursery.start_soon(self._answer, self._calls[event.stream_id])
        elif isinstance(event, StreamReset) and (call := self._calls.pop(event.stream_id, None)):
            call.cancel_scope.cancel()

    async def _answer(self, call: _Call) -> None:
        with call.cancel_scope:
            try:
                await self._respond(call)
            except RpcError as error:
                self._end(call, Status(error.code, error.message))
            except h2.exceptions.ProtocolError:
                pass  # the peer reset the call, or said goodbye, while we were about to write
            except Exception:
                logger.exception("%s failed", call.path)
                self._end(call, Status(StatusCode.UNKNOWN, f"{call.path} failed; the plugin's log says why"))
        self._calls.pop(call.stream_id, None)

    async def _respond(self, call: _Call) -> None:
        route = self._table.get(call.path)
        if route is None:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"no method {call.path} here")
        request = _parse(route, call)
        if route.streams:
            generator: AsyncGenerator[Any, None] = route.handler(request)
            async with aclosing(generator) as responses:
                async for response in responses:
                    await self._send(call, response)
        else:
            answer: Awaitable[Any] = route.handler(request)
            await self._send(call, await answer)
        self._end(call, Status(StatusCode.OK))

    async def _send(self, call: _Call, message: Any) -> None:  # noqa: ANN401  # a protobuf message
        if not call.started:
            self._protocol.start_response(call.stream_id, "+proto")
            call.started = True
        data = frame(message)
        while data:
            window_opened = self._window_opened  # taken before the window is read, so that no update is missed
            size = min(self._protocol.flow_control_window(call.stream_id), len(data))
            if size > 0:
                self._protocol.send_data(call.stream_id, bytes(data[:size]))
                self._flush()
                data = data[size:]
            else:
                await window_opened.wait()

    def _end(self, call: _Call, status: Status) -> None:
        try:
            if call.started:
                self._protocol.end_response(call.stream_id, status)
            else:
                self._protocol.respond_status(call.stream_id, status, "+proto")
        except h2.exceptions.ProtocolError:
            return  # as in _answer
        self._flush()

    def _flush(self) -> None:
        self._output_ready.set()

    async def _write(self) -> None:
        """Write what the protocol has to say. The only writer, so that cancelling a call never cuts a frame."""
        while True:
            await self._output_ready.wait()
            self._output_ready = trio.Event()
            try:
                await self._stream.send_all(self._protocol.data_to_send())
            except trio.BrokenResourceError:
                return  # _read sees the end too


def _parse(route: Route, call: _Call) -> Any:  # noqa: ANN401  # a protobuf message
    if len(call.messages) != 1:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"{call.path} takes one message, got {len(call.messages)}")
    request = route.request_type()
    try:
        request.ParseFromString(call.messages[0])
    except DecodeError as error:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"{call.path}: the request is not {route.request_type}") from error
    return request
