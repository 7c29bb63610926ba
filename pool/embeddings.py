"""Embeddings and scores: what callers get, and how a large batch of inputs becomes commands of bounded size."""

import asyncio
import itertools
import sys
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import msgspec

from llamaherd.pool.errors import BadRequest, PoolError, WorkerFailed
from llamaherd.pool.machine import available_memory
from llamaherd.transport.messages import Delta, Done, Prompt, PromptProgress, Result, Usage, Vector

__all__ = [
    "Embedding",
    "Embeddings",
    "Ranking",
    "RowLimit",
    "Vectorial",
    "batches",
    "first_float",
    "joined",
    "pipelined",
    "size_of",
]

#: Most inputs, and about as many characters or token ids, in one command: a worker reads commands while it generates.
BATCH_INPUTS: Final = 64
BATCH_SIZE: Final = 256 * 1024
#: Commands of one call that are under way together: one that computes, and one that waits to follow it.
IN_FLIGHT: Final = 2
_FLOAT_BYTES: Final = 4
#: Of the memory that is free, the vectors of one call's tokens may take so much: as numbers and as JSON they take more
#: than ten times as much once again. And what they may take where nobody knows what is free.
ROWS_SHARE: Final = 1 / 16
_ROWS_BYTES: Final = 1024 * 1024 * 1024

T = TypeVar("T")
R = TypeVar("R")


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """What one input became.

    Attributes:
        data: 32-bit floats, little-endian, row by row; ``numpy.frombuffer(data, "<f4")`` reads them without a copy.
        rows: 1; with pooling ``none``, the number of the input's tokens.
    """

    data: bytes
    rows: int = 1

    def __len__(self) -> int:
        return len(self.data) // _FLOAT_BYTES // max(1, self.rows)

    @property
    def values(self) -> list[float]:
        """The numbers; with several rows, one row after the other."""
        return _floats(self.data)

    @property
    def vectors(self) -> list[list[float]]:
        """The rows, each a list of numbers."""
        values, width = self.values, len(self)
        return [values[start : start + width] for start in range(0, len(values), width)]


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of ``Pool.embed`` gives: one embedding per input, in their order.

    Attributes:
        usage: ``prompt_tokens`` of all inputs together.
    """

    model: str
    items: tuple[Embedding, ...]
    usage: Usage

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Embedding:
        return self.items[index]

    def __iter__(self) -> Iterator[Embedding]:
        return iter(self.items)


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of ``Pool.rerank`` gives.

    Attributes:
        scores: How well each document answers the query, in the order of the documents; higher is better. Their scale
            is the model's.
        usage: ``prompt_tokens`` of all pairs together.
    """

    model: str
    scores: tuple[float, ...]
    usage: Usage

    @property
    def order(self) -> list[int]:
        """The places of the documents, best first; equals keep their order."""
        return sorted(range(len(self.scores)), key=lambda index: -self.scores[index])


class RowLimit:
    """What the vectors of single tokens may take in one call. An input has one for each of its tokens without pooling,
    which a body of some megabytes makes into more than a machine has.
    """

    def __init__(self) -> None:
        self._limit = -1
        self._taken = 0

    def take(self, part: Vector) -> None:
        """Count a part of an input. Raises BadRequest beyond the limit."""
        if part.rows == 1 and part.row == 0:
            return  # of an input it is all, or at least not much
        if self._limit < 0:
            free = available_memory()
            self._limit = _ROWS_BYTES if free is None else int(free * ROWS_SHARE)
        self._taken += len(part.data)
        if self._taken > self._limit:
            raise BadRequest(
                f"the embeddings of all tokens (pooling none) take more than {self._limit} bytes, which is what one "
                "request may have of the free memory: send fewer or shorter inputs, or set the option pooling "
                "(--pooling) to mean, cls or last",
                code="too_large",
            )


class Vectorial:
    """Resolves a future with the vectors of a request: ``(data, rows)`` of each input, and the tokens computed.

    Parts are kept by their place, so that a second worker may say again what a first one has said before it died.
    """

    def __init__(self, future: "asyncio.Future[tuple[list[Embedding], Usage]]", inputs: int, limit: RowLimit) -> None:
        self._future = future
        self._limit = limit
        self._parts: list[dict[int, Vector]] = [{} for _ in range(inputs)]

    def feed(self, part: Delta | Vector | PromptProgress) -> None:
        if self._future.done() or not isinstance(part, Vector) or not 0 <= part.input < len(self._parts):
            return
        known = self._parts[part.input]
        if part.row not in known:
            try:
                self._limit.take(part)
            except BadRequest as error:
                self._parts.clear()
                self._future.set_exception(error)
                return
        known[part.row] = part

    def finish(self, end: Done | Result | None) -> None:
        if self._future.done():
            return
        if not isinstance(end, Result) or end.usage is None or not all(self._parts):
            self._future.set_exception(WorkerFailed("the worker's answer lacks vectors", code="protocol"))
            return
        self._future.set_result(([_whole(parts) for parts in self._parts], end.usage))

    def fail(self, error: PoolError) -> None:
        if not self._future.done():
            self._future.set_exception(error)


def batches(inputs: Sequence[T], size_of: Callable[[T], int]) -> Iterator[tuple[T, ...]]:
    """Split inputs into batches that one command may carry."""
    batch: list[T] = []
    size = 0
    for one in inputs:
        own = size_of(one)
        if batch and (len(batch) == BATCH_INPUTS or size + own > BATCH_SIZE):
            yield tuple(batch)
            batch, size = [], 0
        batch.append(one)
        size += own
    if batch:
        yield tuple(batch)


async def pipelined(items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """Return the results of work on each item in order, a few under way together; one that fails cancels the rest."""
    results: list[R] = []
    waiting: deque[asyncio.Task[R]] = deque()

    async def run(item: T) -> R:
        return await work(item)

    try:
        for item in items:
            if len(waiting) == IN_FLIGHT:
                results.append(await waiting[0])
                waiting.popleft()
            waiting.append(asyncio.create_task(run(item)))
        while waiting:
            results.append(await waiting[0])
            waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return results


def joined(parts: Sequence[tuple[list[Embedding], Usage]]) -> tuple[tuple[Embedding, ...], Usage]:
    """Return the embeddings of all batches in one, and their tokens."""
    items = tuple(itertools.chain.from_iterable(items for items, _ in parts))
    return items, Usage(prompt_tokens=sum(usage.prompt_tokens for _, usage in parts))


def size_of(prompt: Prompt) -> int:
    """Return about how much of a command a prompt takes."""
    return len(prompt) if isinstance(prompt, str) else sum(len(p) if isinstance(p, str) else 1 for p in prompt)


def first_float(item: Embedding) -> float:
    """Return the first number of a row."""
    return _floats(item.data[:_FLOAT_BYTES])[0]


def _whole(parts: dict[int, Vector]) -> Embedding:
    if len(parts) == 1:
        (part,) = parts.values()
        return Embedding(data=part.data, rows=part.rows)
    ordered = [parts[row] for row in sorted(parts)]
    return Embedding(data=b"".join(part.data for part in ordered), rows=sum(part.rows for part in ordered))


def _floats(data: bytes) -> list[float]:
    numbers = array("f", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
