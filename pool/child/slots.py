"""Which sequence ids of the cache are taken."""

from typing import Final

from llamaherd.pool.child.context import Context

__all__ = ["Slots"]


class Slots:
    """Hands out the sequence ids 0 to ``count`` - 1 of a context."""

    def __init__(self, context: Context, count: int) -> None:
        self._context: Final = context
        self._free: Final = list(range(count - 1, -1, -1))

    def acquire(self) -> int | None:
        """Return an id whose sequence is empty; None when all are taken."""
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        """Take an id back and drop what its sequence holds in the cache."""
        self._context.forget(slot)
        self._free.append(slot)
