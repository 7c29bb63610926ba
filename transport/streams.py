"""The pool's end of a byte stream, run by readiness callbacks of asyncio or uvloop; the framing is a parameter.

The descriptors are read and written directly instead of through an asyncio transport: a transport that fails to
write drops what it has not read, and it cannot say what the kernel still holds of a dead peer.
"""

import asyncio
import fcntl
import os
import sys
import termios
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from llamaherd.transport.channel import RECEIVE_LIMIT, SEND_LIMIT
from llamaherd.transport.errors import BrokenChannel, ChannelError, EndOfChannel
from llamaherd.transport.framing import Framing
from llamaherd.transport.messages import ChildMessage
from llamaherd.transport.queued import QueuedChannel

__all__ = ["StreamChannel"]

_READ_BYTES: Final = 64 * 1024
#: When that much of a record is missing. A socket holds little more, and larger blocks are mapped anew for each read.
_LARGE_READ_BYTES: Final = 128 * 1024
#: Messages sent in one turn of the loop are written together once they reach this size.
_CORK_BYTES: Final = 64 * 1024
_WRITE_PIECES: Final = 512  # below IOV_MAX, which is 1024 on Linux and macOS


class StreamChannel(QueuedChannel):
    """A :class:`~llamaherd.transport.channel.Channel` over two descriptors, which may be the same socket.

    Args:
        read_fd, write_fd: Non-blocking, owned by the channel from here on.
        framing: How messages become bytes.
        owned: Further descriptors to close with the channel (the lifeline).
        on_release: Called once when the descriptors are closed.
    """

    __slots__ = (
        "_corked",
        "_fds",
        "_framing",
        "_on_release",
        "_prompt",
        "_read_fd",
        "_reading",
        "_undelivered",
        "_unsent",
        "_unsent_size",
        "_write_fd",
        "_writing",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        framing: Framing[ChildMessage],
        *,
        read_fd: int,
        write_fd: int,
        owned: Sequence[int] = (),
        on_release: Callable[["StreamChannel"], None] | None = None,
    ) -> None:
        super().__init__(loop)
        self._framing = framing
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._fds = {read_fd, write_fd, *owned}
        self._on_release = on_release
        self._unsent: deque[bytes | memoryview] = deque()
        self._unsent_size = 0
        self._corked = False
        self._prompt = True  # the worker was heard since the last message left, or none has left yet
        self._writing = False
        self._reading = False
        self._undelivered = 0  # bytes read since the last message was complete
        self._resume_receiving()

    def __repr__(self) -> str:
        ending = self._inbox.ending
        state = type(ending).__name__ if ending else "reading" if self._reading else "paused"
        return (
            f"<StreamChannel fd {self._read_fd} {state}, {len(self._inbox)} unread, {self._unsent_size} bytes unsent>"
        )

    # --- receiving ----------------------------------------------------------------------------------------------------

    async def receive(self) -> Sequence[ChildMessage]:
        messages = await self._inbox.take()
        if not self._reading:
            self._resume_receiving()
        return messages

    def peer_exited(self) -> None:
        if self._inbox.ending is None:
            self._drain()
            self._end(EndOfChannel("the worker exited"))

    def _on_readable(self) -> None:
        size = _READ_BYTES
        if self._undelivered and self._framing.missing > size:
            size = _LARGE_READ_BYTES
        try:
            data = os.read(self._read_fd, size)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(BrokenChannel(f"reading failed: {error}"))
            return
        if not data:
            self._end(EndOfChannel("the worker closed the channel"))
            return
        self._prompt = True
        self._feed(data)
        if self._inbox.size >= RECEIVE_LIMIT:
            self._stop_receiving()

    def _feed(self, data: bytes) -> None:
        messages: list[ChildMessage] = []
        size = self._undelivered + len(data)
        try:
            self._framing.feed(data, messages)
        except BrokenChannel as broken:
            if messages:
                self._inbox.put(messages, size)
            self._finish(broken)
            return
        if messages:
            self._undelivered = 0
            self._inbox.put(messages, size)
        else:
            self._undelivered = size

    def _drain(self) -> None:
        """Read what a dead peer left in the kernel: so much and no more, since a grandchild may go on writing."""
        left = int.from_bytes(fcntl.ioctl(self._read_fd, termios.FIONREAD, bytes(4)), sys.byteorder)
        while left > 0 and self._inbox.ending is None:
            try:
                data = os.read(self._read_fd, min(left, _READ_BYTES))
            except OSError:
                return
            if not data:
                return
            left -= len(data)
            self._feed(data)

    def _end(self, error: ChannelError) -> None:
        self._finish(self._framing.finish() or error)

    def _finish(self, error: ChannelError) -> None:
        self._stop_receiving()
        self._inbox.end(error)
        self._lose_unsent(error)

    def _resume_receiving(self) -> None:
        if self._inbox.ending is None and not self._reading:
            self._reading = True
            self._loop.add_reader(self._read_fd, self._on_readable)

    def _stop_receiving(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._read_fd)

    # --- sending ------------------------------------------------------------------------------------------------------

    def _has_room(self) -> bool:
        if self._unsent_size <= SEND_LIMIT:
            return True
        if not self._writing:
            self._flush()
        return self._unsent_size <= SEND_LIMIT

    def _unsent_bytes(self) -> int:
        return self._unsent_size

    def _put(self, kind: str, body: bytes) -> None:
        record = self._framing.frame(kind, body)
        if self._prompt and not self._unsent:
            # An answer to what was heard leaves at once, and the loop has nothing to come back for.
            self._prompt = False
            try:
                written = os.write(self._write_fd, record)
            except OSError:
                written = 0  # what it means is found out below
            if written == len(record):
                return
            record = record[written:]
        # The first message of a turn leaves at once; those that follow in the same turn leave together.
        flush = not self._corked or self._unsent_size >= _CORK_BYTES
        self._unsent.append(record)
        self._unsent_size += len(record)
        if self._writing:
            return
        if not self._corked:
            self._corked = True
            self._loop.call_soon(self._uncork)
        if flush:
            self._flush()

    def _uncork(self) -> None:
        self._corked = False
        if self._unsent and not self._writing:
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                if len(self._unsent) == 1:
                    written = os.write(self._write_fd, self._unsent[0])
                else:
                    written = os.writev(self._write_fd, list(islice(self._unsent, _WRITE_PIECES)))
            except BlockingIOError:
                self._wait_writable()
                return
            except OSError as error:
                # What the peer sent before it went is still to be read, so only this direction ends here.
                self._lose_unsent(EndOfChannel(f"the worker closed its end: {error.strerror}"))
                return
            self._take_written(written)
        self._stop_writing()
        self._sent_all()

    def _take_written(self, written: int) -> None:
        self._unsent_size -= written
        while written:
            piece = self._unsent[0]
            if written < len(piece):
                self._unsent[0] = memoryview(piece)[written:]
                return
            written -= len(piece)
            self._unsent.popleft()

    def _on_writable(self) -> None:
        self._flush()
        self._room_made()

    def _wait_writable(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._write_fd, self._on_writable)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._write_fd)

    def _lose_unsent(self, error: ChannelError) -> None:
        self._unsent.clear()
        self._unsent_size = 0
        self._stop_writing()
        self._end_sending(error)
        self._sent_all()

    def _release(self) -> None:
        self._unsent.clear()
        self._unsent_size = 0
        self._stop_writing()
        for fd in self._fds:
            os.close(fd)
        if self._on_release is not None:
            self._on_release(self)
