"""One request in flight, as its caller sees it: a stream of pieces with a known end."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from llamaherd.transport.deltas import join, join_calls, thinks
from llamaherd.transport.messages import (
    CallDelta,
    Delta,
    Done,
    FinishReason,
    PromptProgress,
    Timings,
    TokenProbs,
    TypedDelta,
    Usage,
)

__all__ = ["Completion", "Generation", "Piece", "ToolCall"]

#: Pieces that may wait unread before further ones are merged into the last; a slow reader costs text, not objects.
MAX_WAITING_PIECES = 64
#: Further ones that wait to be merged; more at a time cost memory, fewer cost time.
MAX_SURPLUS = 1024


# gc=False: one is made per token, and none can be part of a cycle, so the collector need not look at them.
class Piece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A part of an answer.

    Attributes:
        text: New text, complete UTF-8 characters only; empty on the last piece.
        reasoning: New text of the model's reasoning, which comes before ``text``; of chats only.
        calls: What tool calls gained, which comes after ``text``; of chats with ``tools`` only.
        tokens: Ids of the tokens behind it.
        probs: How likely each token was, and the likeliest ones; only if ``n_probs`` asked for them.
        finish_reason: Set on the last piece only: ``stop``, ``length``, ``tool_calls`` or ``cancelled``.
        usage: Token counts, on the last piece only, unless ``timings_per_token`` asked for them.
        timings: Milliseconds inside the worker, likewise.
        stopping_word: The stop text that ended the generation, if one did.
        truncated: On the last piece: the context was full, so the answer ended there, or a part of it was dropped.
        slot: On the last piece: where it ran; -1 if it never did.
        reasoning_tokens: On the last piece: tokens that brought reasoning and no text.
        progress: How far the prompt is, where that was asked for; such a piece has nothing else.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    tokens: tuple[int, ...] = ()
    probs: tuple[TokenProbs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    stopping_word: str = ""
    truncated: bool = False
    slot: int = -1
    reasoning_tokens: int = 0
    progress: PromptProgress | None = None


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model wants to be called.

    Attributes:
        id: What the function's answer refers to.
        name: The function's.
        arguments: JSON, as the model wrote it; it breaks off where the answer ended early (``length``).
    """

    id: str
    name: str
    arguments: str

    @classmethod
    def join(cls, deltas: Sequence[CallDelta]) -> "tuple[Self, ...]":
        """Return the calls that all deltas of an answer make."""
        if not deltas:
            return ()
        return tuple(cls(id=one.id, name=one.name, arguments=one.arguments) for one in join_calls(deltas))


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer: what :meth:`Generation.collect` returns. Fields as in :class:`Piece`, and ``tool_calls``."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    stopping_word: str = ""
    probs: tuple[TokenProbs, ...] = ()
    truncated: bool = False
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    slot: int = -1
    reasoning_tokens: int = 0

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Self:
        """Return the answer that all pieces of a generation make. Raises ValueError if the last one is missing."""
        last = pieces[-1] if pieces else Piece()
        if last.finish_reason is None:
            raise ValueError("the last piece of the generation is missing")
        return cls(
            text="".join([piece.text for piece in pieces]),
            tokens=tuple([token for piece in pieces for token in piece.tokens]),
            finish_reason=last.finish_reason,
            usage=last.usage or Usage(),
            timings=last.timings or Timings(),
            stopping_word=last.stopping_word,
            probs=tuple([prob for piece in pieces for prob in piece.probs]),
            truncated=last.truncated,
            slot=last.slot,
            reasoning_tokens=last.reasoning_tokens,
            reasoning="".join([piece.reasoning for piece in pieces]),
            tool_calls=ToolCall.join([delta for piece in pieces for delta in piece.calls]),
        )


