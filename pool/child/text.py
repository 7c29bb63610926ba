"""From token bytes to text that may be sent: whole characters only, and never the beginning of a stop string.

Pure Python without dependencies. The result depends on the bytes alone and not on how they were cut into tokens.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Final

__all__ = ["StopFinder", "TextStream", "sendable"]

_HALF: Final = re.compile("[\ud800-\udfff]")


def sendable(text: str) -> str:
    """Return a text with U+FFFD for halves of surrogate pairs. JSON can spell them, but they have no UTF-8, so no
    message can hold them.
    """
    return text if text.isascii() else _HALF.sub("\N{REPLACEMENT CHARACTER}", text)


class StopFinder:
    """Finds the first stop string in a growing text and holds back what may still become one.

    Of several stop strings the one that is complete first wins, of those complete at the same character the longest.
    Empty stop strings are ignored.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops: Final = tuple(sorted({stop for stop in stops if stop}, key=len, reverse=True))
        self._longest: Final = len(self._stops[0]) if self._stops else 0
        self._held = ""
        #: The stop string that was found; empty until then.
        self.found = ""

    def feed(self, text: str) -> str:
        """Take more text; return what is certain not to belong to a stop string. Not to be called after a find."""
        if not self._stops:
            return text
        pending = self._held + text
        end, stop = self._first_match(pending)
        if stop:
            self.found, self._held = stop, ""
            return pending[: end - len(stop)]
        cut = len(pending) - self._hold_back(pending)
        self._held = pending[cut:]
        return pending[:cut]

    def flush(self) -> str:
        """Return what was held back: nothing more comes, so it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, pending: str) -> tuple[int, str]:
        best_end, best = len(pending) + 1, ""
        for stop in self._stops:
            # A match must end in the new text: the held part alone was searched before.
            start = pending.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0 and start + len(stop) < best_end:
                best_end, best = start + len(stop), stop
        return best_end, best

    def _hold_back(self, pending: str) -> int:
        for length in range(min(self._longest - 1, len(pending)), 0, -1):
            tail = pending[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of one generation, fed with the bytes of its tokens.

    Bytes that are no UTF-8 become U+FFFD; an unfinished character waits for its rest.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder: Final = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops: Final = StopFinder(stops)

    @property
    def stopping_word(self) -> str:
        """The stop string that ended the text; empty when none did."""
        return self._stops.found

    def feed(self, piece: bytes) -> str:
        """Take one token's bytes; return the text that may be sent now. Not to be called after a stop string."""
        return self._stops.feed(self._decoder.decode(piece))

    def flush(self) -> str:
        """End the text: return what was held back for a stop string. An unfinished character is dropped."""
        return self._stops.flush()
