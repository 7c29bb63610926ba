"""What ends an answer by its lines: llama-server's two limits for editors that complete code."""

from typing import Final

__all__ = ["LineLimits"]

_BLANK: Final = " \t"


class LineLimits:
    """The lines of one answer.

    Args:
        indent: Every line after the first must begin with at least so many blanks; the first that does not ends the
            answer and is no part of it. An empty line is such a line, as in the reference. 0 is off.
        seconds: From this time on a line break ends the answer; 0 or less is off.
    """

    def __init__(self, indent: int, seconds: float) -> None:
        self._least: Final = indent
        self._seconds: Final = seconds
        #: Blanks at the beginning of the current line; None where other text has come, and in the first line.
        self._blanks: int | None = None

    def feed(self, text: str, elapsed: float) -> tuple[str, bool]:
        """Take more text; return what of it belongs to the answer, and whether that ends with it.

        Args:
            elapsed: Seconds since the first token.
        """
        kept = self._indented(text) if self._least > 0 else text
        late = self._seconds > 0 and elapsed > self._seconds and "\n" in text
        return kept, late or len(kept) < len(text)

    def _indented(self, text: str) -> str:
        for index, char in enumerate(text):
            if self._blanks is not None:
                if char in _BLANK:
                    self._blanks += 1
                    continue
                if self._blanks < self._least:
                    return text[:index]
            self._blanks = 0 if char == "\n" else None
        return text
