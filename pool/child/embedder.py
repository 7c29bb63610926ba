"""Embeddings and scores: many inputs of many requests in each step, beside the generations.

Requests take turns, input by input, so that a small one is soon done while a large one runs. Every step fills one
physical batch, one sequence per input. Where tokens look back only, a long input goes through in chunks; an encoder
wants each input whole. While generations run, a step is kept short, as prompts are.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final, Literal, cast

import numpy as np

from llamaherd.pool.child import llama_model
from llamaherd.pool.child.adapters import Adapters
from llamaherd.pool.child.embed_context import Chunk, EmbedContext, Shape, shape_of
from llamaherd.pool.child.embed_jobs import Job, embed_job, rerank_job
from llamaherd.pool.child.engine import EngineError, RequestError
from llamaherd.pool.child.llama_backend import AbortFlag
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.pace import PrefillPace
from llamaherd.pool.child.refusal import refusal
from llamaherd.pool.child.vectors import Floats, Pooled, normalized, slices, to_bytes
from llamaherd.transport.messages import (
    ChildMessage,
    Done,
    Embed,
    EngineOptions,
    Failed,
    Rerank,
    Vector,
    Vectors,
)

__all__ = ["Embedder"]

#: Cells that a context begins with; a longer input makes it grow.
_FIRST_CELLS: Final = 2048
#: Tokens to try first beside generations, before anything was measured.
_FIRST_TOKENS: Final = 64
#: How long a step may take beside generations, and without. A prompt ends, but inputs may come by the thousands: so
#: generations keep a larger part of the time than beside a prompt.
_SHARED_SECONDS: Final = 0.05
_LONE_SECONDS: Final = 1.0
#: Most bytes of vectors in one message.
_MESSAGE_BYTES: Final = 4 * 1024 * 1024
_DONE, _NO_ROOM, _ABORTED, _BAD_BATCH = 0, 1, 2, -1


@dataclass(slots=True, eq=False)
class _Input:
    """An input on its way; ``computed`` of its tokens are done."""

    job: Job
    index: int
    tokens: "array[int]"
    slot: int
    pooled: Pooled
    computed: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(slots=True)
class _News:
    """What a step has to tell."""

    vectors: list[Vector] = field(default_factory=list[Vector])
    ends: list[ChildMessage] = field(default_factory=list[ChildMessage])

    def messages(self) -> list[ChildMessage]:
        """Return the vectors, in messages of a bounded size, and then the ends."""
        told: list[ChildMessage] = []
        group: list[Vector] = []
        size = 0
        for vector in self.vectors:
            if group and size + len(vector.data) > _MESSAGE_BYTES:
                told.append(Vectors(vectors=tuple(group)))
                group, size = [], 0
            group.append(vector)
            size += len(vector.data)
        if group:
            told.append(Vectors(vectors=tuple(group)))
        return told + self.ends


class Embedder:
    """The requests for embeddings and scores of one model. Free it before the model.

    Args:
        has_memory: Whether the model's contexts have a cache.
        adapters: The model's LoRA adapters; embeddings are computed with their default scales.
    """

    def __init__(
        self,
        model: Model,
        options: EngineOptions,
        threads: tuple[int, int],
        abort: AbortFlag,
        *,
        has_memory: bool,
        adapters: Adapters,
    ) -> None:
        self._model: Final = model
        self._options: Final = options
        self._abort: Final = abort
        self._adapters: Final = adapters
        self._threads = threads
        self._unfit: Final = _why_unfit(model, has_memory)
        self.shape: Final[Shape] = shape_of(model, options, has_memory=has_memory)
        self._pace: Final = PrefillPace(self.shape.n_ubatch, min(_FIRST_TOKENS, self.shape.n_ubatch))
        self._context: EmbedContext | None = None
        self._jobs: Final[deque[Job]] = deque()
        self._active: Final[list[_Input]] = []
        self._free_slots: Final = list(range(self.shape.n_sequences))
        self._news = _News()

    def __repr__(self) -> str:
        return f"<Embedder {self.shape.pooling} jobs={len(self._jobs)} active={len(self._active)}>"

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        return bool(self._jobs or self._active or self._news.ends)

    def knows(self, request: int) -> bool:
        """Whether a request of that number waits or runs."""
        return any(job.number == request for job in self._all_jobs())

    def prepare(self) -> None:
        """Make the context now, and compute a token. Raises EngineError."""
        if self._unfit:
            return
        context = self._make_context(min(self.shape.longest, _FIRST_CELLS))
        code = context.compute([Chunk(0, 0, array("i", [max(self._model.vocab.bos, 0)]))], outputs=True)
        context.forget(0)
        if self._abort:
            raise EngineError("loading was abandoned", code="load_abandoned")
        if code != _DONE:
            why = refusal("load_failed")
            raise EngineError(
                f"the model cannot compute a token (llama_decode returned {code}): {why.reason}", code=why.code
            )

    # --- requests ---

    def submit(self, command: Embed | Rerank) -> None:
        """Check a request and queue it. Raises RequestError."""
        if self._unfit:
            raise RequestError(f"this model cannot embed: {self._unfit}", code="unsupported_by_model")
        if isinstance(command, Embed):
            job = embed_job(command, self._model, self.shape, self._options.embd_normalize)
        else:
            job = rerank_job(command, self._model, self.shape)
        if job.left:
            self._jobs.append(job)
        else:
            self._news.ends.append(job.done())

    def cancel(self, request: int) -> None:
        """End a request now; the next step returns its ``done``. Unknown numbers are ignored."""
        for job in self._all_jobs():
            if job.number == request:
                self._drop(job, Done(request=request, finish_reason="cancelled"))
                return

    def clear(self) -> None:
        """Drop every request without a word."""
        for job in self._all_jobs():
            self._drop(job, None)
        self._news = _News()

    def set_threads(self, n: int, batch: int) -> None:
        """Use so many threads from the next step on."""
        self._threads = (n, batch)
        if self._context is not None:
            self._context.set_threads(batch)

    def free(self) -> None:
        """Release the memory. Idempotent."""
        self.clear()
        if self._context is not None:
            self._context.free()
            self._context = None

    def _all_jobs(self) -> list[Job]:
        return [*self._jobs, *{id(one.job): one.job for one in self._active if one.job not in self._jobs}.values()]

    def _drop(self, job: Job, end: ChildMessage | None) -> None:
        for one in [one for one in self._active if one.job is job]:
            self._release(one)
        if job in self._jobs:
            self._jobs.remove(job)
        if end is not None:
            self._news.ends.append(end)

    def _release(self, one: _Input) -> None:
        self._active.remove(one)
        self._free_slots.append(one.slot)
        if self._context is not None:
            self._context.forget(one.slot)

    # --- one step ---

    def step(self, *, shared: bool) -> list[ChildMessage]:
        """Compute one batch, and return what came of it. ``shared``: some request waits for its next token meanwhile.

        Raises:
            EngineError: llama.cpp cannot go on.
        """
        budget = self._budget(shared=shared)
        context = self._admit(budget)
        if context is not None and self._active:
            self._compute(context, budget)
        news, self._news = self._news, _News()
        return news.messages()

    def _budget(self, *, shared: bool) -> int:
        """Return how many tokens the next step may have."""
        if not self.shape.splittable:
            return self.shape.n_ubatch
        return self._pace.within(_SHARED_SECONDS if shared else _LONE_SECONDS)

    def _admit(self, budget: int) -> EmbedContext | None:
        """Let inputs in, one of each request in turn, until there is enough for a step."""
        rows = sum(one.pending for one in self._active)
        held = sum(len(one.tokens) for one in self._active)
        while self._jobs and self._free_slots and rows < budget:
            job = self._jobs[0]
            index, tokens = job.inputs[0]
            if self._context is None or len(tokens) > self._context.cells:
                if self._active:
                    break
                if not self._grow(job, len(tokens)):
                    continue
            assert self._context is not None
            if self._context.adapters != self._adapters.defaults:
                if self._active:
                    break  # what is half done is done with the set that it was begun with
                self._context.use(self._adapters.defaults, self._adapters)
            if held + len(tokens) > self._context.cells:
                break
            if not self.shape.splittable and rows + len(tokens) > budget:
                break
            job.inputs.popleft()
            self._jobs.rotate(-1)
            if not job.inputs:
                self._jobs.remove(job)
            how = cast(Literal["mean", "cls", "last", "rank"], self.shape.pooling)
            self._active.append(_Input(job, index, tokens, self._free_slots.pop(), Pooled(how)))
            rows += len(tokens)
            held += len(tokens)
        return self._context

    def _grow(self, job: Job, tokens: int) -> bool:
        """Make a context for an input of so many tokens; a failure is the request's."""
        cells = min(self.shape.longest, _FIRST_CELLS)
        while cells < tokens:
            cells = min(2 * cells, self.shape.longest)
        try:
            self._make_context(cells)
        except EngineError as error:
            failure = Failed(request=job.number, message=str(error), fault="worker", code=error.code, retry=error.retry)
            self._drop(job, failure)
            return False
        return True

    def _make_context(self, cells: int) -> EmbedContext:
        if self._context is not None:
            self._context.free()
            self._context = None
        self._context = EmbedContext(self._model, self._options, self.shape, cells, self._threads, self._abort)
        return self._context

    def _compute(self, context: EmbedContext, budget: int) -> None:
        pending = sum(one.pending for one in self._active)
        if not self.shape.last_only or pending <= min(self.shape.n_outputs, budget):
            self._run(context, _chunks(self._active, budget, keep=0), outputs=True)
            return
        # Only the last tokens need outputs: whatever is before them goes through without, as a prompt does.
        self._run(context, _chunks(self._active, budget, keep=1), outputs=False)
        ready = [one for one in self._active if one.pending == 1]
        if ready:
            self._run(context, _chunks(ready, budget, keep=0), outputs=True)

    def _run(self, context: EmbedContext, parts: list[tuple[_Input, Chunk]], *, outputs: bool) -> None:
        if not parts:
            return
        rows = sum(len(chunk.tokens) for _, chunk in parts)
        started = perf_counter()
        code = context.compute([chunk for _, chunk in parts], outputs=outputs)
        if code == _ABORTED:
            return  # the engine is at its end; whatever was half done stays so
        if code != _DONE:
            self._give_up(parts, code)
            return
        self._pace.note(rows, perf_counter() - started)
        first = 0
        matrix = context.rows() if outputs and self.shape.pooling == "none" else None
        for one, chunk in parts:
            count = len(chunk.tokens)
            one.computed += count
            if outputs and one in self._active:
                value = context.pooled(one.slot) if matrix is None else matrix[first : first + count]
                self._take(one, chunk.start, value, count)
            first += count

    def _take(self, one: _Input, start: int, value: Floats | None, count: int) -> None:
        """Take what a chunk of an input became; end the input with its last token, and the request with its last
        input.
        """
        job = one.job
        if value is None or not np.isfinite(value).all():
            self._drop(job, _not_numbers(job.number, missing=value is None))
            return
        if self.shape.pooling == "none":
            kept = value[:, : job.dimensions] if job.dimensions else value
            self._news.vectors += [
                Vector(job.number, one.index, start + row, len(rows), to_bytes(rows))
                for row, rows in slices(kept, _MESSAGE_BYTES)
            ]
        else:
            one.pooled.add(value, count)
        if one.pending:
            return
        if self.shape.pooling != "none":
            vector = one.pooled.value
            if self.shape.pooling != "rank":
                vector = normalized(vector[: job.dimensions] if job.dimensions else vector, job.normalize)
            self._news.vectors.append(Vector(job.number, one.index, 0, 1, to_bytes(vector)))
        self._release(one)
        job.left -= 1
        if not job.left:
            self._news.ends.append(job.done())

    def _give_up(self, parts: Sequence[tuple[_Input, Chunk]], code: int) -> None:
        """Fail the requests of a batch that cannot be computed. Raises EngineError for a broken backend."""
        why = refusal("decode_failed")
        text = f"the embeddings cannot be computed (llama_decode returned {code}): {why.reason}"
        if code not in (_BAD_BATCH, _NO_ROOM):
            raise EngineError(text, code=why.code, retry=True)
        for job in {id(one.job): one.job for one, _ in parts}.values():
            failure = Failed(request=job.number, message=text, fault="worker", retry=True, code="decode_failed")
            self._drop(job, failure)


def _chunks(active: Sequence[_Input], budget: int, *, keep: int) -> list[tuple[_Input, Chunk]]:
    """Return the next tokens of inputs, at most ``budget`` in all, leaving the last ``keep`` of each."""
    parts: list[tuple[_Input, Chunk]] = []
    for one in active:
        count = min(one.pending - keep, budget)
        if count > 0:
            tokens = one.tokens[one.computed : one.computed + count]
            parts.append((one, Chunk(one.slot, one.computed, tokens)))
            budget -= count
    return parts


def _why_unfit(model: Model, has_memory: bool) -> str:
    if model.vocab.size == 0:
        return "it has no vocabulary"
    if has_memory and llama_model.has_encoder(model.handle):
        return "it is an encoder and a decoder in one (a translation model)"
    return ""


def _not_numbers(request: int, *, missing: bool) -> Failed:
    what = "llama.cpp has no embedding for it" if missing else "its embeddings are not numbers (NaN)"
    return Failed(
        request=request,
        message=f"{what}: the model's weights are damaged, or it is not made for this pooling",
        fault="model",
        code="bad_embeddings",
    )
