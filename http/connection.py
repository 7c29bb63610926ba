"""The client's end of a request: work for it goes on only while it is there."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

__all__ = ["DIRECT", "DirectWrite", "while_connected"]

T = TypeVar("T")

#: Writes a part of an answer whose head and first part have gone out, past all that stands between the handler and the
#: connection. False if it did not: the part has to go the usual way, which waits for a client that lags.
DirectWrite: TypeAlias = Callable[[bytes], bool]
#: Where a request's scope has its :data:`DirectWrite`, if the server gives one.
DIRECT: Final = "llamaherd.write"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of the work, or cancel it when the client leaves.

    The request's body must have been read. When this returns or raises, the work has ended, also if this is cancelled.

    Raises:
        ClientDisconnect: the client left first; the work was cancelled.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
