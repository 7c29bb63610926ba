"""When a model whose load failed may be tried again. Pure: the caller brings the time."""

from typing import Final

__all__ = ["Backoff"]

FIRST_SECONDS: Final = 1.0
MOST_SECONDS: Final = 60.0


class Backoff:
    """Refuses a model for a while after repeated load failures.

    The first failure costs nothing, so that a mended file can be tried at once; the second one second, and each further
    one twice as much, up to a minute. A load that succeeds ends it.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0

    def failed(self, now: float, *, costly: bool = False) -> None:
        """A load has failed. A ``costly`` failure, such as one for want of memory, is never tried again at once."""
        self._failures = max(self._failures + 1, 2 if costly else 1)
        if self._failures > 1:
            self._until = now + min(FIRST_SECONDS * 2.0 ** (self._failures - 2), MOST_SECONDS)

    def succeeded(self) -> None:
        """A load has succeeded."""
        self._failures = 0
        self._until = 0.0

    def wait(self, now: float) -> float:
        """Return the seconds until the next try is allowed, 0 if it is now."""
        return max(0.0, self._until - now)
