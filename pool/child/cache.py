"""The cache's sequence ids, and the finished sequences that stay there for requests that begin alike."""

from array import array
from collections.abc import Iterator
from typing import Final

from llamaherd.pool.child.adapters import AdapterSet
from llamaherd.pool.child.cells import Cells
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.prefix import Donor, Rules, common_length

__all__ = ["Cache", "Kept"]


class Kept:
    """A finished sequence: its id, exactly the tokens that are computed, and what they were computed with."""

    def __init__(self, slot: int, tokens: "array[int]", adapters: AdapterSet = ()) -> None:
        self.slot: Final = slot
        self.tokens: Final = tokens
        self.adapters: Final = adapters

    def __repr__(self) -> str:
        return f"<Kept {self.slot} {len(self.tokens)} tokens>"

    @property
    def computed(self) -> int:
        """Its length."""
        return len(self.tokens)


class Cache:
    """Hands out the sequence ids of a context. Ids that nobody runs may keep a finished sequence, until one is needed
    or the cells run out; the one that was of no use for longest goes first.
    """

    def __init__(self, context: Context, rules: Rules) -> None:
        self._context: Final = context
        self._rules: Final = rules
        self._free: Final = list(range(context.n_sequences - 1, -1, -1))
        #: The next to go comes first.
        self._kept: Final[list[Kept]] = []
        self.cells: Final = Cells()

    def __repr__(self) -> str:
        return f"<Cache free={len(self._free)} kept={self._kept} {self.cells}>"

    @property
    def kept(self) -> Iterator[Kept]:
        """The finished sequences, latest use first."""
        return reversed(self._kept)

    @property
    def room(self) -> int:
        """Cells that nobody holds."""
        return self._context.n_ctx - self.cells.used

    def acquire(self, donor: Donor | None = None) -> int:
        """Return the id of an empty sequence, rather not at the cost of ``donor``. Callers take no more than the
        context has slots.
        """
        if not self._free:
            self._touch(donor)
            self.evict()
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Take an id back, and drop what its sequence holds."""
        self._context.forget(slot)
        self.cells.drop(slot)
        self._free.append(slot)

    def keep(self, slot: int, tokens: "array[int]", adapters: AdapterSet = ()) -> None:
        """Take an id back, but keep its sequence, whose computed tokens are ``tokens``, if that may ever be of use."""
        new = Kept(slot, tokens, adapters)
        if len(tokens) == 0 or any(self._covers(other, new) for other in self._kept):
            self.release(slot)
            return
        for other in [other for other in self._kept if self._covers(new, other)]:
            self._kept.remove(other)
            self.release(other.slot)
        self._kept.append(new)

    def evict(self) -> bool:
        """Drop the finished sequence that was of no use for longest; False when there is none."""
        if not self._kept:
            return False
        self.release(self._kept.pop(0).slot)
        return True

    def share(self, donor: Donor, slot: int, length: int) -> None:
        """Let an empty sequence begin with the first ``length`` tokens of a donor."""
        self._context.share(donor.slot, slot, length)
        self.cells.share(donor.slot, slot, length)
        self._touch(donor)

    def truncate(self, slot: int, length: int) -> bool:
        """Keep the first ``length`` tokens of a sequence; False when this model cannot, and nothing changed."""
        if not self._context.truncate(slot, length):
            return False
        self.cells.truncate(slot, length)
        return True

    def forget(self, slot: int) -> None:
        """Drop what a sequence holds, but not its id."""
        self._context.forget(slot)
        self.cells.drop(slot)

    def _touch(self, donor: Donor | None) -> None:
        if isinstance(donor, Kept):
            self._kept.remove(donor)
            self._kept.append(donor)

    def _covers(self, one: Kept, other: Kept) -> bool:
        """Whether whatever could be taken from ``other`` can be taken from ``one`` just as well."""
        length = other.computed
        if one.adapters != other.adapters:
            return False
        if self._rules.exact and length != one.computed:
            return False
        return length <= one.computed and common_length(one.tokens, other.tokens) == length
