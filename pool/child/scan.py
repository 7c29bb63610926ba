"""Text that arrives in pieces, and the readers that take it apart without waiting for all of it.

A reader is a generator: it yields where it needs more text, and returns what it found. What it reads is only *tried*
until :meth:`Scan.settle` says that it is accounted for; :meth:`Scan.rewind` gives the rest back, to be read as
something else. So a reader may give up anywhere, and no character is lost. What readers find depends on the text alone
and not on how it was cut.
"""

import json
import re
from collections.abc import Callable, Generator
from typing import Final, TypeAlias, TypeVar

from llamaherd.pool.child.text import sendable

__all__ = ["MOST_HELD", "Emit", "Reading", "Scan", "overlap"]

T = TypeVar("T")

#: A reader: yields for more text, returns its finding.
Reading: TypeAlias = Generator[None, None, T]
#: Takes a part of what is being read.
Emit: TypeAlias = Callable[[str], None]

_BLANK: Final = re.compile(r"\s*")
_STRUCTURE: Final = re.compile(r'["{}\[\]]')
_QUOTED: Final = re.compile(r'["\\]')
_SCALAR_END: Final = re.compile(r"[\s,\]}]")
_OPENING: Final = "{["
#: Longest text that is held before anything is known of it; a name or a key is never longer.
MOST_HELD: Final = 100_000


