"""Maps methods to their handlers, from purerpc's generated servicers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
from google.protobuf.message import DecodeError
from purerpc import Cardinality, Service, StatusCode

from sgpu.rpc.protocol import RpcError


@attrs.frozen
class Route:
    """The handler of one method: `handler(message)` gives the answer, or a coroutine if it has to wait; if
    `streams`, an asynchronous generator.
    """

    handler: Callable[[Any], Any]
    request_type: Callable[[], Any]
    streams: bool

    def parse(self, message: bytes | None) -> Any:  # noqa: ANN401  # a protobuf message
        """Return the request in a message. Raises RpcError."""
        request = self.request_type()
        if message is None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "no message in the request")
        try:
            request.ParseFromString(message)
        except DecodeError as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"not a {type(request).__name__}: {error}") from error
        return request


def routes(services: Iterable[Service]) -> Mapping[str, Route]:
    """Return the routes of purerpc's generated servicers (their `.service`), by path (`/package.Service/Method`)."""
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
