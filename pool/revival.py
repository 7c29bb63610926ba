"""What follows from a worker's end that nobody wanted: when its model, or a further replica of it, is tried again."""

import asyncio
from collections.abc import Callable
from typing import Final

from llamaherd.pool.clocks import now
from llamaherd.pool.entry import Entry
from llamaherd.pool.errors import PoolError

__all__ = ["GROW_AGAIN_SECONDS", "Revivals"]

#: Seconds after which a further replica is tried again where one could not be loaded.
GROW_AGAIN_SECONDS: Final = 60.0


class Revivals:
    """Keeps the timers of what is to be tried again. They are the entries', which stop them at the end.

    Args:
        revive: Called when a pinned model may come back.
        let_grow: Called when a further replica may be tried again.
        is_closing: Whether nothing is to come back any more.
    """

    def __init__(
        self, revive: Callable[[Entry], None], let_grow: Callable[[Entry], None], is_closing: Callable[[], bool]
    ) -> None:
        self._revive: Final = revive
        self._let_grow: Final = let_grow
        self._is_closing: Final = is_closing

    def count(self, entry: Entry, error: PoolError, *, loading: bool, starved: bool) -> None:
        """A worker has ended by itself, while it loaded or later, and perhaps for want of memory."""
        if entry.lives:
            if loading and entry.growth is None:
                loop = asyncio.get_running_loop()
                entry.growth = loop.call_later(GROW_AGAIN_SECONDS, self._growth_due, entry)
            return
        if loading:
            entry.backoff.failed(now(), costly=starved)
            if starved:
                error.retry_after = entry.backoff.wait(now())
        entry.reviving = entry.reviving or not loading
        self.await_backoff(entry)

    def await_backoff(self, entry: Entry) -> None:
        """Try once more to bring a model back that is pinned and died, when its back-off allows."""
        if entry.reviving and entry.spec.pinned and not self._is_closing():
            entry.stop_revival()
            loop = asyncio.get_running_loop()
            entry.revival = loop.call_later(entry.backoff.wait(now()), self._revival_due, entry)

    @staticmethod
    def end(entry: Entry) -> None:
        """A model is back, or is not to come back."""
        entry.reviving = False
        entry.stop_revival()

    def _revival_due(self, entry: Entry) -> None:
        entry.revival = None
        self._revive(entry)

    def _growth_due(self, entry: Entry) -> None:
        entry.growth = None
        self._let_grow(entry)
