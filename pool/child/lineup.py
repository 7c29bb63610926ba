"""Who runs and who waits: which requests have a slot, and what they have found computed of their prompts.

A request takes over what another one, running or finished, has computed of its prompt. If a running one is still at
their common beginning, it holds its slot and waits until that is done: requests that come together share as well as
those that come after each other.

A waiting request is admitted, strictly in order, when its prompt and some room to grow fit beside what the running ones
hold; finished sequences make room. If the room runs out nevertheless, the youngest sequence gives up its cells and
waits at the head of the queue; its state comes back from RAM, or it computes its tokens anew, and it goes on where it
was, so no request fails or is cut short because of its neighbours. The oldest always gets on, as one sequence never
exceeds the cache.
"""

from collections import deque
from itertools import takewhile
from typing import Final

from llamaherd.pool.child.cache import Cache, Kept
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.pace import PrefillPace
from llamaherd.pool.child.prefix import Reuse, Rules, find
from llamaherd.pool.child.sequence import Sequence
from llamaherd.pool.child.slots import Slots

__all__ = ["Lineup"]

#: Cells that each admitted sequence is given to grow before the next one is let in.
_GROWTH: Final = 64
#: Tokens that an answer is expected to have at most, as far as that matters.
_LIKELY: Final = 256


class Lineup:
    """The requests of one context.

    Args:
        slots: Where they run.
        rules: Which prefixes this model can reuse.
        pace: What a token of a prompt costs, as measured.

    Attributes:
        running: Those that hold a slot, in the order of their arrival. Only this class changes it.
        waiting: Those that hold none, the next one first. Likewise.
    """

    def __init__(self, context: Context, cache: Cache, slots: Slots, rules: Rules, pace: PrefillPace) -> None:
        self._context: Final = context
        self._cache: Final = cache
        self._store: Final = cache.store
        self._slots: Final = slots
        #: Finished sequences that stay in the cache whatever they take there.
        self._newest: Final = len(slots)
        self._rules: Final = rules
        self._pace: Final = pace
        self.running: Final[list[Sequence]] = []
        self.waiting: Final[deque[Sequence]] = deque()

    def __repr__(self) -> str:
        return f"<Lineup running={self.running} waiting={len(self.waiting)}>"

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def find(self, request: int) -> Sequence | None:
        """Return the sequence of a request that waits or runs."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request.request == request:
                return sequence
        return None

    def admit(self) -> None:
        """Let those run whose turn it is and who fit."""
        if not self.waiting:
            return
        before = len(self.running)
        self._admit_waiting()
        if len(self.running) > before:
            self._settle()  # before the cells of those who came are chosen: the end of those in use is what counts

    def begin_followers(self) -> None:
        """Have those take over a beginning whose leaders have computed it, or have gone."""
        for sequence in self.running:
            if sequence.leader is not None and not sequence.waits:
                self.begin(sequence)

    def begin(self, sequence: Sequence) -> None:
        """Take over what can be had of the prompt, or wait for it."""
        reuse = self._reuse(sequence)
        if self._restore(sequence, reuse):
            return
        if reuse is not None and reuse.ready and not isinstance(reuse.donor, Sequence):
            reuse = self._reuse(sequence)  # the attempt to restore may have cost the donor its place
        if reuse is None:
            sequence.begin(0)
        elif reuse.ready:
            place = self._cache.share(reuse.donor, sequence.slot, reuse.length)
            sequence.slot = sequence.slot if place is None else place
            sequence.begin(0 if place is None else reuse.length)
        elif isinstance(reuse.donor, Sequence):
            sequence.follow(reuse.donor, reuse.length)

    def leave(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Let a sequence go for good. ``keep`` leaves what it has computed for others."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            kept: Kept | None = None
            if keep and self._tell_truth(sequence):
                # The last token was sampled, but never computed.
                kept = self._cache.keep(sequence.slot, sequence.tokens[: sequence.computed], sequence.adapters)
            else:
                self._cache.release(sequence.slot)
            self._slots.leave(sequence, self._context.n_ctx_seq, kept)
            sequence.stop()
            self._settle()
        else:
            self.waiting.remove(sequence)
        if sequence.saved is not None:
            self._store.release(sequence.saved, keep=keep and sequence.true_length is None)
            sequence.saved = None
        sequence.free()

    def preempt_youngest(self) -> bool:
        """Take the cells of the youngest sequence back; False when there is but one, which may have them all."""
        if len(self.running) < 2:
            return False
        sequence = self.running.pop()
        sequence.saved = self._cache.stow(sequence.slot, sequence.tokens[: sequence.computed], sequence.adapters)
        self._cache.release(sequence.slot)
        self._slots.leave(sequence, self._context.n_ctx_seq)
        sequence.stop()
        self.waiting.appendleft(sequence)
        return True

    def _settle(self) -> None:
        coming = sum(one.pending + min(one.limit - len(one.tokens), _LIKELY) for one in (*self.running, *self.waiting))
        self._cache.settle((one.slot for one in self.running), coming, self._newest)

    def _admit_waiting(self) -> None:
        self.begin_followers()  # whoever comes in now may go on with what they wait for, or cost it its place
        while self.waiting and len(self.running) < len(self._slots):
            # One that wants a slot which is busy is passed by; it comes first when that slot is idle.
            sequence = next((one for one in self.waiting if self._slots.can_take(one)), None)
            if sequence is None:
                return
            reuse = self._reuse(sequence)
            if not self._fits(sequence, reuse):
                return
            self.waiting.remove(sequence)
            donor = reuse.donor if reuse is not None else None
            self._slots.take(sequence, donor)
            taken = self._takes_over(sequence, reuse)
            sequence.start(donor.slot if taken and donor is not None else self._cache.acquire(donor))
            self._context.fold(sequence.slot, sequence.folds)
            self.running.append(sequence)
            if taken and reuse is not None:
                sequence.begin(reuse.length)
            else:
                self.begin(sequence)

    def _takes_over(self, sequence: Sequence, reuse: Reuse | None) -> bool:
        if reuse is None or not reuse.ready or sequence.saved is not None:
            return False
        if any(slot.kept is not None and self._cache.locate(slot.kept) is reuse.donor for slot in self._slots):
            return False  # another slot's, and what that one has may yet be saved
        stored = self._store.find(sequence.tokens, sequence.adapters)
        better = stored is not None and stored[1] > reuse.length
        return not better and self._cache.take_over(reuse.donor, reuse.length)

    def _fits(self, candidate: Sequence, reuse: Reuse | None) -> bool:
        if not self.running:
            return True
        held = self._cache.cells.held_by(one.slot for one in self.running)
        wanted = sum(min(one.coming + _GROWTH, one.limit - one.computed) for one in self.running)
        wanted += min(len(candidate.tokens) + _GROWTH, candidate.limit)
        if reuse is not None and isinstance(reuse.donor, Sequence):
            wanted -= reuse.length
        return held + wanted <= self._context.n_cells

    def _reuse(self, sequence: Sequence) -> Reuse | None:
        """Return what may be reused for a sequence that waits, or that was the last to be admitted."""
        if not sequence.request.cache_prompt:
            return None
        honest = (one for one in self.running if one.request.cache_prompt and one.true_length is None)
        alike = (one for one in honest if one.adapters == sequence.adapters)
        before = takewhile(lambda one: one is not sequence, alike)
        kept = (one for one in self._cache.kept if one.adapters == sequence.adapters)
        return find(sequence.tokens, before, kept, self._rules, sequence.floor)

    def _restore(self, sequence: Sequence, reuse: Reuse | None) -> bool:
        """Begin with a state from RAM if that is the quickest way; False leaves the sequence as it was."""
        state, length = sequence.saved, 0
        if state is not None:
            length = state.computed
        elif (
            sequence.request.cache_prompt
            and (found := self._store.find(sequence.tokens, sequence.adapters)) is not None
        ):
            state, length = found[0], sequence.floor(found[1])
            if not self._rules.serves(state.computed, state.first, length):
                return False
        if state is None:
            return False
        gain = length - (reuse.length if reuse is not None else 0)
        quick = gain * self._pace.seconds_per_token >= self._cache.copy_seconds(state)
        restored = False
        if gain > 0 and quick:
            shared = reuse.length if reuse is not None and reuse.ready and isinstance(reuse.donor, Sequence) else 0
            donor = reuse.donor if reuse is not None and shared else None
            restored = self._cache.restore(state, sequence.slot, length, donor, shared)
        if state is sequence.saved:
            self._store.release(state)
            if restored:
                sequence.resume()
            sequence.saved = None
        elif restored:
            sequence.begin(length)
        return restored

    def _tell_truth(self, sequence: Sequence) -> bool:
        """Drop the cells that are not what the tokens alone would give; False when they cannot be told apart."""
        true = sequence.true_length
        if true is not None and self._cache.truncate(sequence.slot, true):
            # Of a beginning that its window has left nothing may be there any more.
            if self._context.length(sequence.slot) == true:
                sequence.true_length = None
            sequence.computed = true
        return sequence.true_length is None
