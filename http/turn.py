"""One turn for all streams: a step of a model feeds many, and they are served by one callback of the loop."""

import asyncio
from typing import Protocol

__all__ = ["Flushable", "Turn"]


class Flushable(Protocol):
    """A stream that has been fed."""

    def flush(self) -> None:
        """Send what has come. It must not raise."""
        ...


class Turn:
    """Calls ``flush`` of everything that was added, once each, in the next turn of the loop."""

    def __init__(self) -> None:
        self._fed: dict[Flushable, None] = {}

    def add(self, stream: Flushable) -> None:
        """Have a stream flushed."""
        if not self._fed:
            asyncio.get_running_loop().call_soon(self._flush)
        self._fed[stream] = None

    def _flush(self) -> None:
        fed, self._fed = self._fed, {}
        for stream in fed:
            stream.flush()