class Scan:
    """The text of one answer, as far as it has come and is not accounted for."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._settled = 0
        #: Whether nothing more comes.
        self.ended = False
        #: Whether a reader wanted more text than there is; whoever cares clears it before.
        self.short = False

    def feed(self, text: str) -> None:
        """Add text; what is settled is forgotten."""
        self._text = self._text[self._settled :] + text
        self._at -= self._settled
        self._settled = 0

    @property
    def rest(self) -> str:
        """What has come and is not read yet."""
        return self._text[self._at :] if self._at else self._text

    @property
    def tried(self) -> str:
        """What was read since the last settlement."""
        return self._text[self._settled : self._at]

    def skip(self, count: int) -> None:
        """Read so many characters of :attr:`rest`."""
        self._at += count

    def settle(self) -> None:
        """Account for what was read."""
        self._settled = self._at

    def rewind(self) -> None:
        """Give back what was read since the last settlement."""
        self._at = self._settled

    # --- readers ---

    def has(self, count: int = 1) -> Reading[bool]:
        """Wait for so many characters; False if the text ends before them."""
        while len(self._text) - self._at < count:
            if self.ended:
                self.short = True
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """Return the next character without reading it; empty at the end."""
        return self._text[self._at] if (yield from self.has()) else ""

    def literal(self, wanted: str) -> Reading[bool]:
        """Read ``wanted`` if it comes next."""
        while not self._text.startswith(wanted, self._at):
            have = self._text[self._at : self._at + len(wanted)]
            if self.ended or not wanted.startswith(have):
                self.short = self.short or wanted.startswith(have)
                return False
            yield
        self._at += len(wanted)
        return True

    def torn(self, wanted: str) -> bool:
        """Read the rest if the text has ended within ``wanted``; whether it has."""
        rest = self.rest
        if not self.ended or not rest or not wanted.startswith(rest):
            return False
        self._at = len(self._text)
        return True

    def blank(self) -> Reading[None]:
        """Read white space."""
        while True:
            match = _BLANK.match(self._text, self._at)
            self._at = match.end() if match is not None else self._at
            if self.ended or self._at < len(self._text):
                return
            yield

    def until(self, end: str, emit: Emit | None = None, *, torn: bool = False) -> Reading[str | None]:
        """Read up to ``end`` and past it; return what was before it, or None if the text ends first.

        With ``emit`` the text is told and settled as it comes instead, and the return value is empty. With ``torn`` the
        beginning of ``end`` that the text ends with, if it does, is not told.
        """
        told = self._at - self._settled
        while True:
            found = self._text.find(end, self._at)
            hold = 0 if self.ended and not torn else overlap(self._text, end, self._at)
            self._at = found if found >= 0 else len(self._text) - hold
            if emit is not None:
                told = self._tell(emit, told, settle=True)
            if found >= 0:
                before = "" if emit is not None else self._text[self._settled + told : found]
                self._at += len(end)
                if emit is not None:
                    self.settle()
                return before
            self.short = self.short or self.ended
            if self.ended and hold and emit is not None:
                self._at = len(self._text)
                self.settle()
            if self.ended or self._at - self._settled > MOST_HELD:
                return None
            yield

    def word(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Read as many characters as match ``pattern``, a character class, and return them."""
        start = self._at - self._settled
        while True:
            while self._at < len(self._text) and pattern.match(self._text[self._at]):
                self._at += 1
            self.short = self.short or (self.ended and self._at == len(self._text))
            if self.ended or self._at < len(self._text) or self._at - self._settled > MOST_HELD:
                return self._text[self._settled + start : self._at]
            yield

    def string(self) -> Reading[str | None]:
        """Read a JSON string and return what it says; None if there is none, or if it does not end."""
        raw: list[str] = []
        if (yield from self.peek()) != '"' or not (yield from self.value(raw.append, settle=False)):
            return None
        try:
            text = json.loads("".join(raw), strict=False)
        except ValueError:
            return None
        return sendable(text) if isinstance(text, str) else None

    def whole(self) -> Reading[str | None]:
        """Read a JSON value and return it as it is written; None if it does not end."""
        raw: list[str] = []
        return "".join(raw) if (yield from self.value(raw.append, settle=False)) else None

    def value(self, emit: Emit, *, settle: bool = True) -> Reading[bool]:
        """Read a JSON value and tell it as it comes; whether it ends.

        Brackets and quotes alone are looked at: what a model writes between them is its own affair.
        """
        first = yield from self.peek()
        if not first:
            return False
        if first not in _OPENING and first != '"':
            return (yield from self._scalar(emit, settle))
        depth, quoted = 0, False
        told = self._at - self._settled
        while True:
            match = (_QUOTED if quoted else _STRUCTURE).search(self._text, self._at)
            if match is None or (match.group() == "\\" and match.end() == len(self._text)):
                # A backslash at the end waits for what it escapes.
                self._at = len(self._text) if match is None else match.start()
                told = self._tell(emit, told, settle)
                self.short = self.short or self.ended
                if self.ended or self._at - self._settled > MOST_HELD:
                    if match is not None:
                        emit(self.rest)
                        self._at = len(self._text)
                    return False
                yield
                continue
            mark, self._at = match.group(), match.end()
            if quoted:
                if mark == "\\":
                    self._at += 1
                else:
                    quoted = False
            elif mark == '"':
                quoted = True
            else:
                depth += 1 if mark in _OPENING else -1
            if not quoted and depth <= 0:
                self._tell(emit, told, settle)
                return True

    def _scalar(self, emit: Emit, settle: bool) -> Reading[bool]:
        told = self._at - self._settled
        while True:
            match = _SCALAR_END.search(self._text, self._at)
            self._at = match.start() if match is not None else len(self._text)
            told = self._tell(emit, told, settle)
            if match is not None:
                return True
            self.short = self.short or self.ended
            if self.ended or self._at - self._settled > MOST_HELD:
                return False
            yield

    def _tell(self, emit: Emit, told: int, settle: bool) -> int:
        """Tell what was read since ``told``, counted from the last settlement; return the new count."""
        text = self._text[self._settled + told : self._at]
        if text:
            emit(text)
        if settle:
            self.settle()
        return self._at - self._settled


def overlap(text: str, end: str, at: int) -> int:
    """Return how many characters at the end of ``text``, from ``at`` on, may be the beginning of ``end``."""
    for length in range(min(len(end) - 1, len(text) - at), 0, -1):
        if text.endswith(end[:length]):
            return length
    return 0
