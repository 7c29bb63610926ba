"""The access log: one line per request, of what was asked and how it ended, never of what was said."""

import logging
import time
from typing import Final
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaherd.http.connection import DIRECT, DirectWrite

__all__ = ["AccessLog"]

logger: Final = logging.getLogger("llamaherd.access")


class AccessLog:
    """Logs client, method, path (without the query), status, bytes of the answer's body, and milliseconds.

    The line comes when the answer has ended. A status of 0 means that there was none: the client left first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = size = 0

        async def note(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                size += len(message.get("body", b""))
            await send(message)

        direct: DirectWrite | None = scope.get(DIRECT)
        if direct is not None:

            def write(body: bytes) -> bool:
                nonlocal size
                written = direct(body)
                size += len(body) if written else 0
                return written

            scope[DIRECT] = write

        try:
            await self._app(scope, receive, note)
        finally:
            client = scope.get("client")
            logger.info(
                "%s %s %s %d %d %.1f ms",
                client[0] if client else "-",
                scope["method"],
                _path(scope),
                status,
                size,
                (time.monotonic() - began) * 1000,
            )


def _path(scope: Scope) -> str:
    """Return the path as it came, quoted: decoded, its line breaks would be those of the log."""
    return quote(scope["path"], safe="/:@!$&'()*+,;=~")
