"""Large answers of JSON: encoded and sent in parts, so that others have the loop in between.

A thread would not help: who encodes holds the interpreter's lock until the whole is done.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["PART_BYTES", "PartedResponse", "in_parts"]

#: About how large a part is: half a millisecond of numbers, and more than a connection takes before it says to wait.
PART_BYTES: Final = 128 * 1024


async def in_parts(fragments: Iterable[bytes]) -> deque[bytes]:
    """Return what the fragments are together, in parts of at least :data:`PART_BYTES` but the last. After each part
    everybody else on the loop has a turn.
    """
    parts: deque[bytes] = deque()
    part: list[bytes] = []
    size = 0
    for fragment in fragments:
        part.append(fragment)
        size += len(fragment)
        if size >= PART_BYTES:
            parts.append(b"".join(part))
            part.clear()
            size = 0
            await asyncio.sleep(0)
    parts.append(b"".join(part))
    return parts


class PartedResponse(Response):
    """An answer of JSON in parts, with their length told ahead. A part is freed once it is sent, so it serves once."""

    def __init__(self, parts: deque[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self._parts = parts
        length = sum(map(len, parts))
        self.init_headers({"Content-Length": str(length), "Content-Type": "application/json; charset=utf-8"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while self._parts:
            part = self._parts.popleft()
            await send({"type": "http.response.body", "body": part, "more_body": bool(self._parts)})
