"""One generation: its tokens, how much of them is computed, and how it ends."""

from array import array
from itertools import groupby
from time import perf_counter
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from llamaherd.pool.child.adapters import AdapterSet
from llamaherd.pool.child.batch import Folds, position_of
from llamaherd.pool.child.chat import Turn
from llamaherd.pool.child.constraint import Constraint
from llamaherd.pool.child.lines import LineLimits
from llamaherd.pool.child.reply import Reply, read_delta
from llamaherd.pool.child.sampler import Chain
from llamaherd.pool.child.store import State
from llamaherd.pool.child.text import TextStream
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.deltas import join, thinks, typed
from llamaherd.transport.messages import (
    Delta,
    Done,
    FinishReason,
    Generate,
    PromptProgress,
    SlotState,
    Timings,
    TokenProbs,
    TypedDelta,
    Usage,
)

if TYPE_CHECKING:  # it brings a library that most models have no use for
    from llamaherd.pool.child.projector import Chunk, MediaPrompt

__all__ = ["Sequence"]

#: Tokens that an answer which is read whole may be behind.
_MOST_HELD: Final = 32


class Sequence:
    """A request from its submission to its end.

    ``tokens`` is the whole truth: the prompt and what was generated, without what a context shift took out. The first
    ``computed`` of them are in the cache, the rest is fed by the next steps. A preempted sequence therefore just starts
    over with ``computed`` 0, unless its state was ``saved``.

    Args:
        context: Most tokens that it may have at a time.
        shifts: Whether it goes on beyond that, by context shifts.
        media: The images and sounds of its prompt, which it frees at its end; they rule out context shifts.

    Attributes:
        saved: Its state, while it waits to go on after a preemption; None if there is none.
        true_length: Its first tokens whose cells are what those tokens alone give; None means all.
        slot: Its sequence id in the cache while it runs, else -1.
        lane: The number of its slot, as callers know it, while it runs, else -1.
        leader: The sequence that it lets compute their common beginning, and ``shared``, the length of that; None when
            it computes by itself.
        has_media: Whether its prompt has images or sounds.
        shifts: Whether it goes on by context shifts.
        chain: Its samplers; None means greedy.
        adapters: What its tokens are computed with.
        constraint: What restricts its tokens, if anything does.
        picked: Whether the picker chooses its next token from the beginning, in the sight of all candidates: where
            what the samplers leave is to be told, where just one may come, where its samplers cannot take back what
            a constraint may refuse, and where tokens that are ruled out would spoil their choice.
    """

    def __init__(
        self,
        request: Generate,
        prompt: list[int],
        context: int,
        chain: Chain | None,
        adapters: AdapterSet = (),
        *,
        constraint: Constraint | None = None,
        shifts: bool = False,
        turn: Turn | None = None,
        media: "MediaPrompt | None" = None,
    ) -> None:
        self.request: Final = request
        self.tokens: Final = array("i", prompt)
        self.n_prompt: Final = len(prompt)
        self.n_generated = 0
        self._context: Final = context
        self.has_media: Final = media is not None
        self.shifts: Final = shifts and media is None
        self._media: Final = media
        self._chunks: Final = media.chunks if media is not None else ()
        #: Where its positions fall behind its tokens.
        self.folds: Final[Folds] = tuple((chunk.end, chunk.folded) for chunk in self._chunks if chunk.folded)
        self._shifted = False
        #: Most tokens at a time, prompt included.
        self.limit: Final = context if request.max_tokens < 0 else min(context, len(prompt) + request.max_tokens)
        self.saved: State | None = None
        self.true_length: int | None = None
        self.slot = -1
        self.lane = -1
        self.computed = 0
        self.leader: Sequence | None = None
        self.shared = 0
        self._cached = -1
        self._ran_in = -1
        self._new_line = False
        self._held: list[Delta] = []
        self._told_progress = -1
        self.chain: Final = chain
        self.adapters: Final = adapters
        self.constraint: Final = constraint
        sampling = request.sampling
        told = sampling.n_probs > 0 and sampling.post_sampling_probs
        spoilt = chain is not None and chain.takes_logarithms and (request.ignore_eos or bool(chain.banned))
        #: Whether all candidates must be seen: to be told, or to leave those out that are ruled out.
        self._sees_all: Final = told or spoilt
        self.picked = self._is_picked()
        limited = request.n_indent > 0 or request.t_max_predict_ms > 0
        self._lines: Final = LineLimits(request.n_indent, request.t_max_predict_ms / 1e3) if limited else None
        self._text: Final = TextStream(request.stop)
        #: Tells reasoning and tool calls from content, where the answer may hold some; and what it must see for that.
        self._reply: Final[Reply | None] = turn.reply if turn is not None else None
        self._shown: Final[frozenset[int]] = turn.shown if turn is not None else frozenset()
        self._submitted = perf_counter()
        self._started = 0.0
        self._first_token = 0.0

    def __repr__(self) -> str:
        return f"<Sequence {self.request.request} slot={self.slot} {self.computed}/{len(self.tokens)} of {self.limit}>"

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet; 1 while it generates."""
        return len(self.tokens) - self.computed

    @property
    def chunk(self) -> "Chunk | None":
        """The image or sound that is to be computed next; None before a token."""
        for chunk in self._chunks:
            if chunk.start <= self.computed < chunk.end:
                return chunk
        return None

    @property
    def ahead(self) -> int:
        """Tokens to compute before the next image or sound, or the end."""
        starts = [chunk.start - self.computed for chunk in self._chunks if chunk.start >= self.computed]
        return min(starts, default=self.pending)

    def position(self, index: int) -> int:
        """Return the position of a token that is not within an image or sound."""
        return position_of(self.folds, index) if self.folds else index

    def floor(self, length: int) -> int:
        """Return the most of the first ``length`` tokens that do not end within an image or sound."""
        for chunk in self._chunks:
            if chunk.start < length < chunk.end:
                return chunk.start
        return length

    @property
    def full(self) -> bool:
        """Whether no further token may be generated."""
        enough = 0 <= self.request.max_tokens <= self.n_generated
        return enough or (len(self.tokens) >= self._context and not self.shifts)

    @property
    def overflows(self) -> bool:
        """Whether it needs a context shift before its newest token can be computed."""
        return self.shifts and self.pending == 1 and len(self.tokens) >= self._context

    @property
    def coming(self) -> int:
        """Tokens that it will compute, as far as it is known."""
        return len(self.tokens) - max(self.computed, self.shared if self.leader is not None else 0)

    def start(self, slot: int) -> None:
        """Take a slot, for the first time or again."""
        self.slot, self._ran_in = slot, self.lane
        self._started = self._started or perf_counter()

    def follow(self, leader: "Sequence", length: int) -> None:
        """Wait until another sequence has computed the first ``length`` tokens, which are its own too."""
        self.leader, self.shared = leader, length

    @property
    def waits(self) -> bool:
        """Whether its leader is still on the way."""
        leader = self.leader
        return leader is not None and leader.slot >= 0 and leader.computed < self.shared

    def begin(self, reused: int) -> None:
        """Compute by itself from here on; the first ``reused`` tokens were taken over."""
        self.leader, self.shared = None, 0
        self.computed, self.true_length = reused, None
        # What a preempted sequence lost and finds again elsewhere it has computed itself before.
        reused = min(reused, self.n_prompt)
        self._cached = reused if self._cached < 0 else min(self._cached, reused)

    def resume(self) -> None:
        """Go on from the saved state, which is in the cache again."""
        if self.saved is not None:
            self.computed, self.saved = self.saved.computed, None

    def shift(self, start: int, end: int) -> None:
        """Take tokens out that the cache no longer has."""
        true = start if self.true_length is None else min(self.true_length, start)
        del self.tokens[start:end]
        self.computed -= end - start
        self.true_length = true
        self._shifted = True

    def stop(self) -> None:
        """Give the slot back; what was computed is gone from the cache."""
        self.slot, self.computed = -1, 0
        self.leader, self.shared = None, 0

    def accept(self, token: int, vocab: Vocab, probs: tuple[TokenProbs, ...] = ()) -> tuple[Delta, FinishReason | None]:
        """Take the next token; return what the caller gets of it and, if it was the last, why."""
        self._first_token = self._first_token or perf_counter()
        self.tokens.append(token)
        self.n_generated += 1
        reason: FinishReason | None = None
        if vocab.ends(token) and not self.request.ignore_eos:
            text, reason = self._text.flush(), "stop"
        else:
            text = self._text.feed(vocab.named_piece(token) if token in self._shown else vocab.piece(token))
            if self._text.stopping_word:
                reason = "stop"
            elif self.constraint is not None and self.constraint.complete:
                text, reason = text + self._text.flush(), "stop"
            elif self.full:
                text, reason = text + self._text.flush(), "length"
        if self._lines is not None:
            text, over = self._lines.feed(text, perf_counter() - self._first_token)
            reason = "length" if over else reason
        if self.constraint is not None:
            self.picked = self._is_picked()
        self._new_line = self._new_line or "\n" in text
        delta = Delta(self.request.request, text, (token,), probs)
        if self._reply is not None:
            delta, reason = read_delta(self._reply, delta, reason)
        return (self._timed(delta) if self.request.timed else delta), reason

    def _is_picked(self) -> bool:
        if self._sees_all or self.constraint is None:
            return self._sees_all
        choice = self.constraint.choice
        return choice == "one" or (choice == "some" and self.chain is not None and not self.chain.revocable)

    def _timed(self, delta: Delta) -> TypedDelta:
        more = (delta.reasoning, delta.calls) if isinstance(delta, TypedDelta) else ("", ())
        return TypedDelta(
            delta.request, delta.text, delta.tokens, delta.probs, *more, self._usage, self._timings(perf_counter())
        )

    @property
    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.n_prompt, completion_tokens=self.n_generated, cached_tokens=max(self._cached, 0)
        )

    def _timings(self, now: float) -> Timings:
        started = self._started or now
        first = self._first_token or now
        return Timings(
            queue_ms=(started - self._submitted) * 1e3,
            prompt_ms=(first - started) * 1e3 if self._started else 0.0,
            predicted_ms=(now - first) * 1e3,
        )

    def gather(self, delta: Delta, *, last: bool) -> tuple[Delta, ...]:
        """Return what there is to tell now that there is this too, of an answer that is read whole: the first at once,
        so that all know that it has begun, and then as one what has come together.
        """
        self._held.append(delta)
        return self.gathered() if last or self.n_generated == 1 or len(self._held) == _MOST_HELD else ()

    def gathered(self) -> tuple[Delta, ...]:
        """Return what was held back as one, but for reasoning, whose tokens are counted: it stays apart from all else.

        Several are all typed, since a message keeps the order only among those of a kind.
        """
        held, self._held = self._held, []
        runs = [join(list(run)) for _, run in groupby(held, key=thinks)]
        return tuple(runs) if len(runs) < 2 else tuple(map(typed, runs))

    def done(self, reason: FinishReason) -> Done:
        """Return the message that ends the request."""
        usage = self._usage
        if reason == "cancelled":
            computed = max(min(self.computed, self.n_prompt), usage.cached_tokens)
            usage = replace(usage, prompt_tokens=computed)
        return Done(
            request=self.request.request,
            finish_reason=reason,
            usage=usage,
            timings=self._timings(perf_counter()),
            stopping_word=self._text.stopping_word,
            truncated=self._shifted or len(self.tokens) >= self._context,
            slot=self._ran_in,
        )

    def progress(self) -> PromptProgress | None:
        """Return how far the prompt is, if the caller wants to know and there is news since the last time."""
        if not self.request.progress or self.n_generated or self.leader is not None:
            return None
        processed = min(self.computed, self.n_prompt)
        if processed <= self._told_progress:
            return None
        self._told_progress = processed
        spent = (perf_counter() - self._started) * 1e3
        return PromptProgress(self.request.request, self.n_prompt, max(self._cached, 0), processed, spent)

    def told(self, n_ctx: int, *, busy: bool) -> SlotState:
        """Return what there is to tell of its slot."""
        request = self.request
        return SlotState(
            id=self.lane,
            n_ctx=n_ctx,
            busy=busy,
            request=request.request,
            n_tokens=self.computed,
            n_prompt=self.n_prompt,
            n_cached=max(self._cached, 0),
            n_processed=max(0, min(self.computed, self.n_prompt) - max(self._cached, 0)),
            n_decoded=self.n_generated,
            n_remaining=-1 if request.max_tokens < 0 else request.max_tokens - self.n_generated,
            new_line=self._new_line,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            n_keep=request.n_keep or 0,
            n_discard=request.n_discard,
            ignore_eos=request.ignore_eos,
        )

    def free(self) -> None:
        """Release the samplers and the media. Idempotent."""
        if self.chain is not None:
            self.chain.free()
        if self._media is not None:
            self._media.free()
