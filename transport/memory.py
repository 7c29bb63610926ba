"""A channel inside one process, for tests and as the floor that benchmarks compare with.

Messages pass through the codec as on every transport, so the size cap holds and what JSON cannot say fails here too.
"""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress

from llamaherd.transport.channel import RECEIVE_LIMIT, SEND_LIMIT, Channel, ChildChannel
from llamaherd.transport.errors import BrokenChannel, ChannelClosed, ChannelError, EndOfChannel
from llamaherd.transport.framing import encode_checked, from_child, from_pool
from llamaherd.transport.messages import ChildMessage, PoolMessage
from llamaherd.transport.queued import QueuedChannel

__all__ = ["memory_pair"]

_Record = tuple[bytes, bytes]
#: Counted per message beside its body.
_OVERHEAD = 64


class _Lane:
    """One direction: a bounded list of records. Its owner's condition guards it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.records: list[_Record] = []
        self.size = 0
        self.ended = False  # nothing more will be put

    def put(self, record: _Record) -> None:
        self.records.append(record)
        self.size += len(record[1]) + _OVERHEAD

    def take(self) -> list[_Record]:
        records, self.records = self.records, []
        self.size = 0
        return records


class _Link:
    """What both ends share. ``changed`` guards everything and wakes the worker's threads."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.to_pool = _Lane(RECEIVE_LIMIT)
        self.to_child = _Lane(SEND_LIMIT)


class _MemoryChannel(QueuedChannel):
    def __init__(self, loop: asyncio.AbstractEventLoop, link: _Link) -> None:
        super().__init__(loop)
        self._link = link
        self._look_scheduled = False
        self._stopped = False

    def __repr__(self) -> str:
        return f"<MemoryChannel {len(self._inbox)} unread, {self._unsent_bytes()} bytes unsent>"

    def notify(self) -> None:
        """The worker's end did something; called from its threads, with the condition held."""
        if not self._look_scheduled:
            self._look_scheduled = True
            # The loop may be closed already: then nobody is left to look.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        with self._link.changed:
            self._look_scheduled = False
            ended = self._link.to_pool.ended
            room = not self._unsent_bytes()
        if not self._stopped:
            self._take()
            if ended:
                self._end_both(EndOfChannel("the worker closed the channel"))
        if room:
            self._sent_all()
        self._room_made()

    def _take(self) -> None:
        """Move what arrived to the inbox, unless its reader is behind."""
        if self._inbox:
            return
        with self._link.changed:
            size = self._link.to_pool.size
            records = self._link.to_pool.take()
            self._link.changed.notify_all()
        if records:
            self._inbox.put([from_child(*record) for record in records], size)

    def _end_both(self, error: ChannelError) -> None:
        # The inbox may have been too full to take the rest; it is in memory anyway.
        with self._link.changed:
            size = self._link.to_pool.size
            records = self._link.to_pool.take()
            self._link.to_child.take()
            self._link.to_pool.ended = self._link.to_child.ended = True
            self._link.changed.notify_all()
        if records and self._inbox.ending is None:
            self._inbox.put([from_child(*record) for record in records], size)
        self._inbox.end(error)
        self._end_sending(error)
        self._sent_all()

    async def receive(self) -> Sequence[ChildMessage]:
        messages = await super().receive()
        self._resume_receiving()
        return messages

    def peer_exited(self) -> None:
        if self._inbox.ending is None:
            self._end_both(EndOfChannel("the worker exited"))

    def _has_room(self) -> bool:
        return self._unsent_bytes() <= SEND_LIMIT

    def _unsent_bytes(self) -> int:
        return self._link.to_child.size

    def _put(self, kind: str, body: bytes) -> None:
        with self._link.changed:
            self._link.to_child.put((kind.encode("ascii"), body))
            self._link.changed.notify_all()

    def _stop_receiving(self) -> None:
        self._stopped = True

    def _resume_receiving(self) -> None:
        if not self._stopped:
            self._take()

    def _release(self) -> None:
        with self._link.changed:
            self._link.to_child.ended = self._link.to_pool.ended = True
            self._link.changed.notify_all()


class _MemoryChild(ChildChannel):
    def __init__(self, link: _Link, channel: _MemoryChannel) -> None:
        self._link = link
        self._channel = channel
        self._closed = False

    def send(self, message: ChildMessage) -> None:
        self.send_raw(*encode_checked(message))

    def send_raw(self, kind: str, body: bytes) -> None:
        """Send a record as it is; a newer worker may have kinds that this version does not know."""
        lane = self._link.to_pool
        with self._link.changed:
            self._link.changed.wait_for(lambda: self._closed or lane.ended or lane.size < lane.limit)
            if self._closed:
                raise ChannelClosed("this side closed the channel")
            if lane.ended:
                raise BrokenChannel("the pool closed the channel")
            lane.put((kind.encode("ascii"), body))
            self._channel.notify()

    def receive(self) -> Sequence[PoolMessage]:
        lane = self._link.to_child
        with self._link.changed:
            self._link.changed.wait_for(lambda: self._closed or lane.ended or bool(lane.records))
            if self._closed:
                raise ChannelClosed("this side closed the channel")
            records = lane.take()
            self._channel.notify()
        if not records:
            raise EndOfChannel("the pool closed the channel")
        return [from_pool(*record) for record in records]

    def close(self) -> None:
        with self._link.changed:
            if not self._closed:
                self._closed = True
                self._link.to_pool.ended = True
                self._link.changed.notify_all()
                self._channel.notify()


def memory_pair() -> tuple[Channel, ChildChannel]:
    """Return both ends of a new channel; the first belongs to the running loop.

    Raises:
        RuntimeError: no loop is running.
    """
    link = _Link()
    channel = _MemoryChannel(asyncio.get_running_loop(), link)
    return channel, _MemoryChild(link, channel)
