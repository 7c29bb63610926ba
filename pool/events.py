"""What the pool tells anyone who listens: a snapshot first, then every change, numbered."""

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Self

import msgspec

__all__ = ["Event", "EventLog", "Subscription"]

#: Unread events of one subscriber after which it is given a fresh snapshot instead of the backlog; also how many past
#: events are kept for those who come back.
MAX_BACKLOG: Final = 1024


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One change, in the words of the reference's ``/models/sse``.

    Attributes:
        seq: Increases by one per change of the pool; a snapshot carries the number of the last change that it includes.
        model: The model's name, or ``*``.
        event: ``snapshot``, ``model_status`` (a spawn), ``status_change``, ``models_reload`` and so on.
        data: For the status events ``status`` and, where known, ``progress``, ``info`` or ``exit_code``;
            for ``snapshot`` the key ``models`` with one status object per model.
    """

    seq: int
    model: str
    event: str
    data: dict[str, Any] = {}


class Subscription(AsyncIterator[Event]):
    """One listener's view. Iterate; close it with :meth:`aclose` or by ``async with``. Ends when the pool closes.

    Memory is bounded: who falls more than 1,024 events behind is given a new ``snapshot`` in their place.
    """

    def __init__(self, log: "EventLog", missed: Sequence[Event] | None = None) -> None:
        self._log = log
        self._backlog: deque[Event] = deque(missed or ())
        self._stale = missed is None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def push(self, event: Event) -> None:
        """Add an event. Called by the log."""
        if self._stale:
            return  # the snapshot that will be taken on the next read includes it
        if len(self._backlog) >= MAX_BACKLOG:
            self._backlog.clear()
            self._stale = True
        else:
            self._backlog.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            if self._closed:
                raise StopAsyncIteration
            if self._stale:
                self._stale = False
                return self._log.snapshot()
            if self._backlog:
                return self._backlog.popleft()
            if self._log.closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def wake_to_end(self) -> None:
        """Let a waiting reader see that the log has closed. Called by the log."""
        self._wake()

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        self._closed = True
        self._log.drop(self)
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class EventLog:
    """Numbers events and hands them to the subscribers.

    Args:
        snapshot: Returns the data of a snapshot event, taken at the moment of the call.
    """

    def __init__(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        self._take_snapshot = snapshot
        self._seq = 0
        # Weak: a listener that is dropped without being closed must not cost for ever.
        self._subscribers: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._past: deque[Event] = deque(maxlen=MAX_BACKLOG)
        self.closed = False

    def emit(self, model: str, event: str, data: dict[str, Any]) -> None:
        """Publish one change."""
        self._seq += 1
        published = Event(seq=self._seq, model=model, event=event, data=data)
        self._past.append(published)
        for subscriber in self._subscribers:
            subscriber.push(published)

    def snapshot(self) -> Event:
        """Return the present as an event."""
        return Event(seq=self._seq, model="*", event="snapshot", data=self._take_snapshot())

    def subscribe(self, since: int | None = None) -> Subscription:
        """Return a new listener, whose first event is a snapshot.

        Args:
            since: The number of the last event that it knows. As long as all that came after it is kept, its first
                events are those, and there is no snapshot.
        """
        subscription = Subscription(self, None if since is None else self._since(since))
        self._subscribers.add(subscription)
        return subscription

    def _since(self, seq: int) -> list[Event] | None:
        """Return the events after one; None if they are not all kept, or the number is none of this log's."""
        oldest = self._past[0].seq if self._past else self._seq + 1
        return [event for event in self._past if event.seq > seq] if oldest - 1 <= seq <= self._seq else None

    def drop(self, subscription: Subscription) -> None:
        """Forget a listener."""
        self._subscribers.discard(subscription)

    def close(self) -> None:
        """End every listener once it has read its backlog."""
        self.closed = True
        for subscriber in self._subscribers:
            subscriber.wake_to_end()
