"""Continuous batching: the steps of one context, and how its requests end.

A step admits who may come in (``lineup.py``), has a batch composed (``composer.py``), computes it, and gives each
sequence its next token (``next_tokens.py``). Here is what goes wrong on the way: no room, an interruption, a batch that
llama.cpp refuses, logits that are no numbers.
"""

import sys
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final

from llamaherd.pool.child import llama_log
from llamaherd.pool.child.adapters import Adapters
from llamaherd.pool.child.cache import Cache, Kept
from llamaherd.pool.child.composer import Composer, Part
from llamaherd.pool.child.constraint import ConstraintError
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.lineup import Lineup
from llamaherd.pool.child.next_tokens import NextTokens
from llamaherd.pool.child.pace import PrefillPace
from llamaherd.pool.child.prefix import Rules
from llamaherd.pool.child.refusal import refusal
from llamaherd.pool.child.reply import sorted_tokens
from llamaherd.pool.child.sequence import Sequence
from llamaherd.pool.child.shift import cut
from llamaherd.pool.child.slots import Slots
from llamaherd.pool.child.store import Store
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import ChildMessage, Delta, Done, EngineLoad, Failed, SlotState

if TYPE_CHECKING:
    from llamaherd.pool.child.projector import Projector

__all__ = ["Batcher", "Figures"]

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
        self._adds_bos: Final = vocab.adds_bos
        self._projector: Final = projector
        self._store: Final = store
        self._pace: Final = PrefillPace(context.batch.capacity, context.n_ubatch, context.attended, context.attention)
        self.slots: Final = Slots(n_slots)
        self.cache: Final = Cache(context, rules, store)
        self._lineup: Final = Lineup(context, self.cache, self.slots, rules, self._pace)
        self._running: Final = self._lineup.running
        self._composer: Final = Composer(context, self._running, rules, adapters, self._pace)
        self._next: Final = NextTokens(context, vocab)
        #: What the next step has to tell beside its tokens.
        self._ended: list[Done | Failed] = []
        #: What ended requests still had to tell.
        self._late: list[Delta] = []
        self._slots_decoded = 0
        self._longest = 0

    def __repr__(self) -> str:
        return f"<Batcher {self._lineup}>"

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        return bool(self._running or self._lineup.waiting or self._ended)

    @property
    def pause(self) -> float:
        """How many seconds the first step of all that waits may be put off for a further request; 0 where one runs."""
        if self._running or self._ended:
            return 0.0
        return self._pace.pause(sum(one.pending for one in self._lineup.waiting))

    @property
    def figures(self) -> Figures:
        """How busy it is."""
        return Figures(
            running=len(self._running),
            waiting=len(self._lineup.waiting),
            kept=sum(1 for _ in self.cache.kept),
            stored=self._store.kept,
            stored_bytes=self._store.used,
            cells=self.cache.cells.used,
            computed=self._context.batch.n_computed,
        )

    def knows(self, request: int) -> bool:
        """Whether a request of that number waits or runs."""
        return self._lineup.find(request) is not None

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._lineup.submit(sequence)

    def cancel(self, request: int) -> None:
        """End a request now; the next step returns its ``done``. Unknown numbers are ignored."""
        sequence = self._lineup.find(request)
        if sequence is not None:
            self._end(sequence, sequence.done("cancelled"))

    def clear(self) -> None:
        """Drop every request without a word."""
        for sequence in (*self._running, *self._lineup.waiting):
            self._lineup.leave(sequence)
        self._ended.clear()
        self._late.clear()
        self._store.clear()

    def step(self) -> list[ChildMessage]:
        """Compute one batch; see :meth:`Engine.step`."""
        self._lineup.admit()
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
            waiting=len(self._lineup.waiting),
            cells_used=self.cache.cells.used,
            cells=self._context.n_cells,
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

    def _end(self, sequence: Sequence, message: Done | Failed) -> None:
        self._lineup.leave(sequence, keep=isinstance(message, Done) and sequence.request.cache_prompt)
        self._late += sequence.gathered()
        self._ended.append(message)

    # --- what is computed ---

    def _compute(self) -> list[Part]:
        """Build a batch and compute it; return its parts, none when nothing was computed."""
        batch = self._context.batch
        while self._running:
            self._lineup.begin_followers()
            self._shift()
            ready = self._composer.ready()
            viewer = self._composer.viewer(ready)
            if viewer is not None and not self._encode(viewer):
                return []
            parts = self._composer.fill(ready, viewer)
            while self.cache.room < batch.n_rows and self.cache.evict():
                pass
            started = perf_counter()
            code = self._decode(viewer)
            seconds = perf_counter() - started
            self._composer.note(seconds)
            if code == _DONE:
                self._slots_decoded += len(self._running)
                for part in parts:
                    part.sequence.computed += part.n_tokens
                    self._longest = max(self._longest, part.sequence.computed)
                    self.cache.cells.grow(part.sequence.slot, part.n_tokens)
                if batch.n_rows > len(parts):
                    beside, seen = _beside(parts)
                    self._pace.note(batch.n_rows - beside, seconds, beside=beside, seen=seen)
                else:
                    self._pace.note_plain(batch.n_rows, seconds)
                return parts
            if code == _ABORTED:
                self._recover()
                return []
            # A finished sequence may share all its cells, so one is not always enough.
            if code != _NO_ROOM or not (self.cache.evict() or self._lineup.preempt_youngest()):
                self._give_up(parts, code)
        return []

    def _shift(self) -> None:
        """Make room in the sequences whose context is full, if they want to go on."""
        for sequence in self._running:
            if not (sequence.shifts and sequence.overflows):
                continue
            start, end = cut(
                n_ctx=len(sequence.tokens),
                computed=sequence.computed,
                n_prompt=sequence.n_prompt,
                n_keep=sequence.request.n_keep or 0,
                n_discard=sequence.request.n_discard,
                adds_bos=self._adds_bos,
            )
            moved = self.cache.cut(sequence.slot, start, end)
            sequence.shift(start, end)
            if not moved:
                # Another request holds the cells that would have to move: what is left is computed for itself.
                self.cache.forget(sequence.slot)
                self._lineup.begin(sequence)

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

    def _give_up(self, parts: list[Part], code: int) -> None:
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

    def _sample(self, parts: list[Part]) -> list[Delta]:
        if not parts:
            return []
        deltas: list[Delta] = []
        for index, (part, token) in enumerate(zip(parts, self._next.choose(parts), strict=True)):
            sequence = part.sequence
            if token is None:
                self._end(sequence, _not_numbers(sequence.request.request))
            elif sequence.full:
                self._end(sequence, sequence.done("length"))  # max_tokens 0: the prompt was all that was asked for
            else:
                try:
                    delta, reason = self._next.take(sequence, token, index, len(parts))
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


def _beside(parts: list[Part]) -> tuple[int, float]:
    """Return how many rows a computed batch had beside prompts, and the tokens before each of those', added up."""
    prompts = [part for part in parts if part.n_tokens > 1]
    seen = sum(part.n_tokens * (part.sequence.computed - part.n_tokens / 2) for part in prompts)
    return len(parts) - len(prompts), seen


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
