"""The cache's sequence ids, the finished sequences that stay there for requests that begin alike, and what becomes of
those that must leave.
"""

from array import array
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Final

from llamaherd.pool.child.adapters import AdapterSet
from llamaherd.pool.child.cells import Cells
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.prefix import Donor, Rules, common_length
from llamaherd.pool.child.refusal import refusal
from llamaherd.pool.child.store import State, Store

__all__ = ["Cache", "Kept", "StateRefused"]

#: Fewest tokens whose state is worth a copy.
_WORTH_STORING: Final = 32
#: On a device: cells that finished sequences may take before the older ones go to RAM.
_IDLE_CELLS: Final = 2048
#: How few cells of its own make a finished sequence not worth a copy, and the seconds that the copies may take which
#: everyone waits for.
_FEW_OF_ITS_OWN: Final = 64
_QUICK_COPY: Final = 0.1
#: What a byte of state takes to be copied, in seconds, until it was measured; the weight of a measurement; and how
#: many times as much as was known one may say, since a copy that the machine interrupted tells nothing.
_FIRST_COPY: Final = 1e-9
_WEIGHT: Final = 0.5
_MOST_RISE: Final = 2.0


class StateRefused(Exception):
    """A state cannot be copied or taken in; the text is the reason.

    Attributes:
        retry: Whether it may be possible later.
    """

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry: Final = retry


