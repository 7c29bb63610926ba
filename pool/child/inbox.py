"""What other threads have for one thread, in order, and its wait for more.

A :class:`queue.SimpleQueue` would do, but for its ``get`` with a timeout. Before Python 3.13, where that time has
passed already when the wait begins, since the thread lost its core in between, the wait has no end. With a timeout of
some microseconds one call of a hundred thousand fell into that on a quiet machine, and requests with it.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty
from time import monotonic
from typing import Final, Generic, TypeVar

__all__ = ["Inbox"]

T = TypeVar("T")


class Inbox(Generic[T]):
    """An unbounded queue: any thread puts, one thread gets.

    Args:
        clock: Seconds, by which a wait is measured.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock: Final = clock
        self._items: Final[deque[T]] = deque()
        #: Free from the moment when something comes until the reader, who found nothing, has seen that.
        self._news: Final = threading.Lock()
        self._news.acquire()

    def empty(self) -> bool:
        """Whether there is nothing to get."""
        return not self._items

    def put(self, item: T) -> None:
        """Add an item. Never blocks, also in a signal's handler."""
        self._items.append(item)
        with contextlib.suppress(RuntimeError):  # it is free already, and who takes it looks for items then
            self._news.release()

    def get(self, timeout: float | None = None) -> T:
        """Return the next item; wait for it, but for no longer than so many seconds.

        Raises:
            queue.Empty: nothing has come.
        """
        items = self._items
        until = None if timeout is None else self._clock() + timeout
        while not items:
            left = -1.0  # without end
            if until is not None:
                left = until - self._clock()
                if left <= 0.0:
                    raise Empty
            self._news.acquire(timeout=left)
        return items.popleft()
