"""The way of an answer to its client: whole, or in the frames of a stream.

A stream's first part goes the usual way, through every layer of the application. After it, frames are pushed: one
callback of the loop serves all streams that a step has fed, and writes to their connections. That is half the price of
waking a task for each token. Where a client lags, its stream goes back to waiting.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, Summary
from llamaherd.http.choices import Choices, collect_all
from llamaherd.http.connection import DirectWrite, while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.schema import GenerateBody
from llamaherd.http.sse import EventStream, FrameSource
from llamaherd.http.tally import Meter
from llamaherd.http.turn import Turn
from llamaherd.pool import Generation, Piece, WorkerFailed

__all__ = ["Chunks", "respond"]

#: Longest interval between comments that is set, in seconds: more is none, and a number may have any length.
_LONGEST_PING: Final = 86_400


async def respond(
    front: Front, request: Request, body: GenerateBody, works: Sequence[Generation], answer: Answer
) -> Response:
    """Return the response that carries generations to their client; a client that leaves cancels them."""
    meters = [front.meter(work) for work in works]
    answer.per_prompt = body.choices
    if body.stream:
        wish = body.sse_ping_interval
        ping = front.stream_ping if wish is None else float(min(wish, _LONGEST_PING)) if wish > 0 else None
        return EventStream(
            Chunks(meters, answer, front.turn, include_usage=body.include_usage),
            ping=ping,
            on_error=answer.error_frame,
        )
    completions = await while_connected(request.receive, collect_all(meters))
    if any(completion.finish_reason == "cancelled" for completion in completions):
        raise _cancelled()
    return json_response(answer.whole(completions))


class Chunks(FrameSource):
    """Generations as frames. A cancelled ``anext`` loses nothing.

    Args:
        turn: When frames are pushed: together with those of all other streams that a step has fed.
    """

    def __init__(self, meters: Sequence[Meter], answer: Answer, turn: Turn, *, include_usage: bool) -> None:
        self._choices = Choices(meters, self._on_news)
        self._answer = answer
        self._turn = turn
        self._include_usage = include_usage
        self._opened = 0
        self._ends: dict[int, Piece] = {}
        self._count = len(meters)
        self._cancelled = False
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._write: DirectWrite | None = None
        self._kept = b""

    async def __anext__(self) -> bytes:
        while True:
            frames, self._kept = self._kept or self._ready(), b""
            if frames:
                return frames
            if self._cancelled:
                raise _cancelled()
            self._choices.raise_end()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def push(self, write: DirectWrite) -> None:
        self._write = write

    def flush(self) -> None:
        """Push what has come, or have ``anext`` see to it. Called by the turn."""
        waiter = self._waiter
        if waiter is None or waiter.done() or self._write is None:
            return  # anext comes for it, and what it has taken already must go out first
        try:
            frames = self._ready()
            written = not frames or self._write(frames)
        except Exception as error:
            waiter.set_exception(error)
            return
        if not written:
            self._kept = frames
        if not written or self._cancelled or self._choices.ended:
            waiter.set_result(None)

    def _on_news(self) -> None:
        if self._write is not None:
            self._turn.add(self)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _ready(self) -> bytes:
        """Return all that has come as one write: a client that lags costs fewer of them, not more."""
        frames = b""
        for index, piece in self._choices.take():
            frames += self._frames(index, piece)
        return frames

    def _frames(self, index: int, piece: Piece) -> bytes:
        if piece.finish_reason == "cancelled":
            self._cancelled = True
            return b""
        if index < self._opened and piece.finish_reason is None:
            return self._answer.frames(index, piece)
        chunks: list[dict[str, Any]] = []
        # OpenAI's client makes a list of the choices, and cannot take a later one before an earlier one.
        for choice in range(self._opened, index + 1):
            chunks.extend(self._answer.opening(choice))
        self._opened = max(self._opened, index + 1)
        if piece.finish_reason is None:
            return b"".join(map(self._answer.frame, chunks)) + self._answer.frames(index, piece)
        self._ends[index] = piece
        summary = None
        if len(self._ends) == self._count:
            ends = [self._ends[number] for number in range(self._count)]
            summary = Summary.of(ends, per_prompt=self._answer.per_prompt, wanted=self._include_usage)
        chunks.extend(self._answer.closing(index, piece, summary))
        return b"".join(map(self._answer.frame, chunks)) + (self._answer.ending if summary is not None else b"")

    async def aclose(self) -> None:
        await self._choices.aclose()


def _cancelled() -> WorkerFailed:
    # This client did not cancel, or it would not read this. "stop" would pass half an answer off as a whole one.
    return WorkerFailed("the generation was cancelled before its end", code="cancelled", retry=True)
