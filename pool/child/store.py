"""States of sequences that had to leave the KV cache, in bounded RAM, to come back without being computed again.

Two kinds of them: those of requests that were interrupted and go on later, which are *held* until then, and those of
finished sequences, which are *kept* for requests that begin alike, and go first when the room ends, the least recently
used before the others.
"""

from array import array
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.adapters import AdapterSet
from llamaherd.pool.child.prefix import Rules, common_length
from llamaherd.pool.machine import available_memory

__all__ = ["State", "Store"]

#: Of the memory that is free at the moment, a new state takes no more than one part in so many.
_SHARE: Final = 4


class State:
    """What a sequence had in the cache: its tokens, the bytes that llama.cpp makes of them, and the adapters that they
    were computed with.

    Attributes:
        first: The lowest position that is in it, where a window makes that matter; None where nobody knows.
    """

    def __init__(
        self,
        tokens: "array[int]",
        data: npt.NDArray[np.uint8],
        adapters: AdapterSet = (),
        *,
        first: int | None = None,
    ) -> None:
        self.tokens: Final = tokens
        self.data: Final = data
        self.adapters: Final = adapters
        self.first: Final = first

    def __repr__(self) -> str:
        return f"<State of {self.computed} tokens, {self.size} bytes>"

    @property
    def computed(self) -> int:
        """Its length in tokens."""
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return self.data.nbytes + self.tokens.itemsize * len(self.tokens)


class Store:
    """See the module's text.

    Args:
        limit: Most bytes of all states together; None sets no limit, 0 takes none.
        rules: Which prefixes the model can reuse.
        free: Returns the bytes that the machine has left; None where nobody knows.
    """

    def __init__(self, limit: int | None, rules: Rules, free: Callable[[], int | None] = available_memory) -> None:
        self._limit: Final = limit
        self._rules: Final = rules
        self._free: Final = free
        #: The next to go comes first.
        self._kept: Final[list[State]] = []
        self._held: Final[set[State]] = set()
        self.used = 0

    def __repr__(self) -> str:
        return f"<Store kept={len(self._kept)} held={len(self._held)} used={self.used} of {self._limit}>"

    @property
    def on(self) -> bool:
        """Whether it takes anything."""
        return self._limit != 0

    @property
    def kept(self) -> int:
        """How many states of finished sequences there are."""
        return len(self._kept)

    def admit(self, size: int) -> bool:
        """Make room for a state of so many bytes at the cost of kept ones; False when it cannot be had."""
        if self._limit is not None:
            if size > self._limit - sum(state.size for state in self._held):
                return False
            while self.used + size > self._limit:
                self._forget(self._kept.pop(0))
        left = self._free()
        return left is None or size * _SHARE <= left

    def hold(self, state: State) -> None:
        """Take the state of an interrupted request, for which there is room."""
        self._held.add(state)
        self.used += state.size

    def release(self, state: State, *, keep: bool = False) -> None:
        """Let go of a held state, or keep it as one of a finished sequence."""
        self._held.remove(state)
        self._forget(state)
        if keep:
            self.keep(state)

    def keep(self, state: State) -> None:
        """Take the state of a finished sequence, for which there is room, unless another one says as much."""
        if any(self._covers(other, state) for other in self._kept):
            return
        for other in [other for other in self._kept if self._covers(state, other)]:
            self.drop(other)
        self._kept.append(state)
        self.used += state.size

    def covers(self, tokens: "array[int]", adapters: AdapterSet = ()) -> bool:
        """Whether a finished sequence of these tokens would say nothing new."""
        return self.covering(tokens, adapters) is not None

    def covering(self, tokens: "array[int]", adapters: AdapterSet = ()) -> State | None:
        """Return a kept state that begins with all of these tokens; None if there is none."""
        return next((other for other in self._kept if self._includes(other, tokens, adapters)), None)

    def drop(self, state: State) -> None:
        """Forget a kept state, if it is still there."""
        if state in self._kept:
            self._kept.remove(state)
            self._forget(state)

    def touch(self, state: State) -> None:
        """A kept state was of use: it goes last."""
        if state in self._kept:
            self._kept.remove(state)
            self._kept.append(state)

    def find(self, tokens: "array[int]", adapters: AdapterSet = ()) -> tuple[State, int] | None:
        """Return the kept state with the longest usable beginning of a prompt, and that length.

        At least one token is left to compute. Where the model has no earlier version of a state to go back to, or the
        state only what its window saw, the prompt must contain all of it.
        """
        best: tuple[State, int] | None = None
        for state in reversed(self._kept):
            if state.adapters != adapters:
                continue
            length = min(common_length(tokens, state.tokens), len(tokens) - 1)
            if not self._rules.serves(state.computed, state.first, length):
                continue
            if length > (best[1] if best is not None else 0):
                best = state, length
        return best

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._held.clear()
        self.used = 0

    def _forget(self, state: State) -> None:
        self.used -= state.size

    def _covers(self, one: State, other: State) -> bool:
        return self._includes(one, other.tokens, other.adapters)

    def _includes(self, one: State, tokens: "array[int]", adapters: AdapterSet) -> bool:
        if one.adapters != adapters:
            return False
        if self._rules.exact and one.computed != len(tokens):
            return False
        return len(tokens) <= one.computed and common_length(one.tokens, tokens) == len(tokens)
