"""Work on files beside the loop, in threads that nobody has to wait for.

A file system that hangs (a network's, whose server is gone) blocks a thread for good. ``asyncio.to_thread`` has a few
threads for everything: some that are blocked stop all others' work, and both the loop and the interpreter wait for them
at their end. These threads are as many as there is work, and they keep nothing from ending.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

__all__ = ["in_thread"]

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a thread of its own, and return its result. A cancelled call leaves the thread to itself.

    Raises:
        Exception: what the function raises.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(end: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            end(outcome)

    def work() -> None:
        end: Callable[[Any], None] = future.set_result
        outcome: object
        try:
            outcome = function(*args, **kwargs)
        except BaseException as error:
            end, outcome = future.set_exception, error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, end, outcome)

    threading.Thread(target=work, name="llamaherd-files", daemon=True).start()
    return await future
