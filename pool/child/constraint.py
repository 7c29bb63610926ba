"""What may be generated: the interface of everything that restricts a sequence's tokens, and what it knows of them."""

from collections.abc import Sequence
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.vocab import Vocab

__all__ = ["Alphabet", "Choice", "Constraint", "ConstraintError", "Text", "decode"]

#: Which tokens may come next: just ``any``, which need not be asked about, only be told; ``some``; or ``one`` alone.
Choice: TypeAlias = Literal["any", "some", "one"]


class ConstraintError(Exception):
    """A sequence cannot go on under its constraint; the text is for its caller.

    Attributes:
        code: ``grammar_too_complex`` or ``grammar_dead_end``.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class Constraint(Protocol):
    """The state of one sequence under its grammar. Every method may raise ConstraintError."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""
        ...

    @property
    def choice(self) -> Choice:
        """Which tokens may come next; with ``one``, :meth:`due` knows which."""
        ...

    def due(self) -> int | None:
        """Return the token that must come next, whatever the samplers say of it; None where there is a choice."""
        ...

    def allows(self, token: int) -> bool:
        """Whether a token may come next. An end-of-generation token may where the text could end here."""
        ...

    def allowed(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return the tokens that may come next, in their order, at most so many."""
        ...

    def candidates(self) -> npt.NDArray[np.int64]:
        """Return ids that hold every token that may come next; others may be among them."""
        ...

    def accept(self, token: int) -> None:
        """Take a token that :meth:`allows` let pass."""
        ...

    def feed(self, data: bytes) -> bool:
        """Take a text as it stands, whatever its tokens. False if it does not fit: the state is lost then."""
        ...

    def copy(self) -> "Constraint":
        """Return another one in the same state."""
        ...


class Text:
    """A token's bytes as characters.

    Attributes:
        chars: Code points of the complete characters.
        value, missing: The bits of an incomplete last character, and how many bytes it still needs.
    """

    __slots__ = ("chars", "missing", "value")

    def __init__(self, chars: tuple[int, ...], value: int, missing: int) -> None:
        self.chars: Final = chars
        self.value: Final = value
        self.missing: Final = missing


#: Where not every byte may come second in a character, by the bytes that are missing and the bits of the first one:
#: neither in one that is spelled longer than it need be, nor in half of a surrogate pair, nor beyond the last one.
_SECOND: Final = {
    (2, 0x0): range(0xA0, 0xC0),
    (2, 0xD): range(0x80, 0xA0),
    (3, 0x0): range(0x90, 0xC0),
    (3, 0x4): range(0x80, 0x90),
}
_ANY_SECOND: Final = range(0x80, 0xC0)


def decode(data: bytes, value: int = 0, missing: int = 0) -> Text | None:
    """Return bytes as characters, after the beginning of one; None for what cannot be UTF-8."""
    if not missing and data.isascii():
        return Text(tuple(data), 0, 0)
    chars: list[int] = []
    for byte in data:
        if missing:
            if byte not in _SECOND.get((missing, value), _ANY_SECOND):
                return None
            value, missing = value << 6 | byte & 0x3F, missing - 1
            if not missing:
                chars.append(value)
        elif byte < 0x80:
            chars.append(byte)
        elif 0xC2 <= byte < 0xF5:
            missing = 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
            value = byte & (0x3F >> missing)
        else:
            return None
    return Text(tuple(chars), value if missing else 0, missing)


class Alphabet:
    """The tokens of a vocabulary as a grammar sees them. Filled as they are asked for."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab: Final = vocab
        self._texts: Final[dict[int, Text | None]] = {}
        self._first: npt.NDArray[np.int64] | None = None

    def text(self, token: int) -> Text | None:
        """Return a token's characters; None where it shows none: control tokens, bytes that begin no character."""
        try:
            return self._texts[token]
        except KeyError:
            piece = self.vocab.piece(token)
            text = self._texts[token] = decode(piece) if piece and 0 not in piece else None
            return text

    @property
    def first(self) -> npt.NDArray[np.int64]:
        """The first character of each token, -1 where it has none that is complete."""
        if self._first is None:
            texts = map(self.text, range(self.vocab.size))
            firsts = (text.chars[0] if text is not None and text.chars else -1 for text in texts)
            self._first = np.fromiter(firsts, np.int64, self.vocab.size)
        return self._first
