"""Clients that do not take their answer: how long one may leave it lying, and that nothing more is piled up meanwhile.

A client that has gone is noticed by its connection. One that stays, acknowledges what the kernel sends and reads none
of it is not: its answer would hold a slot, and its connection a place, for good. What counts is progress. A client that
reads slowly is welcome, and what the kernel's own buffers take counts as read.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Final, Protocol, cast

__all__ = ["Lagging", "Outflow", "watch_outflow"]

logger: Final = logging.getLogger("llamaherd.http")

#: Seconds between two looks, where the limit is not so short that it needs more of them.
_INTERVAL: Final = 1.0
#: Looks within the limit.
_LOOKS: Final = 8
#: ``struct linger``: on, for no time at all.
_RESET: Final = struct.pack("ii", 1, 0)


class Lagging(Protocol):
    """A connection that is looked at."""

    def look(self, now: float) -> None:
        """End the connection if its client has taken nothing for too long. ``now`` is the loop's time."""
        ...


async def watch_outflow(connections: Callable[[], Iterable[Lagging]], seconds: float) -> None:
    """Look at connections until cancelled, often enough for such a limit."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(_INTERVAL, seconds / _LOOKS))
        for connection in connections():
            connection.look(loop.time())


class Outflow:
    """What waits in a transport for its client.

    While something lies there the transport's limits are lowered: the protocol counts as paused until all of it has
    gone, so nothing is added, and the amount says whether the client reads. Where no client lags this costs nothing.

    Args:
        transport: The connection.
        seconds: How long the client may take nothing.
    """

    def __init__(self, transport: asyncio.WriteTransport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._left = 0
        self._moved = 0.0
        self._lowered = False

    def look(self, now: float) -> None:
        """Cut the connection off if nothing has left it for too long."""
        waiting = self._transport.get_write_buffer_size()
        if not waiting:
            self._left = 0
            self._lower(False)
        elif not self._left or waiting < self._left:
            self._left, self._moved = waiting, now
            self._lower(True)
        elif now - self._moved >= self._seconds:
            self._cut_off()

    def drained(self) -> None:
        """All that waited has gone: what waits at the next look is something else."""
        self._left = 0

    def _cut_off(self) -> None:
        address = self._transport.get_extra_info("peername")
        client = str(cast("tuple[object, ...]", address)[0]) if isinstance(address, tuple) else "a client"
        logger.warning("%s has taken nothing of its answer for %g s and is cut off", client, self._seconds)
        # A reset: the kernel forgets what it holds, and half an answer is not taken for a whole one.
        connection = self._transport.get_extra_info("socket")
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def _lower(self, lowered: bool) -> None:
        if lowered is not self._lowered:
            self._lowered = lowered
            # Not 0: under TLS nothing at all would be too much then.
            self._transport.set_write_buffer_limits(1 if lowered else None)