class Kept:
    """A finished sequence: its id, exactly the tokens that are computed, and what they were computed with. The id is -1
    for what has none of its own, being the beginning of another one.
    """

    def __init__(self, slot: int, tokens: "array[int]", adapters: AdapterSet = ()) -> None:
        self.slot = slot
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
    or the cells run out; the one that was of no use for longest goes first, and its state into the store.
    """

    def __init__(self, context: Context, rules: Rules, store: Store) -> None:
        self._context: Final = context
        self._rules: Final = rules
        self.store: Final = store
        self._seconds_per_byte = _FIRST_COPY
        self._bytes_per_token = 0.0
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
        return self._context.n_cells - self.cells.used

    def acquire(self, donor: Donor | None = None) -> int:
        """Return the id of an empty sequence, rather not at the cost of ``donor``. Callers take no more than the
        context has slots.
        """
        if not self._free:
            self._touch(donor)
            self.evict()
        # llama.cpp computes neighbours together where each has its own part of the cache.
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def take_over(self, donor: Donor | None, length: int) -> bool:
        """Give a finished sequence, cut down to ``length`` tokens, to a request that goes on with it; False, and
        nothing changed, where it is better shared or copied.

        Callers run the sequence under the donor's id.
        """
        if not isinstance(donor, Kept) or donor not in self._kept:
            return False
        lost = donor.computed - length
        last = not self._free and len(self._kept) == 1
        if not last and (self._context.unified or lost > _FEW_OF_ITS_OWN):
            return False
        if lost > _FEW_OF_ITS_OWN and self.store.on:
            self._put_away(donor)
        if lost and not self.truncate(donor.slot, length):
            return False
        self._kept.remove(donor)
        return True

    def release(self, slot: int) -> None:
        """Take an id back, and drop what its sequence holds."""
        self._context.forget(slot)
        self._context.fold(slot, ())
        self.cells.drop(slot)
        self._free.append(slot)

    def keep(self, slot: int, tokens: "array[int]", adapters: AdapterSet = ()) -> Kept | None:
        """Take an id back, but keep its sequence, whose computed tokens are ``tokens``, if that may ever be of use.

        Return what :meth:`locate` finds it by, None for no tokens. Of two that say the same, one stays.
        """
        if len(tokens) == 0:  # it would be the beginning of anything
            self.release(slot)
            return None
        new = Kept(slot, tokens, adapters)
        known = next((other for other in self._kept if self._covers(other, new)), None)
        if known is not None:
            self.release(slot)
            return Kept(-1, tokens, adapters) if known.computed > new.computed else known
        for other in [other for other in self._kept if self._covers(new, other)]:
            self._kept.remove(other)
            self.release(other.slot)
        self._kept.append(new)
        return new

    def locate(self, kept: Kept) -> Kept | State | None:
        """Return where a finished sequence is now: in the cache, perhaps as the beginning of another one, in RAM, or
        nowhere any more.
        """
        if kept in self._kept:
            return kept
        covering = next((one for one in self._kept if self._covers(one, kept)), None)
        return covering or self.store.covering(kept.tokens, kept.adapters)

    def evict(self) -> bool:
        """Drop the finished sequence that was of no use for longest; False when there is none."""
        if not self._kept:
            return False
        self._evict(self._kept.pop(0))
        return True

    def drop(self, one: Kept) -> None:
        """Forget a finished sequence for good."""
        self._kept.remove(one)
        self.release(one.slot)

    def settle(self, running: Iterable[int], rows: int, newest: int) -> None:
        """Take finished sequences out of the cache whose cells will cost more there than their way to RAM and back,
        since llama.cpp goes over all cells in use for every token that anyone computes. What RAM would not take, or
        not quickly, stays.

        Args:
            running: The sequences that are computed.
            rows: Tokens that these, and the requests that wait, are going to compute.
            newest: How many stay on a device, where the cost is not known.
        """
        if not self.store.on or not self._context.unified or self._rules.exact:
            return
        running, seconds = list(running), _QUICK_COPY
        leaving = self._dear(running, rows) if self._context.cell_seconds else self._crowding(running, newest)
        for one in leaving:
            few = self.cells.own(one.slot) < min(_FEW_OF_ITS_OWN, one.computed)  # others keep the rest
            copying = 0.0 if few else self._copying(one)
            if copying <= seconds and (few or self._put_away(one)):
                seconds -= copying
                self.drop(one)

    def _dear(self, running: list[int], rows: int) -> Iterator[Kept]:
        """Yield what costs more in the cache than to leave and, in the worst case, to come back."""
        busy = self.cells.runs(running)
        for one in tuple(self._kept):
            stay = self.cells.idle(one.slot, busy) * rows * self._context.cell_seconds
            if stay > 2 * self._copying(one):
                yield one

    def _crowding(self, running: list[int], newest: int) -> Iterator[Kept]:
        """Yield the older ones while idle cells are many."""
        for one in self._kept[: max(0, len(self._kept) - newest)]:
            if self.cells.used - self.cells.held_by(running) <= _IDLE_CELLS:
                return
            yield one

    def _copying(self, one: Kept) -> float:
        """Return the seconds that a copy is likely to take. Asking llama.cpp for the size each time would cost as much
        as some copies.
        """
        if not self._bytes_per_token:
            self._bytes_per_token = self._context.state_size(one.slot) / one.computed
        return one.computed * self._bytes_per_token * self._seconds_per_byte

    def _put_away(self, one: Kept) -> bool:
        """Have the state of a finished sequence in RAM; False where it is not taken."""
        if self.store.covers(one.tokens, one.adapters):
            return True
        state = self._save(one.slot, one.tokens, one.adapters)
        if state is not None:
            self.store.keep(state)
        return state is not None

    def _evict(self, one: Kept) -> None:
        if self.store.on:
            self._put_away(one)
        self.release(one.slot)

    # --- states outside the cache ---

    def copy(self, found: Kept | State, length: int) -> State | None:
        """Return the state of the first ``length`` tokens of what :meth:`locate` found; None while that is more, and
        all sequence ids or cells that it would take to cut it are busy.

        Raises:
            StateRefused: there is no memory for it.
        """
        if found.computed == length:
            return found if isinstance(found, State) else self._copied(found.slot, found.tokens, found.adapters)
        if isinstance(found, Kept) and self._context.n_sequences == 1:
            return self._copy_in_its_place(found, length)
        others = [one for one in self._kept if one is not found]
        while others and not (self._free and self._has_room_to_cut(found)):
            self._kept.remove(others[0])
            self._evict(others.pop(0))
        if not self._free or not self._has_room_to_cut(found):
            return None
        spare = self._free[-1]
        try:
            if isinstance(found, State):
                done = self._context.load(spare, found.data) and self._context.truncate(spare, length)
            elif self._context.unified:
                self._context.share(found.slot, spare, length)
                done = True
            else:
                done = self._context.copy(found.slot, spare, length)
            if not done:
                raise StateRefused(f"llama.cpp could not copy its {length} tokens, or there is no memory", retry=True)
            return self._copied(spare, found.tokens[:length], found.adapters)
        finally:
            self._context.forget(spare)

    def _copy_in_its_place(self, found: Kept, length: int) -> State | None:
        """Cut a finished sequence that has the only id, and let it come back."""
        whole = self._copied(found.slot, found.tokens, found.adapters)
        self.drop(found)
        try:
            return self.copy(whole, length)
        finally:
            self.adopt(whole)

    def _has_room_to_cut(self, found: Kept | State) -> bool:
        return isinstance(found, Kept) or self.room >= found.computed

    def _copied(self, slot: int, tokens: "array[int]", adapters: AdapterSet) -> State:
        first = self._rules.first_copied(slot, len(tokens))
        data = self._context.save(slot)
        if data is None:
            size = self._context.state_size(slot)
            raise StateRefused(f"there is no memory for the {size} bytes of its {len(tokens)} tokens", retry=True)
        return State(tokens, data, adapters, first=first)

    def adopt(self, state: State) -> Kept:
        """Take a state from elsewhere in as a finished sequence: into the cache, or into RAM where there is no room
        beside what runs.

        Raises:
            StateRefused: that is full too, or llama.cpp refuses the state.
        """
        kept = Kept(-1, state.tokens, state.adapters)
        if self.locate(kept) is not None:
            return kept
        if not self._free and not self.evict():
            return self._adopt_into_ram(kept, state)
        slot = self._free.pop()
        while self.room < state.computed and self.evict():
            pass
        if self.room < state.computed:
            self._free.append(slot)
            return self._adopt_into_ram(kept, state)
        if not self._context.load(slot, state.data) or self._context.length(slot) != state.computed:
            why = refusal("slot_not_restored").reason
            self.release(slot)
            raise StateRefused(f"llama.cpp refused it: {why}")
        self.cells.grow(slot, state.computed)
        return self.keep(slot, state.tokens, state.adapters) or kept

    def _adopt_into_ram(self, kept: Kept, state: State) -> Kept:
        if not self.store.admit(state.size):
            raise StateRefused(
                f"the cache has no room for its {state.computed} tokens beside the requests that run, and cache_ram "
                f"none for its {state.size} bytes",
                retry=True,
            )
        self.store.keep(state)
        return kept

    def stow(self, slot: int, tokens: "array[int]", adapters: AdapterSet = ()) -> State | None:
        """Save the state of a sequence that is interrupted, all of whose tokens are computed; None if it must be
        computed again: it is short, or there is no room for it.
        """
        state = self._save(slot, tokens, adapters) if self.store.on else None
        if state is not None:
            self.store.hold(state)
        return state

    def _save(self, slot: int, tokens: "array[int]", adapters: AdapterSet) -> State | None:
        if len(tokens) < _WORTH_STORING or not self.store.admit(self._context.state_size(slot)):
            return None
        started = perf_counter()
        first = self._rules.first_copied(slot, len(tokens))
        data = self._context.save(slot)
        if data is None:
            return None
        self._note_copy(data.nbytes, perf_counter() - started)
        return State(tokens, data, adapters, first=first)

    def copy_seconds(self, state: State) -> float:
        """Return what it will take to restore a state, from what copies took before."""
        return state.size * self._seconds_per_byte

    def restore(self, state: State, slot: int, length: int, donor: Donor | None = None, shared: int = 0) -> bool:
        """Let an empty sequence hold the first ``length`` tokens of a state; False leaves it empty.

        The first ``shared`` ones are then the donor's cells, if there is a sequence id to spare for the way there.
        """
        while self.room < state.computed and self.evict():
            pass
        if self.room < state.computed:
            return False
        started = perf_counter()
        through = slot
        if donor is not None and shared and self._free and not self._rules.exact and self._context.unified:
            through = self._free[-1]
        if not self._context.load(through, state.data):
            self._context.forget(through)
            return False
        if through != slot and donor is not None:
            self._context.share(donor.slot, slot, shared)
            self._context.share(through, slot, length, start=shared)
            self._context.forget(through)
            self.cells.share(donor.slot, slot, shared)
            self.cells.grow(slot, length - shared)
        else:
            self.cells.grow(slot, state.computed)
            if length < state.computed and not self.truncate(slot, length):
                self.forget(slot)
                return False
        self._note_copy(state.size, perf_counter() - started)
        self.store.touch(state)
        return True

    def _note_copy(self, size: int, seconds: float) -> None:
        known = self._seconds_per_byte
        self._seconds_per_byte += _WEIGHT * (min(seconds / size, _MOST_RISE * known) - known)

    def share(self, donor: Donor, slot: int, length: int) -> int | None:
        """Let an empty sequence begin with the first ``length`` tokens of a donor, and return the id that has them:
        ``slot``, or the donor's, which has moved to ``slot`` then. None, where that must be a copy and cannot be had,
        leaves it empty.
        """
        taken = slot
        if self._context.unified:
            self._context.share(donor.slot, slot, length)
            self.cells.share(donor.slot, slot, length)
        elif self._rules.serves(donor.computed, self._rules.first_copied(donor.slot, donor.computed), length):
            if not self._context.copy(donor.slot, slot, length):
                return None
            self.cells.grow(slot, length)
        elif self._context.exchange(donor.slot, slot, length):
            self.cells.truncate(donor.slot, length)
            self.cells.grow(slot, donor.computed)
            taken, donor.slot = donor.slot, slot
        else:
            return None
        self._touch(donor)
        return taken

    def truncate(self, slot: int, length: int) -> bool:
        """Keep the first ``length`` tokens of a sequence; False when this model cannot, and nothing changed."""
        if not self._context.truncate(slot, length):
            return False
        self.cells.truncate(slot, length)
        return True

    def cut(self, slot: int, start: int, end: int) -> bool:
        """Take the tokens from ``start`` to ``end`` out of a sequence and move up what follows; False, and nothing
        changed, where another running sequence holds some of that. Finished ones that do are dropped.
        """
        sharers = self.cells.sharers(slot, end)
        idle = [one for one in self._kept if one.slot in sharers]
        if len(idle) < len(sharers):
            return False
        for one in idle:
            self._kept.remove(one)
            self._evict(one)
        self._context.cut(slot, start, end)
        self.cells.cut(slot, start, end)
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