class Generation(AsyncIterator[Piece]):
    """An answer being made: iterate over it, or ``await`` :meth:`collect`.

    It starts on creation, waits in the pool's queue if it must, and ends with a piece whose ``finish_reason`` is set.
    Leaving it early cancels the work: by :meth:`aclose`, by leaving its ``async with`` block, or by dropping the last
        reference to it.

    One task may iterate. Iteration raises the :class:`~llamaherd.pool.errors.PoolError` that ended the request, once.

    Attributes:
        model: The name of the model that answers.
        request: The number by which ``ModelStatus.waiting`` shows it while it waits.
        waited: Seconds from its start until a worker took it, a load included; None until then.
    """

    __slots__ = (
        "__weakref__",
        "_ended",
        "_error",
        "_loop",
        "_on_cancel",
        "_on_news",
        "_pieces",
        "_reasoned",
        "_surplus",
        "_waiter",
        "model",
        "request",
        "waited",
    )

    def __init__(self, model: str, on_cancel: Callable[[], None], request: int = 0) -> None:
        self._on_cancel: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._on_cancel = on_cancel
        self.model = model
        self.waited: float | None = None
        self.request = request
        self._pieces: deque[Piece] = deque()
        self._surplus: list[Delta] = []
        self._error: Exception | None = None
        self._ended = False
        self._reasoned = 0
        self._waiter: asyncio.Future[None] | None = None
        self._on_news: Callable[[], None] | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else "running"
        return f"<Generation of {self.model} {state}, {len(self._pieces)} pieces waiting>"

    # --- the pool's side ---

    def feed(self, delta: Delta) -> None:
        """Add what one decode step brought. Called by the pool."""
        if self._ended:
            return
        if type(delta) is not Delta and thinks(delta):
            self._reasoned += len(delta.tokens)
        pieces = self._pieces
        # What follows a surplus belongs behind it, however much was read meanwhile.
        if self._surplus or len(pieces) >= MAX_WAITING_PIECES:
            self._surplus.append(delta)
            if len(self._surplus) >= MAX_SURPLUS:
                self._surplus = [join(self._surplus)]
        else:
            pieces.append(_piece(delta))
        if self._on_news is not None:
            self._on_news()
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def feed_progress(self, progress: PromptProgress) -> None:
        """Add how far the prompt is; a reader that is behind gets the newest only. Called by the pool."""
        if self._ended:
            return
        if self._pieces and self._pieces[-1].progress is not None:
            self._pieces.pop()
        if len(self._pieces) < MAX_WAITING_PIECES:
            self._pieces.append(Piece(progress=progress))
            self._wake()

    def _merge_surplus(self) -> None:
        """Make one piece of all that came while the reader was too slow."""
        if self._surplus:
            self._pieces.append(_piece(join(self._surplus)))
            self._surplus.clear()

    def finish(self, done: Done) -> None:
        """End in order. Called by the pool."""
        if self._ended:
            return
        self._merge_surplus()
        self._pieces.append(
            Piece(
                finish_reason=done.finish_reason,
                usage=done.usage,
                timings=done.timings,
                stopping_word=done.stopping_word,
                truncated=done.truncated,
                slot=done.slot,
                reasoning_tokens=self._reasoned,
            )
        )
        self._end()

    def fail(self, error: Exception) -> None:
        """End with an error, raised after the pieces that came before it. Called by the pool."""
        if self._ended:
            return
        self._merge_surplus()
        self._error = error
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._on_cancel = None
        self._wake()

    def _wake(self) -> None:
        if self._on_news is not None:
            self._on_news()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- the caller's side ---

    @property
    def ended(self) -> bool:
        """Whether the worker has nothing more to say; pieces may still wait to be read."""
        return self._ended

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        pieces = self._pieces
        if self._surplus and len(pieces) <= 1:
            self._merge_surplus()
        while not pieces:
            if self._ended:
                self.raise_end()
            # Not the running loop's, which is the same: asking for that costs a system call.
            waiter = self._waiter = self._loop.create_future()
            await waiter
        return pieces.popleft()

    def next_nowait(self) -> Piece | None:
        """Return the next piece if it is there already, else None: at the end and on an error too."""
        if self._surplus and len(self._pieces) <= 1:
            self._merge_surplus()
        return self._pieces.popleft() if self._pieces else None

    def raise_end(self) -> None:
        """Do nothing while there is something to read or to come; else raise what iteration would: the error that ended
        the request, once, or StopAsyncIteration.
        """
        if self._ended and not self._pieces and not self._surplus:
            error, self._error = self._error, None
            raise StopAsyncIteration if error is None else error

    def watch(self, on_news: Callable[[], None] | None) -> None:
        """Have something called, on the loop, whenever a piece or the end has come: for readers of many generations,
        who then take what there is by :meth:`next_nowait`. One reader may watch; None ends that. It must not raise.
        """
        self._on_news = on_news

    async def collect(self) -> Completion:
        """Wait for the end and return the whole answer; a cancelled wait cancels the work."""
        async with self:
            pieces: list[Piece] = []
            async for first in self:
                piece: Piece | None = first
                while piece is not None:  # what came with it needs no further turn
                    pieces.append(piece)
                    piece = self.next_nowait()
        if not pieces or pieces[-1].finish_reason is None:
            raise asyncio.CancelledError("the generation was closed before it ended")
        return Completion.join(pieces)

    def cancel(self) -> None:
        """Stop the work and drop what waits unread. Idempotent, immediate, safe in every state."""
        on_cancel, self._on_cancel = self._on_cancel, None
        if on_cancel is not None:
            self._ended = True
            self._pieces.clear()
            self._surplus.clear()
            self._wake()
            on_cancel()

    async def aclose(self) -> None:
        """As :meth:`cancel`, under the name that async streams use."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # A caller that breaks out of its loop and forgets the stream must not leave a slot busy. The collector may run
        # this in any thread and in the middle of anything, so the work is only handed to the loop.
        if self._on_cancel is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the pool with it
                self._loop.call_soon_threadsafe(self._on_cancel)


def _piece(delta: Delta) -> Piece:
    if type(delta) is not Delta and isinstance(delta, TypedDelta):
        return Piece(
            text=delta.text,
            reasoning=delta.reasoning,
            calls=delta.calls,
            tokens=delta.tokens,
            probs=delta.probs,
            usage=delta.usage,
            timings=delta.timings,
        )
    return Piece(text=delta.text, tokens=delta.tokens, probs=delta.probs)
