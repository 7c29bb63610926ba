"""The slots of a model: the numbered places where its requests run, as callers know them.

A slot is not a sequence id of the cache: a request keeps its slot's number for good, while the cache may move what a
finished one has left. Bookkeeping only; the batcher says what happens.
"""

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from llamaherd.pool.child.cache import Kept
from llamaherd.pool.child.prefix import common_length
from llamaherd.pool.child.sequence import Sequence
from llamaherd.transport.messages import SlotState

__all__ = ["Slot", "Slots"]


class Slot:
    """One slot.

    Attributes:
        sequence: What runs there; None when it is idle.
        kept: What the last request there left in the cache; it may have gone since.
    """

    def __init__(self, number: int) -> None:
        self.id: Final = number
        self.sequence: Sequence | None = None
        self.kept: Kept | None = None
        self._last: SlotState | None = None

    def __repr__(self) -> str:
        return f"<Slot {self.id} {self.sequence or 'idle'}>"

    def take(self, sequence: Sequence) -> None:
        """Let a request run here."""
        self.sequence, self.kept = sequence, None
        sequence.lane = self.id

    def leave(self, n_ctx: int, kept: Kept | None) -> None:
        """The request has ended or lost its place; ``kept`` is what it leaves."""
        if self.sequence is not None:
            self._last = self.sequence.told(n_ctx, busy=False)
        self.sequence, self.kept = None, kept

    def told(self, n_ctx: int, held: int) -> SlotState:
        """Return what there is to tell; ``held`` are the tokens that an idle slot has in the cache."""
        if self.sequence is not None:
            return self.sequence.told(n_ctx, busy=True)
        last = self._last
        if last is None:
            return SlotState(id=self.id, n_ctx=n_ctx, n_tokens=held)
        return last if last.n_tokens == held else replace(last, n_tokens=held)


class Slots:
    """All slots of a model."""

    def __init__(self, count: int) -> None:
        self._slots: Final = tuple(Slot(number) for number in range(count))
        #: The longest idle first.
        self._idle: Final = list(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, number: int) -> Slot:
        return self._slots[number]

    def can_take(self, sequence: Sequence) -> bool:
        """Whether a request can have a slot: the one that it wants, or any."""
        wanted = sequence.request.slot
        return bool(self._idle) if wanted < 0 else self._slots[wanted].sequence is None

    def take(self, sequence: Sequence, donor: object) -> None:
        """Give a request a slot: the one that it wants, else the one that left ``donor``, else of those whose last
        request it goes on with, which may lie in RAM, the one that it has most in common with, else the longest idle.
        """
        wanted = sequence.request.slot
        if wanted >= 0:
            slot = self._slots[wanted]
        elif (left := next((one for one in self._idle if donor is not None and one.kept is donor), None)) is not None:
            slot = left
        else:
            slot = max(self._idle, key=lambda one: _continued(sequence, one.kept))  # of equals the longest idle
        self._idle.remove(slot)
        slot.take(sequence)

    def leave(self, sequence: Sequence, n_ctx: int, kept: Kept | None = None) -> None:
        """A request has ended or lost its place; ``kept`` is what it leaves in the cache."""
        slot = self._slots[sequence.lane]
        slot.leave(n_ctx, kept)
        sequence.lane = -1
        self._idle.append(slot)


def _continued(sequence: Sequence, kept: Kept | None) -> int:
    """Return how much of what a slot has left a request begins with; 0 where it is not most of it."""
    if kept is None or kept.adapters != sequence.adapters:
        return 0
    common = common_length(sequence.tokens, kept.tokens)
    return common if common * 2 > kept.computed else 0
