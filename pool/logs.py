"""The last lines that a model's workers printed: bounded in lines and bytes, whatever they print."""

from collections import deque
from typing import Final

__all__ = ["LogRing"]

MAX_LINES: Final = 1000
MAX_LINE_BYTES: Final = 4096


class LogRing:
    """Keeps the last 1,000 lines of at most 4 KiB each, so at most 4 MiB; longer lines are split.

    Fed with raw bytes as they arrive; text is made only when somebody reads it.
    """

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=MAX_LINES)
        self._partial = b""
        #: Lines that were ever added.
        self.count = 0

    def feed(self, data: bytes) -> None:
        """Add what was read from the worker, in pieces of any size."""
        *lines, partial = (self._partial + data).split(b"\n")
        for line in lines[-MAX_LINES:]:
            self._add(line)
        if len(partial) > MAX_LINE_BYTES:
            self._add(partial)
            partial = b""
        self._partial = partial

    def _add(self, line: bytes) -> None:
        for start in range(0, min(len(line), MAX_LINES * MAX_LINE_BYTES), MAX_LINE_BYTES) or (0,):
            self._lines.append(line[start : start + MAX_LINE_BYTES])
            self.count += 1

    def end_line(self) -> None:
        """Close an unfinished line: its writer is gone."""
        if self._partial:
            self._add(self._partial)
            self._partial = b""

    def since(self, count: int) -> tuple[str, ...]:
        """Return the whole lines that were added since :attr:`count` was so much, as far as they are kept."""
        new = min(self.count - count, len(self._lines))
        lines = list(self._lines)[-new:] if new > 0 else []
        return tuple(line.decode(errors="replace") for line in lines)

    def tail(self, count: int = MAX_LINES) -> tuple[str, ...]:
        """Return the last lines, oldest first, unfinished one included; what is not UTF-8 is replaced."""
        lines = [*self._lines, *([self._partial] if self._partial else [])]
        return tuple(line.decode(errors="replace") for line in lines[-count:])
