"""What a caller without async holds: a stream of pieces or of events, carried over from the pool's thread."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, cast

from llamaherd.pool.errors import PoolClosed
from llamaherd.pool.events import Event, Subscription
from llamaherd.pool.generation import Completion, Generation, Piece
from llamaherd.pool.loop_thread import LoopThread, receive

__all__ = ["SyncGeneration", "SyncStream", "SyncSubscription"]

T = TypeVar("T")

#: Items carried ahead of the reader. What comes after them waits at its source, which bounds its own memory.
MAX_AHEAD: Final = 64


class _End:
    """Follows the last item: the error that ended the stream, if one did."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class _Carrier(Generic[T]):
    """Takes items from their source, on the loop, and puts them where the reader waits. It does not know the reader,
    so that a forgotten reader is collected while its carrier runs.

    Attributes:
        taken: Items that the reader has taken; the reader alone writes it.
        paused: Whether the carrier waits for the reader, who then calls :meth:`resume` on the loop.
    """

    def __init__(self, source: AsyncIterator[T]) -> None:
        self.inbox: SimpleQueue[T | _End | None] = SimpleQueue()
        self.taken = 0
        self.paused = False
        self._source = source
        self._limit: float = MAX_AHEAD
        self._sent = 0
        self._resumed = asyncio.Event()

    async def run(self) -> None:
        """Carry until the source ends."""
        end = _End(PoolClosed("the pool was closed"))
        try:
            async for item in self._source:
                self.inbox.put(item)
                self._sent += 1
                if self._sent - self.taken >= self._limit:
                    await self._pause()
            end = _End()
        except Exception as error:
            end = _End(error)
        finally:
            self.inbox.put(end)

    async def _pause(self) -> None:
        self._resumed.clear()
        self.paused = True
        # Looked at again, because the reader may have taken everything before it could see the pause.
        if self._sent - self.taken >= self._limit:
            await self._resumed.wait()
        self.paused = False

    def resume(self) -> None:
        """Carry on. On the loop."""
        self._resumed.set()

    def release(self) -> None:
        """Carry the rest, however slow the reader is: the source has ended. On the loop."""
        self._limit = math.inf
        self._resumed.set()


class SyncStream(Iterator[T]):
    """An iterator over what an async source brings. It may be used from any thread, by one at a time.

    Leaving it early ends the source: by :meth:`close`, by leaving its ``with`` block, by an interrupt (^C) while it
    waits, or by dropping the last reference to it.
    """

    def __init__(self, loop: LoopThread, source: AsyncIterator[T], stop: Callable[[], object], owner: object) -> None:
        self._loop = loop
        self._carrier = _Carrier(source)
        self._stop: Callable[[], object] | None = stop
        self._owner = owner  # a pool that is dropped closes, so a stream keeps it
        self._started = False
        self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        carrier = self._carrier
        try:
            if not self._started:
                self._start()
            item = receive(carrier.inbox)
        except BaseException:
            self.close()
            raise
        if self._over or item is None or isinstance(item, _End):
            self._finish(item)
        carrier.taken += 1
        if carrier.paused and carrier.inbox.empty():
            self._loop.post(carrier.resume)
        return cast(T, item)

    def _start(self) -> None:
        self._loop.attend(self._carrier.inbox)
        self._started = True
        self._loop.post(self._spawn, self._loop, self._carrier)

    @staticmethod
    def _spawn(loop: LoopThread, carrier: _Carrier[T]) -> None:
        loop.at_end.add(carrier.release)
        loop.spawn(carrier.run()).add_done_callback(lambda _: loop.at_end.discard(carrier.release))

    def _finish(self, item: T | _End | None) -> None:
        error: Exception | None = None
        if not self._over:
            error = PoolClosed("the pool was closed") if item is None else cast(_End, item).error
            self._stop = None
        self.close()
        raise error or StopIteration

    def close(self) -> None:
        """End the stream and drop what waits unread. Idempotent, immediate, from any thread."""
        stop, self._stop = self._stop, None
        self._over = True
        self._loop.leave(self._carrier.inbox)
        if stop is not None:
            self._loop.post(stop)
            self._loop.post(self._carrier.resume)
            self._carrier.inbox.put(None)  # for a thread that waits for the next item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class SyncGeneration(SyncStream[Piece]):
    """An answer being made, for callers without async: iterate over it, or :meth:`collect` it. Otherwise as
    :class:`~llamaherd.pool.generation.Generation`.
    """

    def __init__(self, loop: LoopThread, generation: Generation, owner: object) -> None:
        super().__init__(loop, generation, generation.cancel, owner)
        self._generation = generation
        self.model = generation.model

    def __repr__(self) -> str:
        return f"<SyncGeneration of {self.model} {'ended' if self.ended else 'running'}>"

    @property
    def ended(self) -> bool:
        """Whether the worker has nothing more to say; pieces may still wait to be read."""
        return self._over or self._generation.ended

    def collect(self) -> Completion:
        """Wait for the end and return the whole answer, or the rest of it; an interrupted wait cancels the work.

        Raises:
            PoolError: what ended the request.
            concurrent.futures.CancelledError: the generation was cancelled before it ended.
        """
        try:
            if not (self._started or self._over):
                completion = self._loop.wait(self._generation.collect)
                self._stop = None
                return completion
            pieces = list(self)
        finally:
            self.close()
        if not pieces or pieces[-1].finish_reason is None:
            raise CancelledError("the generation was closed before it ended")
        return Completion.join(pieces)

    def cancel(self) -> None:
        """Stop the work and drop what waits unread. Idempotent, immediate, safe in every state."""
        self.close()


class SyncSubscription(SyncStream[Event]):
    """Events for callers without async. Otherwise as :class:`~llamaherd.pool.events.Subscription`."""

    def __init__(self, loop: LoopThread, subscription: Subscription, owner: object) -> None:
        super().__init__(loop, subscription, lambda: loop.spawn(subscription.aclose()), owner)
