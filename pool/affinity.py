"""Which replica of a model holds the beginning of a prompt. Pure, cheap and bounded.

A prompt is known by the hashes of its beginnings, at lengths that double: so a conversation that went on is recognised
by the turns that it had before, and a shared system prompt by itself. That costs a few hashes per request and a bounded
table per replica; it is a guess, since the worker may have dropped what it held, and a wrong one costs nothing but the
prefix.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from llamaherd.transport.messages import Generate, PoolMessage

__all__ = ["Prefixes", "prefix_keys"]

#: Shortest beginning that is worth a match, in characters of text and in tokens; further ones are twice as long each.
SHORTEST_TEXT: Final = 128
SHORTEST_TOKENS: Final = 32
#: Most beginnings of one prompt: the last is 2**15 times the first.
MOST_KEYS: Final = 16
#: Most beginnings that are remembered per replica; the oldest go first.
MOST_REMEMBERED: Final = 1024


def prefix_keys(command: PoolMessage | None) -> tuple[int, ...]:
    """Return the keys of a request's beginnings, shortest first; none for what has no prompt or a short one."""
    if not isinstance(command, Generate):
        return ()
    if command.messages is not None:
        # Without the last bracket, a conversation that goes on begins as it did before.
        return _keys(msgspec.json.encode(command.messages)[:-1], SHORTEST_TEXT)
    prompt = command.prompt
    if prompt is None:
        return ()
    return _keys(prompt, SHORTEST_TEXT if isinstance(prompt, str) else SHORTEST_TOKENS)


def _keys(prompt: bytes | str | Sequence[int | str], shortest: int) -> tuple[int, ...]:
    lengths = [shortest << doubling for doubling in range(MOST_KEYS)]
    return tuple(hash(prompt[:length]) for length in lengths if length <= len(prompt))


class Prefixes:
    """The beginnings of the prompts that went to one replica."""

    def __init__(self) -> None:
        self._keys: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def note(self, keys: Sequence[int]) -> None:
        """A prompt with these keys goes to the replica."""
        for key in keys:
            self._keys.pop(key, None)
            self._keys[key] = None
        while len(self._keys) > MOST_REMEMBERED:
            del self._keys[next(iter(self._keys))]

    def match(self, keys: Sequence[int]) -> int:
        """Return how many of the keys the replica has seen, counted from the longest one that it has."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._keys), 0)

    def clear(self) -> None:
        """The replica has lost its cache."""
        self._keys.clear()
