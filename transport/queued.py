"""What the pool's ends of all transports share: an inbox, senders that take turns, and final endings.

``QueuedChannel`` answers the asyncio half of the Channel contract; a transport adds how bytes move.
"""

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from llamaherd.transport.channel import Channel
from llamaherd.transport.errors import ChannelClosed, ChannelError, ChannelFull
from llamaherd.transport.framing import encode_checked
from llamaherd.transport.messages import ChildMessage, PoolMessage
from llamaherd.transport.traffic import Traffic

__all__ = ["FLUSH_SECONDS", "Inbox", "QueuedChannel"]

#: How long ``aclose`` waits for the peer to take what is queued.
FLUSH_SECONDS: Final = 1.0


def fresh(error: ChannelError) -> ChannelError:
    """Return a copy to raise, since one instance raised again and again would collect tracebacks."""
    return type(error)(*error.args)


class Inbox:
    """Messages that arrived and the ending that follows them. Belongs to one loop.

    Attributes:
        size: Bytes that the waiting messages took on the wire.
        taken: The same of all messages that were handed out.
        ending: What :meth:`take` raises after the last message; the first one stays.
        traffic: What the channel has carried.
    """

    # Of many workers each has objects of its own, which are cold when it speaks: with slots they take fewer lines of
    # the processor's caches.
    __slots__ = ("_loop", "_messages", "_on_end", "_waiter", "ending", "on_messages", "size", "taken", "traffic")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: list[ChildMessage] = []
        self._waiter: asyncio.Future[None] | None = None
        self.size = 0
        self.taken = 0
        self.ending: ChannelError | None = None
        self.traffic = Traffic()
        #: Who is called with what arrives; None while it waits to be taken.
        self.on_messages: Callable[[Sequence[ChildMessage]], None] | None = None
        self._on_end: Callable[[ChannelError], None] | None = None

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, messages: Sequence[ChildMessage], size: int) -> None:
        traffic = self.traffic
        traffic.received += len(messages)
        traffic.received_bytes += size
        if self.on_messages is not None:
            self.taken += size
            self.on_messages(messages)
            return
        self._messages += messages
        self.size += size
        self._wake()

    def end(self, error: ChannelError) -> None:
        if self.ending is None:
            self.ending = error
            self._wake()
            if self._on_end is not None:
                self._on_end(fresh(error))

    def deliver(
        self, on_messages: Callable[[Sequence[ChildMessage]], None], on_end: Callable[[ChannelError], None]
    ) -> None:
        """Call instead of keeping; see :meth:`Channel.deliver`."""
        if self.on_messages is not None or self._waiter is not None:
            raise RuntimeError("another one takes the messages of this channel")
        self.on_messages = on_messages
        messages, self._messages = self._messages, []
        self.taken += self.size
        self.size = 0
        if messages:
            on_messages(messages)
        if self.ending is not None:
            on_end(fresh(self.ending))
        else:
            self._on_end = on_end

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[ChildMessage]:
        """Return everything that waits, at least one message. Nothing is lost if the call is cancelled."""
        while not self._messages:
            if self.on_messages is not None:
                raise RuntimeError("the messages of this channel are delivered to another one")
            if self.ending is not None:
                raise fresh(self.ending)
            if self._waiter is not None:
                raise RuntimeError("another task is in receive() on this channel")
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        messages, self._messages = self._messages, []
        self.taken += self.size
        self.size = 0
        return messages


