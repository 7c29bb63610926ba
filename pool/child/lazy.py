"""A constraint that sleeps until the text says a word: grammars of tool calls, for models that may also just talk."""

from collections.abc import Sequence
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.constraint import Choice, Constraint
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import GrammarTrigger

__all__ = ["LazyConstraint"]


class LazyConstraint:
    """Everything is allowed until a trigger's word is complete; from its first byte on, or behind it, a grammar holds.

    A token that completes a word and brings more with it must fit the grammar whole. Control tokens are looked at by
    their names. Implements :class:`~llamaherd.pool.child.constraint.Constraint`.
    """

    #: See :class:`Constraint`.
    choice: Choice = "some"

    def __init__(self, inner: Constraint, trigger: GrammarTrigger, vocab: Vocab) -> None:
        self._inner: Final = inner
        self._vocab: Final = vocab
        self._trigger: Final = trigger
        self._words: Final = tuple(word.encode() for word in trigger.words)
        self._leading: Final = tuple(word.encode() for word in trigger.leading)
        self._after: Final = tuple(word.encode() for word in trigger.after)
        self._keep: Final = max(map(len, (*self._words, *self._after)), default=1) - 1
        self._waiting = True
        self._tail = b""
        #: The whole text while it may yet begin with a leading word, then None.
        self._begin: bytes | None = b"" if self._leading else None

    @property
    def complete(self) -> bool:
        """See :class:`Constraint`."""
        return not self._waiting and self._inner.complete

    def due(self) -> int | None:
        """See :class:`Constraint`."""
        return None

    def allows(self, token: int) -> bool:
        """See :class:`Constraint`."""
        if not self._waiting:
            return self._inner.allows(token)
        if self._vocab.ends(token):
            return True
        begun = self._begun(self._vocab.named_piece(token))
        return begun is None or self._is_word(token) or self._inner.copy().feed(begun)

    def allowed(self, tokens: Sequence[int], most: int) -> list[int]:
        """See :class:`Constraint`."""
        if not self._waiting:
            return self._inner.allowed(tokens, most)
        return list(islice(filter(self.allows, tokens), most))

    def candidates(self) -> npt.NDArray[np.int64]:
        """See :class:`Constraint`."""
        return np.arange(self._vocab.size) if self._waiting else self._inner.candidates()

    def accept(self, token: int) -> None:
        """See :class:`Constraint`."""
        if not self._waiting:
            self._inner.accept(token)
        elif self._is_word(token):
            self._waiting = False
            self._inner.accept(token)
        elif not self._vocab.ends(token):
            self.feed(self._vocab.named_piece(token))

    def feed(self, data: bytes) -> bool:
        """See :class:`Constraint`."""
        if not self._waiting:
            return self._inner.feed(data)
        begun = self._begun(data)
        if begun is not None:
            self._waiting = False
            return self._inner.feed(begun)
        self._tail = (self._tail + data)[-self._keep :] if self._keep else b""
        if self._begin is not None:
            text = (self._begin + data).lstrip()
            self._begin = text if any(word.startswith(text) for word in self._leading) else None
        return True

    def copy(self) -> "LazyConstraint":
        """See :class:`Constraint`."""
        other = LazyConstraint(self._inner.copy(), self._trigger, self._vocab)
        other._waiting, other._tail, other._begin = self._waiting, self._tail, self._begin
        return other

    def _is_word(self, token: int) -> bool:
        """Whether a control token is a trigger's word and the grammar names it: its text need not be spelled then."""
        if self._vocab.piece(token) or self._vocab.ends(token):
            return False
        return self._vocab.named_piece(token) in self._words and self._inner.allows(token)

    def _begun(self, data: bytes) -> bytes | None:
        """Return the text from a trigger's word on, if these bytes complete one."""
        if self._begin is not None:
            text = (self._begin + data).lstrip()
            if text.startswith(self._leading):
                return text
        text = self._tail + data
        starts = [start for start in map(text.find, self._words) if start >= 0]
        if starts:
            return text[min(starts) :]
        ends = [text.find(word) + len(word) for word in self._after if word in text]
        return text[min(ends) :].lstrip() if ends else None
