"""Continuous batching: which sequences run, what each step computes, and what comes of it.

Every step feeds one row per generating sequence first and fills the rest with prompt chunks, oldest request first, as
far as :class:`PrefillPace` allows. All sequences share the cells of one cache.

A request takes over what another one, running or finished, has computed of its prompt. If a running one is still at
their common beginning, it holds its slot and waits until that is done: requests that come together share as well as
those that come after each other.

A waiting request is admitted, strictly in order, when its prompt and some room to grow fit beside what the running ones
hold; finished sequences make room. If the room runs out nevertheless, the youngest sequence gives up its cells and
waits at the head of the queue; its state comes back from RAM, or it computes its tokens anew, and it goes on where it
was, so no request fails or is cut short because of its neighbours. The oldest always gets on, as one sequence never
exceeds the cache.

Images and sounds are encoded in a step of their own, and what comes of it is computed in batches of its own; after each
of these a step belongs to the others.

A batch is computed with one set of LoRA adapters. Sequences of different sets share nothing and take turns.
"""

import sys
from collections import deque
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import TYPE_CHECKING, Final

from llamaherd.pool.child import llama_log
from llamaherd.pool.child.adapters import Adapters, Turns
from llamaherd.pool.child.cache import Cache, Kept
from llamaherd.pool.child.constraint import Constraint, ConstraintError
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.pace import PrefillPace
from llamaherd.pool.child.pick import Picker
from llamaherd.pool.child.prefix import Reuse, Rules, find
from llamaherd.pool.child.refusal import refusal
from llamaherd.pool.child.reply import sorted_tokens
from llamaherd.pool.child.sampler import certain, choose, likeliest
from llamaherd.pool.child.sequence import Sequence
from llamaherd.pool.child.shift import cut
from llamaherd.pool.child.slots import Slots
from llamaherd.pool.child.store import Store
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import (
    ChildMessage,
    Delta,
    Done,
    EngineLoad,
    Failed,
    FinishReason,
    SlotState,
    TokenProbs,
)

if TYPE_CHECKING:
    from llamaherd.pool.child.projector import Projector

__all__ = ["Batcher", "Figures"]

#: Cells that each admitted sequence is given to grow before the next one is let in.
_GROWTH: Final = 64
#: Tokens that an answer is expected to have at most, as far as that matters.
_LIKELY: Final = 256
_DONE, _NO_ROOM, _ABORTED, _BAD_BATCH = 0, 1, 2, -1


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How busy a batcher is.

    Attributes:
        running: Sequences that hold a slot.
        waiting: Requests that hold none.
        kept: Finished sequences in the cache.
        stored: Finished sequences whose states are in RAM.
        stored_bytes: Bytes of all states there, those of interrupted requests included.
        cells: Cells that running and kept sequences hold, shared ones counted once.
        computed: Tokens computed since the model was loaded.
    """

    running: int = 0
    waiting: int = 0
    kept: int = 0
    stored: int = 0
    stored_bytes: int = 0
    cells: int = 0
    computed: int = 0


@dataclass(slots=True)
class _Part:
    """A sequence's share of one batch. ``row`` is the row with its logits, or -1 while its prompt is unfinished."""

    sequence: Sequence
    n_tokens: int
    row: int


