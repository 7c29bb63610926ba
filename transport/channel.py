"""The Channel: one connection between the pool and one worker, and everything that it promises.

There are two ends. The pool holds a :class:`Channel`, used from one asyncio loop. The worker holds a
:class:`ChildChannel`, used from plain threads, because llama.cpp's thread must never wait for an event loop.

The guarantees, the same on every transport and checked by one contract suite (``tests/transport/test_contract.py``):

**Order and loss.** While both processes live and neither end is closed, every message arrives exactly once and in the
order of sending. Messages that were sent before an orderly close arrive before the end is reported.

**Endings.** ``ChannelClosed``: I closed it. ``EndOfChannel``: they closed it (or were confirmed dead) and everything
they sent was read. ``BrokenChannel``: what arrived cannot be a record (torn, over the cap), or the system failed. All
three are final. A ZeroMQ peer that dies says nothing, and a grandchild can hold a pipe open: so a channel's silence is
never taken for a death. Whoever watches the process calls :meth:`Channel.peer_exited`, and the channel then ends after
what had arrived.

**Backpressure.** ``receive`` stops taking bytes from the system when ``RECEIVE_LIMIT`` bytes wait to be read; the
peer's sends then block. ``send`` waits while more than ``SEND_LIMIT`` bytes are unsent; ``send_nowait`` raises
``ChannelFull`` instead. Neither ever drops. One clogged worker does not slow another's channel.

**Size.** One body is at most ``messages.MAX_MESSAGE_BYTES``. Sending more raises ``MessageTooLarge`` and nothing is
sent; receiving more is ``BrokenChannel`` on pipes and frames. On lines it is skipped and reported once as ``Unknown``,
since a stdout line may be any program's print.

**Delivery.** A pool takes messages in one of two ways: it asks for them (``receive``), or it is called with them as
they arrive (``deliver``). The second costs no task, no future and no turn of the loop, and holds nothing back: what the
callee does not want to have yet is its own to keep.

**Strangers.** A kind or body that nobody knows arrives as :class:`~llamaherd.transport.messages.Unknown`, never as an
error.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from llamaherd.transport.errors import ChannelError
from llamaherd.transport.messages import ChildMessage, PoolMessage
from llamaherd.transport.traffic import Traffic

__all__ = [
    "CHANNEL_ENV",
    "RECEIVE_LIMIT",
    "SEND_LIMIT",
    "Channel",
    "ChildAddress",
    "ChildChannel",
    "Endpoint",
    "Transport",
]

#: Bytes of unread messages after which a channel stops reading from the system.
RECEIVE_LIMIT: Final = 4 * 1024 * 1024
#: Bytes of unsent messages after which ``send`` waits.
SEND_LIMIT: Final = 1024 * 1024
#: Environment variable through which a worker learns how to reach its pool. Removed from its environment once read.
CHANNEL_ENV: Final = "LLAMAHERD_CHANNEL"


class Channel(ABC):
    """The pool's end. All methods belong to the loop that opened the transport."""

    __slots__ = ()

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """What this end has carried so far; it counts on, also after the end."""

    @abstractmethod
    def send_nowait(self, message: PoolMessage) -> None:
        """Queue a message for the peer.

        Raises:
            ChannelFull: more than ``SEND_LIMIT`` bytes are unsent; the message was not taken.
            MessageTooLarge: see the module's text; the message was not taken.
            ChannelClosed, EndOfChannel, BrokenChannel: no more can be sent.
        """

    @abstractmethod
    async def send(self, message: PoolMessage) -> None:
        """Like :meth:`send_nowait`, but wait for room. Concurrent callers go in order; a cancelled caller sent
        nothing.
        """

    @abstractmethod
    async def receive(self) -> Sequence[ChildMessage]:
        """Return all messages that have arrived, at least one, in order; wait if there are none.

        One caller at a time. A cancelled call loses nothing.

        Raises:
            ChannelClosed, EndOfChannel, BrokenChannel: after the last message.
        """

    @abstractmethod
    def deliver(
        self, on_messages: Callable[[Sequence[ChildMessage]], None], on_end: Callable[[ChannelError], None]
    ) -> None:
        """From now on, hand messages over as they arrive, instead of by :meth:`receive`, which is closed then.

        Args:
            on_messages: Called on the loop with at least one message, in order; first with what has arrived already,
                before this returns. It may send on this channel, and close it. It must not raise.
            on_end: Called once, after the last message, with what :meth:`receive` would raise. It must not raise.

        Raises:
            RuntimeError: it was called before, or a task is in :meth:`receive`.
        """

    @abstractmethod
    def peer_exited(self) -> None:
        """Say that the operating system confirmed the peer's death. Idempotent.

        What had arrived, also in the kernel's buffers, is still delivered; then :meth:`receive` raises ``EndOfChannel``
        (or ``BrokenChannel`` if the last record was torn).
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Send what is queued as far as the peer takes it within a second, then close. Idempotent; never raises."""

    @abstractmethod
    def abort(self) -> None:
        """Close now; what is queued is lost. Idempotent; never raises."""


