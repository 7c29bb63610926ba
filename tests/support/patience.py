"""Deadlines that measure the time that this process had.

A test that gives up after so many seconds by the clock also gives up where the machine was suspended, or the process
stopped, and nothing is wrong. Here such a time counts as one short piece, however long it was. No test is made to wait
longer by this: what holds is noticed at once.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, wait
from typing import Final, TypeVar

__all__ = ["POLL", "ended", "holds_within", "patience", "result_of"]

T = TypeVar("T")

#: Seconds of one piece.
PIECE: Final = 0.1
#: Seconds between two looks at what tells nobody that it has changed.
POLL: Final = 0.005


@contextlib.asynccontextmanager
async def patience(seconds: float) -> AsyncGenerator[None]:
    """As ``asyncio.timeout``. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    left = seconds
    timers: list[asyncio.TimerHandle] = []

    def end_piece() -> None:
        nonlocal left
        left -= PIECE
        if left <= 0:
            limit.reschedule(loop.time())
        else:
            timers[:] = [loop.call_later(PIECE, end_piece)]

    async with asyncio.timeout(None) as limit:
        timers.append(loop.call_later(PIECE, end_piece))
        try:
            yield
        finally:
            timers[0].cancel()


def holds_within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Wait until something holds; return whether it does."""
    for _ in range(round(seconds / POLL)):
        if holds():
            return True
        time.sleep(POLL)
    return holds()


def ended(thread: threading.Thread, seconds: float) -> bool:
    """Wait until a thread has ended; return whether it has."""
    for _ in range(round(seconds / PIECE)):
        thread.join(PIECE)
        if not thread.is_alive():
            return True
    return False


def result_of(future: "Future[T]", seconds: float) -> T:
    """Return a future's result. Raises TimeoutError, or what the future raises."""
    for _ in range(round(seconds / PIECE)):
        if wait([future], PIECE).done:
            return future.result()
    raise TimeoutError(f"no result within {seconds:g} s")
