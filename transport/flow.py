"""The words and the flow control that both ends of the ``zmq`` transport share.

ZeroMQ queues without telling anyone, and the pool's one ROUTER cannot stop reading one peer alone. So neither end
leaves it to ZeroMQ to hold a sender back: a sender may have ``limit`` bytes unacknowledged, and the receiver
acknowledges what its reader took.
"""

from typing import Final

__all__ = ["BYE", "CREDIT", "DOWN", "PROBE", "UP", "Meter", "Window", "wire_size"]

#: Kinds of the transport's own frames; no message's kind starts with this byte. They never surface.
BYE: Final = b"\x01bye"
CREDIT: Final = b"\x01credit"
PROBE: Final = b"\x01probe"

#: Start the routing ids of a worker's two sockets: what it says, and what it hears.
UP: Final = b"u:"
DOWN: Final = b"d:"

_OVERHEAD: Final = 128


def wire_size(body: bytes) -> int:
    """Return what a message counts for, in bytes; both ends must agree, and an empty body is not free."""
    return len(body) + _OVERHEAD


class Window:
    """The sender's half: how much more may be sent. One message may overshoot the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sent = 0
        self._acknowledged = 0

    @property
    def is_open(self) -> bool:
        return self._sent - self._acknowledged < self._limit

    def sent(self, size: int) -> None:
        self._sent += size

    def acknowledge(self, total: bytes) -> None:
        """Take a ``credit`` frame's body: the bytes consumed since the start, as decimal digits. Nonsense is
        ignored.
        """
        if total.isdigit() and len(total) < 20:
            self._acknowledged = max(self._acknowledged, min(int(total), self._sent))


class Meter:
    """The receiver's half: when to acknowledge."""

    def __init__(self, limit: int) -> None:
        self._step = limit // 4
        self._reported = 0

    def due(self, consumed: int) -> bytes | None:
        """Return the body of a ``credit`` frame if one is due, given the bytes consumed since the start."""
        if consumed - self._reported < self._step:
            return None
        self._reported = consumed
        return b"%d" % consumed