class Batcher:
    """The requests of one context. Takes sequences of checked token ids.

    Args:
        n_slots: Most sequences that run together.
        rules: Which prefixes this model can reuse.
        adapters: The model's LoRA adapters.
        store: Where sequences go that must leave the cache; the batcher clears it at its end.
        projector: What encodes images and sounds, for sequences that have some.
    """

    def __init__(
        self,
        context: Context,
        vocab: Vocab,
        n_slots: int,
        rules: Rules,
        *,
        adapters: Adapters,
        store: Store,
        projector: "Projector | None" = None,
    ) -> None:
        self._context: Final = context
        self._vocab: Final = vocab
        self.slots: Final = Slots(n_slots)
        #: Finished sequences that stay in the cache whatever they take there.
        self._newest: Final = n_slots
        self._rules: Final = rules
        self._adapters: Final = adapters
        self._turns: Final = Turns()
        self._projector: Final = projector
        #: Whether the last step was about an image or a sound.
        self._looked = False
        self.cache: Final = Cache(context, rules, store)
        self._store: Final = store
        self._picker: Final = Picker(vocab)
        self._pace: Final = PrefillPace(context.batch.capacity, context.n_ubatch)
        self._waiting: Final[deque[Sequence]] = deque()
        #: In the order of their arrival.
        self._running: Final[list[Sequence]] = []
        #: What the next step has to tell beside its tokens.
        self._ended: list[Done | Failed] = []
        #: What ended requests still had to tell.
        self._late: list[Delta] = []
        self._slots_decoded = 0
        self._longest = 0

    def __repr__(self) -> str:
        return f"<Batcher running={self._running} waiting={len(self._waiting)}>"

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        return bool(self._running or self._waiting or self._ended)

    @property
    def pause(self) -> float:
        """How many seconds the first step of all that waits may be put off for a further request; 0 where one runs."""
        if self._running or self._ended:
            return 0.0
        return self._pace.pause(sum(one.pending for one in self._waiting))

    @property
    def figures(self) -> Figures:
        """How busy it is."""
        return Figures(
            running=len(self._running),
            waiting=len(self._waiting),
            kept=sum(1 for _ in self.cache.kept),
            stored=self._store.kept,
            stored_bytes=self._store.used,
            cells=self.cache.cells.used,
            computed=self._context.batch.n_computed,
        )

    def knows(self, request: int) -> bool:
        """Whether a request of that number waits or runs."""
        return self._find(request) is not None

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def cancel(self, request: int) -> None:
        """End a request now; the next step returns its ``done``. Unknown numbers are ignored."""
        sequence = self._find(request)
        if sequence is not None:
            self._end(sequence, sequence.done("cancelled"))

    def clear(self) -> None:
        """Drop every request without a word."""
        for sequence in (*self._running, *self._waiting):
            self._remove(sequence)
        self._ended.clear()
        self._late.clear()
        self._store.clear()

    def step(self) -> list[ChildMessage]:
        """Compute one batch; see :meth:`Engine.step`."""
        self._admit()
        parts = self._compute()
        asking = [one.progress() for one in self._running if one.request.progress]
        deltas = self._sample([part for part in parts if part.row >= 0])
        if self._late:
            deltas += self._late
            self._late = []
        ended, self._ended = self._ended, []
        progress = tuple(filter(None, asking))
        return [sorted_tokens(deltas, progress), *ended] if deltas or progress else [*ended]

    @property
    def load(self) -> EngineLoad:
        """How busy it is, and what it has done."""
        batch = self._context.batch
        return EngineLoad(
            slots_busy=len(self._running),
            waiting=len(self._waiting),
            cells_used=self.cache.cells.used,
            cells=self._context.n_ctx,
            cached=sum(1 for _ in self.cache.kept),
            stored=self._store.kept,
            stored_bytes=self._store.used,
            decodes=batch.n_decoded,
            decoded=batch.n_computed,
            slots_decoded=self._slots_decoded,
            longest=self._longest,
        )

    def told_slots(self) -> tuple[SlotState, ...]:
        """Return what runs where."""
        return tuple(slot.told(self._context.n_ctx_seq, self._held(slot.kept)) for slot in self.slots)

    def _held(self, kept: Kept | None) -> int:
        return kept.computed if kept is not None and self.cache.locate(kept) is not None else 0

    # --- who runs ---

    def _admit(self) -> None:
        if not self._waiting:
            return
        before = len(self._running)
        self._admit_waiting()
        if len(self._running) > before:
            self._settle()  # before the cells of those who came are chosen: the end of those in use is what counts

    def _settle(self) -> None:
        coming = sum(
            one.pending + min(one.limit - len(one.tokens), _LIKELY) for one in (*self._running, *self._waiting)
        )
        self.cache.settle((one.slot for one in self._running), coming, self._newest)

    def _admit_waiting(self) -> None:
        self._begin_followers()  # whoever comes in now may go on with what they wait for, or cost it its place
        while self._waiting and len(self._running) < len(self.slots):
            # One that wants a slot which is busy is passed by; it comes first when that slot is idle.
            sequence = next((one for one in self._waiting if self.slots.can_take(one)), None)
            if sequence is None:
                return
            reuse = self._reuse(sequence)
            if not self._fits(sequence, reuse):
                return
            self._waiting.remove(sequence)
            donor = reuse.donor if reuse is not None else None
            self.slots.take(sequence, donor)
            taken = self._takes_over(sequence, reuse)
            sequence.start(donor.slot if taken and donor is not None else self.cache.acquire(donor))
            self._context.fold(sequence.slot, sequence.folds)
            self._running.append(sequence)
            if taken and reuse is not None:
                sequence.begin(reuse.length)
            else:
                self._begin(sequence)

    def _takes_over(self, sequence: Sequence, reuse: Reuse | None) -> bool:
        if reuse is None or not reuse.ready or sequence.saved is not None:
            return False
        if any(slot.kept is not None and self.cache.locate(slot.kept) is reuse.donor for slot in self.slots):
            return False  # another slot's, and what that one has may yet be saved
        stored = self._store.find(sequence.tokens, sequence.adapters)
        better = stored is not None and stored[1] > reuse.length
        return not better and self.cache.take_over(reuse.donor, reuse.length)

    def _fits(self, candidate: Sequence, reuse: Reuse | None) -> bool:
        if not self._running:
            return True
        held = self.cache.cells.held_by(one.slot for one in self._running)
        wanted = sum(min(one.coming + _GROWTH, one.limit - one.computed) for one in self._running)
        wanted += min(len(candidate.tokens) + _GROWTH, candidate.limit)
        if reuse is not None and isinstance(reuse.donor, Sequence):
            wanted -= reuse.length
        return held + wanted <= self._context.n_ctx

    def _reuse(self, sequence: Sequence) -> Reuse | None:
        """Return what may be reused for a sequence that waits, or that was the last to be admitted."""
        if not sequence.request.cache_prompt:
            return None
        honest = (one for one in self._running if one.request.cache_prompt and one.true_length is None)
        alike = (one for one in honest if one.adapters == sequence.adapters)
        before = takewhile(lambda one: one is not sequence, alike)
        kept = (one for one in self.cache.kept if one.adapters == sequence.adapters)
        return find(sequence.tokens, before, kept, self._rules, sequence.floor)

    def _begin(self, sequence: Sequence) -> None:
        """Take over what can be had of the prompt, or wait for it."""
        reuse = self._reuse(sequence)
        if self._restore(sequence, reuse):
            return
        if reuse is not None and reuse.ready and not isinstance(reuse.donor, Sequence):
            reuse = self._reuse(sequence)  # the attempt to restore may have cost the donor its place
        if reuse is None:
            sequence.begin(0)
        elif reuse.ready:
            place = self.cache.share(reuse.donor, sequence.slot, reuse.length)
            sequence.slot = sequence.slot if place is None else place
            sequence.begin(0 if place is None else reuse.length)
        elif isinstance(reuse.donor, Sequence):
            sequence.follow(reuse.donor, reuse.length)

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
        quick = gain * self._pace.seconds_per_token >= self.cache.copy_seconds(state)
        restored = False
        if gain > 0 and quick:
            shared = reuse.length if reuse is not None and reuse.ready and isinstance(reuse.donor, Sequence) else 0
            donor = reuse.donor if reuse is not None and shared else None
            restored = self.cache.restore(state, sequence.slot, length, donor, shared)
        if state is sequence.saved:
            self._store.release(state)
            if restored:
                sequence.resume()
            sequence.saved = None
        elif restored:
            sequence.begin(length)
        return restored

    def _begin_followers(self) -> None:
        for sequence in self._running:
            if sequence.leader is not None and not sequence.waits:
                self._begin(sequence)

    def _find(self, request: int) -> Sequence | None:
        for sequence in (*self._running, *self._waiting):
            if sequence.request.request == request:
                return sequence
        return None

    def _end(self, sequence: Sequence, message: Done | Failed) -> None:
        self._remove(sequence, keep=isinstance(message, Done) and sequence.request.cache_prompt)
        self._late += sequence.gathered()
        self._ended.append(message)

    def _remove(self, sequence: Sequence, *, keep: bool = False) -> None:
        if sequence.slot >= 0:
            self._running.remove(sequence)
            kept: Kept | None = None
            if keep and self._tell_truth(sequence):
                # The last token was sampled, but never computed.
                kept = self.cache.keep(sequence.slot, sequence.tokens[: sequence.computed], sequence.adapters)
            else:
                self.cache.release(sequence.slot)
            self.slots.leave(sequence, self._context.n_ctx_seq, kept)
            sequence.stop()
            self._settle()
        else:
            self._waiting.remove(sequence)
        if sequence.saved is not None:
            self._store.release(sequence.saved, keep=keep and sequence.true_length is None)
            sequence.saved = None
        sequence.free()

    def _tell_truth(self, sequence: Sequence) -> bool:
        """Drop the cells that are not what the tokens alone would give; False when they cannot be told apart."""
        true = sequence.true_length
        if true is not None and self.cache.truncate(sequence.slot, true):
            sequence.computed, sequence.true_length = true, None
        return sequence.true_length is None

    def _preempt_youngest(self) -> bool:
        """Take the cells of the youngest sequence back; False when there is but one, which may have them all."""
        if len(self._running) < 2:
            return False
        sequence = self._running.pop()
        sequence.saved = self.cache.stow(sequence.slot, sequence.tokens[: sequence.computed], sequence.adapters)
        self.cache.release(sequence.slot)
        self.slots.leave(sequence, self._context.n_ctx_seq)
        sequence.stop()
        self._waiting.appendleft(sequence)
        return True

    # --- what is computed ---

    def _compute(self) -> list[_Part]:
        """Build a batch and compute it; return its parts, none when nothing was computed."""
        batch = self._context.batch
        while self._running:
            self._begin_followers()
            self._shift()
            ready = self._next()
            viewer = self._viewer(ready)
            if viewer is not None and not self._encode(viewer):
                return []
            parts = self._build(ready) if viewer is None else self._show(viewer)
            while self.cache.room < batch.n_rows and self.cache.evict():
                pass
            started = perf_counter()
            code = self._decode(viewer)
            seconds = perf_counter() - started
            self._turns.note(seconds)
            if code == _DONE:
                self._slots_decoded += len(self._running)
                for part in parts:
                    part.sequence.computed += part.n_tokens
                    self._longest = max(self._longest, part.sequence.computed)
                    self.cache.cells.grow(part.sequence.slot, part.n_tokens)
                if batch.n_rows > len(parts):
                    self._pace.note(batch.n_rows, seconds)
                else:
                    self._pace.note_plain(seconds)
                return parts
            if code == _ABORTED:
                self._recover()
                return []
            # A finished sequence may share all its cells, so one is not always enough.
            if code != _NO_ROOM or not (self.cache.evict() or self._preempt_youngest()):
                self._give_up(parts, code)
        return []

    def _shift(self) -> None:
        """Make room in the sequences whose context is full, if they want to go on."""
        for sequence in self._running:
            if not sequence.overflows:
                continue
            start, end = cut(
                n_ctx=len(sequence.tokens),
                computed=sequence.computed,
                n_prompt=sequence.n_prompt,
                n_keep=sequence.request.n_keep or 0,
                n_discard=sequence.request.n_discard,
                adds_bos=self._vocab.adds_bos,
            )
            moved = self.cache.cut(sequence.slot, start, end)
            sequence.shift(start, end)
            if not moved:
                # Another request holds the cells that would have to move: what is left is computed for itself.
                self.cache.forget(sequence.slot)
                self._begin(sequence)

    def _decode(self, viewer: Sequence | None) -> int:
        chunk = viewer.chunk if viewer is not None else None
        if viewer is None or chunk is None:
            return self._context.decode()
        self._context.set_causal(not chunk.whole)
        code = self._context.decode()
        self._context.set_causal(True)
        if code == _DONE and viewer.computed + self._context.batch.n_rows == chunk.end:
            chunk.rows = None
        return code

    def _viewer(self, ready: list[Sequence]) -> Sequence | None:
        """Return the sequence whose image or sound this step is about; None for a step of tokens."""
        viewers = [one for one in ready if one.chunk is not None]
        self._looked = bool(viewers) and not (self._looked and len(viewers) < len(ready))
        return viewers[0] if self._looked else None

    def _encode(self, viewer: Sequence) -> bool:
        """Whether the chunk that comes next has its rows. If not, they are computed, which is enough for one step."""
        chunk = viewer.chunk
        if chunk is None or self._projector is None or chunk.rows is not None:
            return True
        if not self._projector.encode(chunk):
            reason = llama_log.error_lines() or "llama.cpp gave no reason"
            text = f"an image or sound could not be encoded: {reason}"
            number = viewer.request.request
            self._end(viewer, Failed(request=number, message=text, fault="worker", code="encode_failed"))
        return False

    def _show(self, viewer: Sequence) -> list[_Part]:
        """Fill the batch with a chunk's rows, or with as many as are due if it need not be whole."""
        batch, chunk = self._context.batch, viewer.chunk
        batch.clear()
        if chunk is None or chunk.rows is None:
            return []
        done = viewer.computed - chunk.start
        rows = chunk.rows[done:]
        if not chunk.whole:
            rows = rows[: min(self._pace.tokens(shared=len(self._running) > 1), batch.capacity)]
        positions = chunk.positions(viewer.position(chunk.start))
        batch.embed(viewer.slot, positions[:, done : done + len(rows)], rows)
        return [_Part(viewer, len(rows), -1)]

    def _build(self, ready: list[Sequence]) -> list[_Part]:
        batch = self._context.batch
        batch.clear()
        parts: list[_Part] = []
        texts = [one for one in ready if one.chunk is None]
        rows = [one for one in texts if one.pending == 1]
        if not self._context.unified:
            rows.sort(key=_by_slot)  # llama.cpp computes them together only in the order of their ids
        for sequence in rows:
            row = batch.add(sequence.slot, sequence.position(sequence.computed), sequence.tokens[-1])
            parts.append(_Part(sequence, 1, row))
        prompts = [one for one in texts if one.pending != 1]
        if prompts:
            wanted = self._pace.tokens(shared=bool(parts), beside=len(parts), prompts=len(prompts))
            self._add_prompts(prompts, parts, min(wanted, batch.room))
        return parts

    def _next(self) -> list[Sequence]:
        """Return the sequences that the next batch may hold, and have the context apply their adapters."""
        ready = [one for one in self._running if one.leader is None]
        if not len(self._adapters):
            return ready
        turn = self._turns.choose(one.adapters for one in ready)
        self._adapters.apply(self._context.handle, turn)
        return [one for one in ready if one.adapters == turn]

    def _add_prompts(self, prompts: list[Sequence], parts: list[_Part], budget: int) -> None:
        for sequence in prompts:
            count = min(sequence.pending, sequence.ahead, budget, self._next_stop(sequence))
            if count == 0:
                return
            last = count == sequence.pending
            chunk = sequence.tokens[sequence.computed : sequence.computed + count]
            row = self._context.batch.extend(sequence.slot, sequence.position(sequence.computed), chunk, output=last)
            parts.append(_Part(sequence, count, row if last else -1))
            budget -= count

    def _next_stop(self, sequence: Sequence) -> int:
        """Return how many tokens a sequence may compute before a follower of it needs it to halt."""
        stops = [self._context.batch.capacity]
        if self._rules.exact:
            stops += [one.shared - sequence.computed for one in self._running if one.leader is sequence]
        return min(stops)

    def _recover(self) -> None:
        """After an aborted decode, believe the cache: finished chunks are in it, but every logit was lost."""
        for sequence in self._running:
            if sequence.leader is not None:
                continue
            # Positions do not tell how much of an image is there.
            length = sequence.computed if sequence.folds else self._context.length(sequence.slot)
            length = min(length, len(sequence.tokens) - 1)
            self.cache.cells.grow(sequence.slot, max(0, length - sequence.computed))
            sequence.computed = length
            if not self.cache.truncate(sequence.slot, length):
                self.cache.forget(sequence.slot)
                sequence.computed = 0

    def _give_up(self, parts: list[_Part], code: int) -> None:
        """Fail the requests of a batch that cannot be computed. Raises EngineError for a broken backend."""
        why = refusal("decode_failed")
        text = f"llama_decode returned {code}: {why.reason}"
        if code not in (_BAD_BATCH, _NO_ROOM):
            raise EngineError(text, code=why.code, retry=True)
        for part in parts:
            number = part.sequence.request.request
            failure = Failed(request=number, message=text, fault="worker", retry=True, code="decode_failed")
            self._end(part.sequence, failure)

    # --- what comes of it ---

    def _sample(self, parts: list[_Part]) -> list[Delta]:
        if not parts:
            return []
        deltas: list[Delta] = []
        # Where the picker chooses, the highest logit serves only to tell damaged weights.
        chains = [None if part.sequence.picked else part.sequence.chain for part in parts]
        chosen = choose(self._context, [(part.row, chain) for part, chain in zip(parts, chains, strict=True)])
        for index, (part, token) in enumerate(zip(parts, chosen, strict=True)):
            sequence = part.sequence
            if token is None:
                self._end(sequence, _not_numbers(sequence.request.request))
            elif sequence.full:
                self._end(sequence, sequence.done("length"))  # max_tokens 0: the prompt was all that was asked for
            else:
                try:
                    delta, reason = self._take(sequence, token, index, len(parts))
                except ConstraintError as error:
                    self._end(sequence, _stuck(sequence.request.request, error))
                    continue
                except EngineError:
                    raise
                except Exception as error:  # what one answer brings up may not end the others
                    sys.excepthook(type(error), error, error.__traceback__)
                    self._end(sequence, _broken(sequence.request.request, error))
                    continue
                if sequence.request.whole:
                    deltas += sequence.gather(delta, last=reason is not None)
                else:
                    deltas.append(delta)
                if reason is not None:
                    self._end(sequence, sequence.done(reason))
        return deltas

    def _take(self, sequence: Sequence, token: int, index: int, outputs: int) -> tuple[Delta, FinishReason | None]:
        """Give a sequence its next token, ``token`` unless it is to be picked or may not stand."""
        if sequence.picked:
            token = self._pick(sequence, index, outputs)
        elif sequence.constraint is not None:
            token = self._hold(sequence, sequence.constraint, token, index, outputs)
        count = sequence.request.sampling.n_probs
        probs = (self._probs(sequence, index, outputs, token),) if count else ()
        return sequence.accept(token, self._vocab, probs)

    def _pick(self, sequence: Sequence, index: int, outputs: int) -> int:
        logits = self._context.logits(outputs)[index]
        go_on = sequence.request.ignore_eos
        return self._picker.pick(logits, sequence.chain, sequence.constraint, sequence.tokens, go_on=go_on)

    def _hold(self, sequence: Sequence, constraint: Constraint, token: int, index: int, outputs: int) -> int:
        """Return a token that was chosen freely if a constraint lets it pass, else another."""
        chain, go_on = sequence.chain, sequence.request.ignore_eos
        if constraint.choice == "any" or self._picker.may_stand(token, chain, constraint, go_on=go_on):
            constraint.accept(token)
            return token
        logits = self._context.logits(outputs)[index]
        return self._picker.replace(logits, chain, constraint, sequence.tokens, go_on=go_on)

    def _probs(self, sequence: Sequence, index: int, outputs: int, token: int) -> TokenProbs:
        sampling = sequence.request.sampling
        if not sampling.post_sampling_probs:
            return likeliest(self._context.logits(outputs)[index], token, sampling.n_probs, self._vocab)
        if sequence.chain is None:
            return certain(token, self._vocab)
        return sequence.chain.odds(token, sampling.n_probs, self._vocab)


def _by_slot(sequence: Sequence) -> int:
    return sequence.slot


def _stuck(request: int, error: ConstraintError) -> Failed:
    return Failed(request=request, message=str(error), fault="caller", code=error.code)


def _broken(request: int, error: Exception) -> Failed:
    text = f"the worker failed on this request: {error!r}"[:500]
    return Failed(request=request, message=text, fault="worker", code="request_broke")


def _not_numbers(request: int) -> Failed:
    return Failed(
        request=request,
        message="the model's logits are not numbers (NaN): its weights are damaged or overflow in this precision",
        fault="model",
        code="bad_logits",
    )
