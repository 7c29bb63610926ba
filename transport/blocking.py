"""The worker's end of a byte stream: blocking calls for threads, and no asyncio in a process that has no loop."""

import fcntl
import os
import select
import stat
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from llamaherd.transport.channel import ChildChannel
from llamaherd.transport.errors import BrokenChannel, ChannelClosed, ChannelError, EndOfChannel
from llamaherd.transport.framing import Framing, encode_checked
from llamaherd.transport.messages import ChildMessage, PoolMessage

__all__ = ["PipeWire", "StreamChild"]

_READ_BYTES: Final = 64 * 1024
#: When that much of a record is missing; larger blocks are mapped anew for each read.
_LARGE_READ_BYTES: Final = 128 * 1024
#: How long ``close`` waits for calls in other threads, in seconds.
_CLOSE_SECONDS: Final = 1.0


class PipeWire:
    """A pair of pipes, which it owns; one thread reads and one writes at a time.

    A thread blocked on a pipe can be woken only by what comes through the pipe. So :meth:`interrupt` opens the other
    end of the one that is read, by its name under ``/proc``, and writes a byte. Where that cannot be (another system, a
    descriptor that is no pipe), every read is preceded by a poll of a pipe of our own as well.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._wake_read, self._wake_write = os.pipe()
        flags = fcntl.fcntl(write_fd, fcntl.F_GETFL)
        fcntl.fcntl(write_fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        self._interrupted = False
        self._readable: select.poll | None = None
        if not _write_into(read_fd, b""):
            self._readable = select.poll()
            self._readable.register(read_fd, select.POLLIN)
            self._readable.register(self._wake_read, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(write_fd, select.POLLOUT)
        self._writable.register(self._wake_read, select.POLLIN)

    def read(self, size: int) -> bytes:
        """Block for the next bytes, at most ``size``; empty at the end of the stream and after :meth:`interrupt`."""
        if self._interrupted:
            return b""
        if self._readable is not None:
            for fd, _ in self._readable.poll():
                if fd == self._wake_read:
                    return b""
        data = os.read(self._read_fd, size)
        return b"" if self._interrupted else data

    def write(self, data: bytes) -> None:
        """Write all of ``data``. Raises OSError, also after :meth:`interrupt`."""
        try:
            written = os.write(self._write_fd, data)
        except BlockingIOError:
            written = 0
        if written < len(data):
            self._write_rest(memoryview(data)[written:])

    def _write_rest(self, rest: memoryview) -> None:
        while rest:
            for fd, _ in self._writable.poll():
                if fd == self._wake_read:
                    raise BrokenPipeError("closed while a write was blocked")
            with suppress(BlockingIOError):
                rest = rest[os.write(self._write_fd, rest) :]

    def interrupt(self) -> None:
        """Make a blocked read and a blocked write return, from any thread, and every later one too."""
        self._interrupted = True
        os.write(self._wake_write, b"x")
        if self._readable is None:
            _write_into(self._read_fd, b"x")

    def close(self) -> None:
        """Close the descriptors; no call is in progress."""
        for fd in (self._read_fd, self._write_fd, self._wake_read, self._wake_write):
            os.close(fd)


def _write_into(read_fd: int, data: bytes) -> bool:
    """Write to the pipe that this is the reading end of; False if it cannot be written to."""
    if sys.platform != "linux" or not stat.S_ISFIFO(os.fstat(read_fd).st_mode):
        return False
    try:
        fd = os.open(f"/proc/self/fd/{read_fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if data:
            os.write(fd, data)
    except BlockingIOError:
        pass  # it is full, so no reader waits
    finally:
        os.close(fd)
    return True


class StreamChild(ChildChannel):
    """A :class:`~llamaherd.transport.channel.ChildChannel` over a wire, which it owns."""

    def __init__(self, wire: PipeWire, framing: Framing[PoolMessage]) -> None:
        self._wire = wire
        self._framing = framing
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._closed = False
        self._send_failure = ""
        self._ending: ChannelError | None = None

    def send(self, message: ChildMessage) -> None:
        self.send_raw(*encode_checked(message))

    def send_raw(self, kind: str, body: bytes) -> None:
        """Send a record as it is; a newer worker may have kinds that this version does not know."""
        record = self._framing.frame(kind, body)
        with self._send_lock:
            if self._closed:
                raise ChannelClosed("this side closed the channel")
            if self._send_failure:
                raise BrokenChannel(self._send_failure)
            # Whatever stops the write half way, a signal's exception included, leaves a torn record behind.
            self._send_failure = "a send was interrupted inside a record"
            try:
                self._wire.write(record)
            except OSError as error:
                if self._closed:
                    raise ChannelClosed("this side closed the channel") from None
                self._send_failure = f"the pool is gone: {error.strerror or error}"
                raise BrokenChannel(self._send_failure) from error
            self._send_failure = ""

    def receive(self) -> Sequence[PoolMessage]:
        with self._receive_lock:
            messages: list[PoolMessage] = []
            while not messages:
                if self._closed:
                    raise ChannelClosed("this side closed the channel")
                if self._ending is not None:
                    raise type(self._ending)(*self._ending.args)
                self._read(messages)
            return messages

    def _read(self, into: list[PoolMessage]) -> None:
        try:
            data = self._wire.read(_READ_BYTES if self._framing.missing <= _READ_BYTES else _LARGE_READ_BYTES)
        except OSError as error:
            self._ending = BrokenChannel(f"reading failed: {error}")
            return
        if not data:
            self._ending = self._framing.finish() or EndOfChannel("the pool closed the channel")
            return
        try:
            self._framing.feed(data, into)
        except BrokenChannel as error:
            self._ending = error

    def close(self) -> None:
        with self._close_lock:
            if self._closed:
                return
            # A send in progress is finished first if the pool takes it.
            in_order = self._send_lock.acquire(timeout=_CLOSE_SECONDS)
            self._closed = True
            self._wire.interrupt()
            if in_order or self._send_lock.acquire(timeout=_CLOSE_SECONDS):
                self._send_lock.release()
                if self._receive_lock.acquire(timeout=_CLOSE_SECONDS):
                    self._receive_lock.release()
                    self._wire.close()
