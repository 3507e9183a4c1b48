"""gRPC over unix sockets: listen, serve, and call. Knows nothing of GPUs or of the kubelet.

purerpc generates the servicers, and its events and status codes are used; the rest is left out. Its server and channel
are TCP only, swallow `Cancelled`, and let a call outlive its connection; h2 below it takes most of a call's time.
"""

from sgpu.rpc.client import Channel, open_channel, unary_call
from sgpu.rpc.protocol import MAX_MESSAGE_BYTES, BrokenPeerError, RpcError
from sgpu.rpc.routing import Route, routes
from sgpu.rpc.server import serve_connection
from sgpu.rpc.unix import AddressInUseError, Identity, identity, listen, peer_pid, remove_stale

__all__ = [
    "MAX_MESSAGE_BYTES",
    "AddressInUseError",
    "BrokenPeerError",
    "Channel",
    "Identity",
    "Route",
    "RpcError",
    "identity",
    "listen",
    "open_channel",
    "peer_pid",
    "remove_stale",
    "routes",
    "serve_connection",
    "unary_call",
]
