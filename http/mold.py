"""Events that differ in one text alone: what is around it is encoded once.

A stream sends one event per token, and nearly all of it is the same every time. With hundreds of streams the time that
the server spends on a token is the workers' loss, so it is not spent on that.
"""

import secrets
from collections.abc import Callable
from typing import Final

import msgspec

__all__ = ["Mold"]

#: Stands for the text while the rest is encoded. It is drawn anew by each process, so that no name can hold it.
_MARK: Final = secrets.token_hex(16)
_encode: Final = msgspec.json.Encoder().encode


class Mold:
    """An event with a gap for a text.

    Args:
        make: Returns the event for a text, which it holds once as a JSON string.
    """

    __slots__ = ("_head", "_tail")

    def __init__(self, make: Callable[[str], bytes]) -> None:
        self._head, self._tail = make(_MARK).split(_encode(_MARK))

    def fill(self, text: str) -> bytes:
        """Return the event for a text."""
        return self._head + _encode(text) + self._tail
