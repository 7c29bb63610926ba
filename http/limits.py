"""What one server puts up with from its clients."""

import msgspec

__all__ = ["Limits"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of connections and of what comes before a request's body.

    Attributes:
        max_connections: Open connections, idle ones and TLS handshakes included.
        head_bytes: Size of a request's line and headers.
        head_seconds: Time that they may take to arrive. A TLS handshake before them has as much.
        send_seconds: Time that a client may take nothing of an answer that waits for it, as nginx's ``send_timeout``.
        drain_seconds: Time that requests in flight have to end after the server was told to stop.
    """

    max_connections: int = 512
    head_bytes: int = 64 * 1024
    head_seconds: float = 30.0
    send_seconds: float = 60.0
    drain_seconds: float = 10.0
