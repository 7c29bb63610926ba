"""JSON or calls, where both are objects: what begins as a call goes on as one.

A schema that allows any object allows calls too, with whatever arguments. The grammar of both alone would let them
pass, and whoever reads the answer would tell a call that its tool's schema forbids.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.call_form import Form, begins_as
from llamaherd.pool.child.constraint import Choice, Constraint
from llamaherd.pool.child.thinking import Tags
from llamaherd.pool.child.vocab import Vocab

__all__ = ["EitherConstraint"]


class EitherConstraint:
    """Implements :class:`~llamaherd.pool.child.constraint.Constraint`.

    Args:
        both: Holds JSON and calls, and reasoning before them.
        calls: Holds calls alone, and reasoning before them.
        forms: How calls begin.
        tags: Of the reasoning that may come first; ``opened``: the prompt has opened it.
    """

    #: See :class:`Constraint`.
    choice: Choice = "some"

    def __init__(
        self,
        both: Constraint,
        calls: Constraint,
        vocab: Vocab,
        *,
        forms: Sequence[Form],
        tags: Tags | None = None,
        opened: bool = False,
    ) -> None:
        self._both: Constraint = both
        #: None: the answer can be no calls any more.
        self._calls: Constraint | None = calls
        self._vocab: Final = vocab
        self._forms: Final = forms
        self._tags: Final = tags
        self._start: bytes = tags.start.encode() if tags is not None and not opened else b""
        self._end: Final = tags.end.encode() if tags is not None else b""
        self._thinking = opened and tags is not None
        #: What has come of the answer, or of its reasoning's end, and is not decided on; None: it is.
        self._text: bytes | None = b""

    @property
    def complete(self) -> bool:
        """See :class:`Constraint`."""
        return self._both.complete

    def due(self) -> int | None:
        """See :class:`Constraint`."""
        return None

    def allows(self, token: int) -> bool:
        """See :class:`Constraint`."""
        return self._both.allows(token) and (self._text is None or self._may(token))

    def allowed(self, tokens: Sequence[int], most: int) -> list[int]:
        """See :class:`Constraint`."""
        if self._text is None:
            return self._both.allowed(tokens, most)
        return list(islice(filter(self._may, self._both.allowed(tokens, len(tokens))), most))

    def candidates(self) -> npt.NDArray[np.int64]:
        """See :class:`Constraint`."""
        return self._both.candidates()

    def accept(self, token: int) -> None:
        """See :class:`Constraint`."""
        self._both.accept(token)
        if self._text is None or self._vocab.ends(token):
            return
        if self._calls is not None:
            if self._calls.allows(token):
                self._calls.accept(token)
            else:
                self._calls = None
        self._take(self._vocab.named_piece(token))

    def feed(self, data: bytes) -> bool:
        """See :class:`Constraint`."""
        if not self._both.feed(data):
            return False
        if self._text is None:
            return True
        if self._calls is not None and not self._calls.feed(data):
            self._calls = None
        return self._take(data)

    def copy(self) -> "EitherConstraint":
        """See :class:`Constraint`."""
        both = self._both.copy()
        calls = both if self._calls is None else self._calls.copy()
        other = EitherConstraint(both, calls, self._vocab, forms=self._forms, tags=self._tags)
        other._calls = None if self._calls is None else calls
        other._start, other._thinking, other._text = self._start, self._thinking, self._text
        return other

    def _may(self, token: int) -> bool:
        """Whether a token that :attr:`_both` allows leaves an answer that is what it begins as."""
        if self._vocab.ends(token) or (self._calls is not None and self._calls.allows(token)):
            return True
        return self._begins(*self._behind(self._vocab.named_piece(token))) is not True

    def _take(self, data: bytes) -> bool:
        """Take more text; whether it is what it begins as."""
        thinking, text = self._behind(data)
        if self._thinking and not thinking:
            self._start = b""
        found = self._begins(thinking, text)
        if found is None:
            self._thinking, self._text = thinking, text
            return True
        self._text = None
        calls, self._calls = self._calls, None
        if found:
            if calls is None:
                return False
            self._both = calls
        return True

    def _behind(self, data: bytes) -> tuple[bool, bytes]:
        """Return whether the reasoning goes on behind these bytes, and what counts of the text."""
        text, thinking = (self._text or b"") + data, self._thinking
        if not thinking and self._start and text.lstrip().startswith(self._start):
            text, thinking = text.lstrip()[len(self._start) :], True
        if not thinking:
            return False, text
        at = text.find(self._end)
        return (False, text[at + len(self._end) :]) if at >= 0 else (True, text[-len(self._end) :])

    def _begins(self, thinking: bool, text: bytes) -> bool | None:
        if thinking or (self._start and self._start.startswith(text.lstrip())):
            return None
        return begins_as(text.decode(errors="ignore"), self._forms)
