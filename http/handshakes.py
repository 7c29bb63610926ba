"""TLS handshakes: counted among the connections, and bounded in time.

The loop's own TLS servers tell a protocol of its connection when the handshake is over, and tell nobody when it fails:
as many as there are descriptors could be under way. So connections are accepted here, and counted from then on.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Final

from llamaherd.http.protocol import BoundedProtocol

__all__ = ["TlsServer"]

#: Seconds until the next attempt after the system had no descriptor or memory for a connection, as asyncio waits.
_RETRY_SECONDS: Final = 1.0


class TlsServer:
    """Accepts connections on a listening socket and shakes hands; has the part of ``asyncio.Server`` that uvicorn uses.

    Args:
        listener: Does not block. It is its owner's to close.
        make: Returns a new connection's protocol. The limits are those of its class.
    """

    def __init__(self, listener: socket.socket, make: Callable[[], BoundedProtocol], context: ssl.SSLContext) -> None:
        self._listener = listener
        self._make = make
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting = self._loop.create_task(self._accept())

    def close(self) -> None:
        """Accept no more, and end the handshakes that are under way. Idempotent."""
        self._accepting.cancel()
        for handshake in self._handshakes:
            handshake.cancel()

    async def wait_closed(self) -> None:
        """Return when nothing of this is left; call :meth:`close` first."""
        await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except ConnectionError:
                continue  # it has left already
            except OSError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            protocol = self._make()
            if not protocol.expect():
                connection.close()
            else:
                handshake = self._loop.create_task(self._shake_hands(connection, protocol))
                self._handshakes.add(handshake)
                handshake.add_done_callback(self._handshakes.discard)
            await asyncio.sleep(0)  # who connects without end does not keep the others waiting

    async def _shake_hands(self, connection: socket.socket, protocol: BoundedProtocol) -> None:
        try:
            # No TLS, no common version or too slow: there is nobody to tell.
            with contextlib.suppress(OSError):
                await self._loop.connect_accepted_socket(
                    lambda: protocol,
                    connection,
                    ssl=self._context,
                    ssl_handshake_timeout=protocol.limits.head_seconds,
                )
        finally:
            protocol.give_up()
