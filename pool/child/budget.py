"""A limit to thinking: after so many tokens of reasoning, the tokens that end it are the only ones allowed.

The rules are the reference's (its ``common/reasoning-budget.h``): the count begins behind the tag that opens reasoning,
be it the prompt's or the model's; a limit of 0 ends it at once; a character is not cut in two; a model that opens
another reasoning gets another budget. There tags are sequences of tokens; here they are texts, however a model spells
them, and a tag that is no control token counts at the head of an answer alone, since elsewhere it is a quotation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.constraint import Choice, Constraint, decode
from llamaherd.pool.child.vocab import Vocab

__all__ = ["Budget", "BudgetedThoughts"]

_Stage = Literal["head", "thinking", "character", "ending", "answer"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much one answer may think, and how that begins and ends.

    Attributes:
        tokens: Most tokens of reasoning, 0 or more.
        start, end: The tags around it.
        closing: What is said for the model when they are used up; it ends with the reasoning's end.
        opened: The prompt has opened the reasoning.
        anywhere: The opening tag counts wherever it comes; it is one control token then.
    """

    tokens: int
    start: str
    end: str
    closing: str
    opened: bool = False
    anywhere: bool = False


class BudgetedThoughts:
    """One sequence under a budget, and under another constraint if it has one. Implements
    :class:`~llamaherd.pool.child.constraint.Constraint`.

    Where the other constraint does not let the reasoning be ended, it goes on.
    """

    def __init__(self, budget: Budget, inner: Constraint | None, vocab: Vocab) -> None:
        self._budget: Final = budget
        self._inner: Final = inner
        self._vocab: Final = vocab
        self._start: Final = budget.start.encode()
        self._end: Final = budget.end.encode()
        self._closing: Final = vocab.tokenize(budget.closing, add_special=False, parse_special=True)
        self._stage: _Stage = "head"
        self._tail = b""
        self._left = budget.tokens
        #: The bits of a character that is not complete, and how many bytes it needs.
        self._character = (0, 0)
        self._said = 0
        if budget.opened:
            self._open(b"")

    @property
    def complete(self) -> bool:
        """See :class:`Constraint`."""
        return self._stage != "ending" and self._inner is not None and self._inner.complete

    @property
    def choice(self) -> Choice:
        """See :class:`Constraint`."""
        if self._stage == "ending":
            return "one"
        return "any" if self._inner is None else self._inner.choice

    def due(self) -> int | None:
        """See :class:`Constraint`."""
        if self._stage != "ending":
            return None
        token = self._closing[self._said]
        if self._inner is not None and not self._inner.allows(token):
            self._stage = "answer"
            return None
        return token

    def allows(self, token: int) -> bool:
        """See :class:`Constraint`."""
        due = self.due()
        if due is not None:
            return token == due
        return self._inner is None or self._inner.allows(token)

    def allowed(self, tokens: Sequence[int], most: int) -> list[int]:
        """See :class:`Constraint`."""
        due = self.due()
        if due is not None:
            return [due] if due in tokens else []
        return list(tokens[:most]) if self._inner is None else self._inner.allowed(tokens, most)

    def candidates(self) -> npt.NDArray[np.int64]:
        """See :class:`Constraint`."""
        due = self.due()
        if due is not None:
            return np.array([due], np.int64)
        return np.arange(self._vocab.size) if self._inner is None else self._inner.candidates()

    def accept(self, token: int) -> None:
        """See :class:`Constraint`."""
        if self._inner is not None:
            self._inner.accept(token)
        if self._stage == "ending":
            self._said += 1
            if self._said == len(self._closing):
                self._stage = "answer"
        elif not self._vocab.ends(token):
            self._read(self._vocab.named_piece(token))

    def feed(self, data: bytes) -> bool:
        """See :class:`Constraint`. Texts are no tokens, and count as one."""
        if self._inner is not None and not self._inner.feed(data):
            return False
        self._read(data)
        return True

    def copy(self) -> "BudgetedThoughts":
        """See :class:`Constraint`."""
        inner = self._inner.copy() if self._inner is not None else None
        other = BudgetedThoughts(self._budget, inner, self._vocab)
        other._stage, other._tail, other._left = self._stage, self._tail, self._left
        other._character, other._said = self._character, self._said
        return other

    def _read(self, piece: bytes) -> None:
        if self._stage in ("thinking", "character"):
            self._think(piece)
        elif self._stage == "head":
            self._tail += piece
            text = self._tail.lstrip()
            if text.startswith(self._start):
                self._open(text[len(self._start) :])
            elif not self._start.startswith(text):
                self._stage, self._tail = "answer", b""
        elif self._budget.anywhere and piece == self._start:
            self._open(b"")

    def _open(self, rest: bytes) -> None:
        """Begin to count. ``rest`` came with the tag, in one token."""
        self._left, self._said, self._character = self._budget.tokens, 0, (0, 0)
        self._stage, self._tail = "thinking", rest
        if self._left == 0:
            self._finish()

    def _think(self, piece: bytes) -> None:
        text = self._tail + piece
        if self._end in text:
            self._stage, self._tail = "answer", b""
            return
        self._tail = text[-len(self._end) :]
        read = decode(piece, *self._character)
        self._character = (read.value, read.missing) if read is not None else (0, 0)
        self._left -= 1
        if self._left <= 0:
            self._finish()

    def _finish(self) -> None:
        """End the reasoning, behind the character that is being spelled."""
        self._stage = "character" if self._character[1] else "ending"
