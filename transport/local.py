"""The two transports that are descriptors and nothing else: ``pipe`` and ``stdio``."""

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from llamaherd.transport.channel import CHANNEL_ENV, Channel, ChildAddress, Endpoint
from llamaherd.transport.framing import from_child
from llamaherd.transport.lines import CHILD_PREFIX, POOL_PREFIX, LineFraming
from llamaherd.transport.pipes import RecordFraming
from llamaherd.transport.streams import StreamChannel

__all__ = ["PipeTransport", "PreparedEndpoint", "StdioTransport", "check_identity"]


#: What a worker's pipe to its pool holds, so that it seldom waits for the pool to read.
_PIPE_BYTES: Final = 256 * 1024


def check_identity(identity: str) -> None:
    """Raise ValueError unless the identity is 1 to 200 characters of printable ASCII."""
    if not (0 < len(identity) <= 200 and identity.isascii() and identity.isprintable()):
        raise ValueError(f"an identity is 1 to 200 characters of printable ASCII, not {identity[:250]!r}")


class PreparedEndpoint:
    """The :class:`~llamaherd.transport.channel.Endpoint` of every transport; it owns the child's descriptors until
    spawned.
    """

    def __init__(
        self,
        channel: Channel,
        address: ChildAddress,
        *,
        stdin: int,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.channel = channel
        self.stdin = stdin
        self.stdout = stdout
        self.pass_fds = tuple(pass_fds)
        self.env: Mapping[str, str] = {CHANNEL_ENV: msgspec.json.encode(address).decode()}
        self._child_fds = [fd for fd in (stdin, stdout, *pass_fds) if fd is not None]

    def spawned(self) -> None:
        while self._child_fds:
            os.close(self._child_fds.pop())

    def discard(self) -> None:
        self.spawned()
        self.channel.abort()


class _LocalTransport:
    """Opens nothing itself; remembers its channels so that closing it closes them."""

    def __init__(self) -> None:
        self._channels: set[StreamChannel] = set()
        self._closed = False

    async def open(self) -> None:
        """Nothing is shared between the workers."""

    async def aclose(self) -> None:
        self._closed = True
        for channel in tuple(self._channels):
            channel.abort()

    def _prepare(self, identity: str) -> None:
        if self._closed:
            raise RuntimeError("the transport is closed")
        check_identity(identity)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _channel_pipes() -> tuple[int, int, int, int]:
    """Return two pipes: what the worker reads and the pool writes, what the pool reads and the worker writes."""
    their_read, our_write = os.pipe()
    try:
        our_read, their_write = os.pipe()
    except OSError:
        _close_all((their_read, our_write))
        raise
    os.set_blocking(our_write, False)
    os.set_blocking(our_read, False)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        # Each user may have so many pages of pipes; beyond that they stay as they are.
        with suppress(OSError):
            fcntl.fcntl(our_read, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return their_read, our_write, our_read, their_write


class PipeTransport(_LocalTransport):
    """Length-prefixed records on two inherited pipes: the local default."""

    name = "pipe"

    async def endpoint(self, identity: str, on_log: Callable[[bytes], None]) -> Endpoint:
        self._prepare(identity)
        del on_log  # nothing but the channel writes to the pipe
        child_stdin, lifeline = os.pipe()
        try:
            their_read, our_write, our_read, their_write = _channel_pipes()
        except OSError:
            _close_all((child_stdin, lifeline))
            raise
        channel = StreamChannel(
            asyncio.get_running_loop(),
            RecordFraming(from_child),
            read_fd=our_read,
            write_fd=our_write,
            owned=(lifeline,),
            on_release=self._channels.discard,
        )
        self._channels.add(channel)
        return PreparedEndpoint(
            channel,
            ChildAddress(transport=self.name, read_fd=their_read, write_fd=their_write),
            stdin=child_stdin,
            pass_fds=(their_read, their_write),
        )


class StdioTransport(_LocalTransport):
    """Lines on standard input and output, as llama.cpp's router and its children speak them."""

    name = "stdio"

    async def endpoint(self, identity: str, on_log: Callable[[bytes], None]) -> Endpoint:
        self._prepare(identity)
        child_stdin, commands, states, child_stdout = _channel_pipes()
        channel = StreamChannel(
            asyncio.get_running_loop(),
            LineFraming(from_child, sends=POOL_PREFIX, receives=CHILD_PREFIX, on_log=on_log),
            read_fd=states,
            write_fd=commands,
            on_release=self._channels.discard,
        )
        self._channels.add(channel)
        return PreparedEndpoint(channel, ChildAddress(transport=self.name), stdin=child_stdin, stdout=child_stdout)