class ChildChannel(ABC):
    """The worker's end: blocking, for threads. Any thread may send; one thread at a time may receive."""

    @abstractmethod
    def send(self, message: ChildMessage) -> None:
        """Send one message; block while the pool does not read.

        Raises:
            MessageTooLarge: nothing was sent.
            ChannelClosed, BrokenChannel: no more can be sent (a pool that is gone is ``BrokenChannel``).
        """

    @abstractmethod
    def receive(self) -> Sequence[PoolMessage]:
        """Return messages that have arrived, at least one, in order; block if there are none.

        Raises:
            ChannelClosed: another thread called :meth:`close`.
            EndOfChannel: the pool closed the channel, or is gone.
            BrokenChannel: see the module's text.
        """

    @abstractmethod
    def close(self) -> None:
        """Flush, say goodbye where the transport has a word for it, and close. Idempotent; never raises."""


class Endpoint(Protocol):
    """One worker's place on a transport, made before the worker is spawned and used for one spawn only.

    The launcher starts the process with :attr:`stdin`, :attr:`stdout`, :attr:`pass_fds` and :attr:`env`, then calls
    :meth:`spawned`; the pool takes :attr:`channel`. If the spawn fails it calls :meth:`discard`.
    """

    @property
    def stdin(self) -> int:
        """Descriptor for the child's standard input: the read end of a pipe that the pool keeps open.

        End of file on it means that the pool is gone, on every transport.
        """
        ...

    @property
    def stdout(self) -> int | None:
        """Descriptor for the child's standard output, or None to send it where standard error goes (the log)."""
        ...

    @property
    def pass_fds(self) -> Sequence[int]:
        """Further descriptors that the child inherits."""
        ...

    @property
    def env(self) -> Mapping[str, str]:
        """Variables to add to the child's environment."""
        ...

    @property
    def channel(self) -> Channel:
        """The pool's end. Usable from the start; messages wait until the child connects."""
        ...

    def spawned(self) -> None:
        """Close the pool's copies of the child's descriptors. Idempotent."""
        ...

    def discard(self) -> None:
        """Release everything: the spawn did not happen. Idempotent."""
        ...


class Transport(Protocol):
    """A way to carry messages, opened once per pool."""

    @property
    def name(self) -> str:
        """The user-facing name: ``pipe``, ``zmq`` or ``stdio``."""
        ...

    async def open(self) -> None:
        """Acquire what all workers share (a ZeroMQ socket, a private directory). Called once, before any endpoint."""
        ...

    async def endpoint(self, identity: str, on_log: Callable[[bytes], None]) -> Endpoint:
        """Prepare for one spawn.

        Args:
            identity: Unique per spawn, printable ASCII, at most 200 characters (model, replica and generation).
            on_log: Called on the loop with raw bytes that arrived on the child's protocol stream but are not protocol:
                only lines have any.
        """
        ...

    async def aclose(self) -> None:
        """Release what :meth:`open` acquired. Idempotent. Channels still open are aborted."""
        ...


class ChildAddress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON in :data:`CHANNEL_ENV`: how a worker reaches its pool.

    Attributes:
        transport: ``pipe``, ``zmq`` or ``stdio``.
        read_fd, write_fd: The inherited ends of two pipes (pipe).
        endpoint, identity: Where to connect and as whom (zmq).
        server_key, public_key, secret_key: CURVE keys in Z85 (zmq over tcp); empty without CURVE.
    """

    transport: str
    read_fd: int = -1
    write_fd: int = -1
    endpoint: str = ""
    identity: str = ""
    server_key: str = ""
    public_key: str = ""
    secret_key: str = ""