class _Turns:
    """Senders waiting for room, first come first served."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: deque[asyncio.Future[None]]) -> None:
        self._loop = loop
        self._queue = queue

    def wake_first(self) -> None:
        if self._queue and not self._queue[0].done():
            self._queue[0].set_result(None)

    def wake_all(self) -> None:
        for waiter in self._queue:
            if not waiter.done():
                waiter.set_result(None)

    @asynccontextmanager
    async def mine(self) -> AsyncGenerator[None]:
        """Wait to be the one who is woken; the place in the queue is kept until the block ends."""
        waiter = self._loop.create_future()
        self._queue.append(waiter)
        try:
            await waiter
            yield
        finally:
            self._queue.remove(waiter)


class QueuedChannel(Channel):
    """Base of the pool's ends. Subclasses call :meth:`_room_made`, :meth:`_end_sending` and ``self._inbox``."""

    __slots__ = ("_flush_waiter", "_inbox", "_loop", "_queueing", "_released", "_send_ending", "_turns")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._inbox = Inbox(loop)
        self._queueing: deque[asyncio.Future[None]] = deque()  # senders that wait for room
        self._turns = _Turns(loop, self._queueing)
        self._send_ending: ChannelError | None = None
        self._flush_waiter: asyncio.Future[None] | None = None
        self._released = False

    @abstractmethod
    def _has_room(self) -> bool:
        """Whether another message may be queued, which is so until ``SEND_LIMIT`` bytes are unsent."""

    @abstractmethod
    def _put(self, kind: str, body: bytes) -> None:
        """Queue or send one message."""

    @abstractmethod
    def _unsent_bytes(self) -> int:
        """Bytes that were queued and that the system has not taken."""

    @abstractmethod
    def _stop_receiving(self) -> None:
        """Take nothing more from the system. Idempotent."""

    @abstractmethod
    def _resume_receiving(self) -> None:
        """The messages that had arrived were taken: go on if that was waited for. Idempotent."""

    @abstractmethod
    def _release(self) -> None:
        """Give everything back to the system; called once."""

    @property
    def traffic(self) -> Traffic:
        return self._inbox.traffic

    def _post(self, kind: str, body: bytes) -> None:
        traffic = self._inbox.traffic
        traffic.sent += 1
        traffic.sent_bytes += len(body)
        self._put(kind, body)

    def send_nowait(self, message: PoolMessage) -> None:
        kind, body = encode_checked(message)
        if self._send_ending is not None:
            raise fresh(self._send_ending)
        if self._queueing or not self._has_room():
            raise ChannelFull(f"the worker does not read: {self._unsent_bytes()} bytes are unsent")
        self._post(kind, body)

    async def send(self, message: PoolMessage) -> None:
        kind, body = encode_checked(message)
        if self._send_ending is not None:
            raise fresh(self._send_ending)
        if not self._queueing and self._has_room():
            self._post(kind, body)
            return
        try:
            async with self._turns.mine():
                if self._send_ending is not None:
                    raise fresh(self._send_ending)
                self._post(kind, body)
        finally:
            # Also when this caller was cancelled after it was woken: the room is the next one's then.
            if self._has_room():
                self._turns.wake_first()

    async def receive(self) -> Sequence[ChildMessage]:
        return await self._inbox.take()

    def deliver(
        self, on_messages: Callable[[Sequence[ChildMessage]], None], on_end: Callable[[ChannelError], None]
    ) -> None:
        self._inbox.deliver(on_messages, on_end)
        self._resume_receiving()

    async def aclose(self) -> None:
        if self._released or isinstance(self._send_ending, ChannelClosed):
            return
        self._close_ends()
        try:
            if self._unsent_bytes():
                self._flush_waiter = self._loop.create_future()
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._flush_waiter
        except TimeoutError:
            pass
        finally:
            self.abort()

    def abort(self) -> None:
        self._close_ends()
        if not self._released:
            self._released = True
            self._release()
        self._sent_all()

    def _close_ends(self) -> None:
        closed = ChannelClosed("this side closed the channel")
        self._stop_receiving()
        self._inbox.end(closed)
        self._end_sending(closed)

    def _end_sending(self, error: ChannelError) -> None:
        if self._send_ending is None:
            self._send_ending = error
            self._turns.wake_all()

    def _room_made(self) -> None:
        if self._queueing and self._has_room():
            self._turns.wake_first()

    def _sent_all(self) -> None:
        """Nothing is unsent any more, or nothing ever will be sent."""
        if self._flush_waiter is not None and not self._flush_waiter.done():
            self._flush_waiter.set_result(None)
