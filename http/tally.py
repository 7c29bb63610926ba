"""What is counted of a model while it answers: plain numbers on the event loop, read by whoever scrapes them."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from llamaherd.pool import Abandoned, Completion, Generation, Piece, Timings, Usage

__all__ = ["FIRST_TOKEN_BOUNDS", "TOKEN_GAP_BOUNDS", "Histogram", "Meter", "Tally"]

#: Upper bounds in seconds. A first token may have to wait for a model of many gigabytes to load.
FIRST_TOKEN_BOUNDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_GAP_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How many of the observed values are at most as large as each bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Return the bounds as Prometheus writes them, each with the count of values up to it."""
        total = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            rows.append(("+Inf" if bound == float("inf") else repr(bound), total))
        return rows


@dataclass
class Tally:
    """The figures of one model, all since the server's start.

    Attributes:
        requests: Generations by how they ended: ``stop``, ``length``, ``cancelled`` or ``failed``.
        prompt_tokens: Tokens of prompts that were computed, that is, without those found in the cache. These and the
            next are of requests that ended in order; see :meth:`with_abandoned`.
        cached_tokens: Tokens of prompts that were found in the cache.
        predicted_tokens: Tokens generated, also for requests that did not end in order.
        prompt_seconds, predicted_seconds: Time in the worker, of requests that ended in order.
        first_token: Seconds from a request's acceptance to its first token, waiting and loading included.
        token_gap: Seconds between tokens, as they come out of the pool.
        queue_wait: Seconds from a request's acceptance until a worker took it, loading included.
        restarts: Loads that followed a worker that ended with an error.
        loads, load_failures: How often the model was loaded, and could not be.
        exits: Ends of workers, by exit code (negative for a signal), None where it is not known.
    """

    requests: Counter[str] = field(default_factory=Counter[str])
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0
    prompt_seconds: float = 0.0
    predicted_seconds: float = 0.0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    queue_wait: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    restarts: int = 0
    token_gap: Histogram = field(default_factory=lambda: Histogram(TOKEN_GAP_BOUNDS))
    loads: int = 0
    load_failures: int = 0
    exits: Counter[int | None] = field(default_factory=Counter[int | None])

    def with_abandoned(self, work: Abandoned | None) -> "Tally":
        """Return the figures with what was done of requests whose clients left, which no answer tells of."""
        if work is None:
            return self
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + work.prompt_tokens,
            cached_tokens=self.cached_tokens + work.cached_tokens,
            prompt_seconds=self.prompt_seconds + work.prompt_ms / 1000,
            predicted_seconds=self.predicted_seconds + work.predicted_ms / 1000,
        )


class Meter:
    """A generation whose pieces are counted on their way. Close it, or read it to its end."""

    def __init__(self, work: Generation, tally: Tally) -> None:
        self._work = work
        self._tally = tally
        self._last = time.monotonic()
        self._predicted = 0
        self._begun = False
        self._ended = False

    @property
    def model(self) -> str:
        """The name under which the pool knows the model."""
        return self._work.model

    async def __anext__(self) -> Piece:
        """Return the next piece. A cancelled call loses nothing. Raises what the generation raises."""
        try:
            piece = await anext(self._work)
        except Exception:
            self._end("failed")
            raise
        self._count(piece)
        return piece

    def raise_end(self) -> None:
        """Do nothing while there is something to read or to come; else raise what ended it, or StopAsyncIteration."""
        try:
            self._work.raise_end()
        except Exception:
            self._end("failed")
            raise

    @property
    def ended(self) -> bool:
        """Whether the worker has nothing more to say; pieces may still wait to be read."""
        return self._work.ended

    def watch(self, on_news: Callable[[], None] | None) -> None:
        """Have something called whenever a piece or the end has come; None ends that."""
        self._work.watch(on_news)

    def next_nowait(self) -> Piece | None:
        """Return the next piece if it is there already, else None: at the end and on an error too."""
        piece = self._work.next_nowait()
        if piece is not None:
            self._count(piece)
        return piece

    async def collect(self) -> Completion:
        """Return the whole answer; a cancelled call cancels the work."""
        pieces: list[Piece] = []
        try:
            while not pieces or pieces[-1].finish_reason is None:
                pieces.append(await anext(self))
            return Completion.join(pieces)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Cancel the work if it has not ended. Idempotent."""
        self._end("cancelled")
        await self._work.aclose()

    def _count(self, piece: Piece) -> None:
        tally = self._tally
        if not self._begun:
            self._begun = True
            if self._work.waited is not None:
                tally.queue_wait.observe(self._work.waited)
        count = len(piece.tokens)
        if count:
            now = time.monotonic()
            if self._predicted:
                tally.token_gap.observe((now - self._last) / count, count)
            else:
                tally.first_token.observe(now - self._last)
            self._last = now
            self._predicted += count
            tally.predicted_tokens += count
        if piece.finish_reason is not None:
            self._count_end(piece.usage or Usage(), piece.timings or Timings())
            self._end(piece.finish_reason)

    def _count_end(self, usage: Usage, timings: Timings) -> None:
        tally = self._tally
        # Some tokens bring no piece, such as the one that ends an answer.
        tally.predicted_tokens += max(0, usage.completion_tokens - self._predicted)
        tally.prompt_tokens += usage.prompt_tokens - usage.cached_tokens
        tally.cached_tokens += usage.cached_tokens
        tally.prompt_seconds += timings.prompt_ms / 1000
        tally.predicted_seconds += timings.predicted_ms / 1000

    def _end(self, outcome: str) -> None:
        if not self._ended:
            self._ended = True
            self._tally.requests[outcome] += 1
