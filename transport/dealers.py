"""The worker's end of the ``zmq`` transport: one DEALER to speak and one to hear.

ZeroMQ sockets are not thread-safe and their descriptor signals changes only, so a socket shared by a sending and a
receiving thread needs a careful dance. Two sockets need none: each is used under its own lock and waited for with
ZeroMQ's own poll.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import zmq
from zmq.backend import Socket as Bare

from llamaherd.transport.channel import RECEIVE_LIMIT, SEND_LIMIT, ChildAddress, ChildChannel
from llamaherd.transport.errors import BrokenChannel, ChannelClosed, ChannelError, EndOfChannel
from llamaherd.transport.flow import BYE, CREDIT, DOWN, UP, Meter, Window, wire_size
from llamaherd.transport.framing import encode_checked, from_pool
from llamaherd.transport.messages import MAX_MESSAGE_BYTES, ChildMessage, PoolMessage

__all__ = ["FrameChild"]

_CONNECT_SECONDS: Final = 10.0
#: How often a blocked call looks whether the connection is still there, in milliseconds.
_LOOK_MS: Final = 1000
#: How long the pool may take to read what was sent before a close, in seconds: one that is short of cores needs its
#: time, and one that is gone is not waited for, since its connection then is.
_FAREWELL_SECONDS: Final = 20.0
#: How often a close looks whether the connection is still there, in milliseconds.
_FAREWELL_LOOK_MS: Final = 50
#: The same for the message that wakes a thread of this process.
_WAKE_LINGER_MS: Final = 1000
_CLOSE_SECONDS: Final = 1.0
_POOL_CLOSED: Final = "the pool closed the channel"
# Plain numbers: the arithmetic of zmq's enums costs more than a send.
_LAST: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_RCVMORE: Final = int(zmq.RCVMORE)
_WAKE_ENDPOINT: Final = "inproc://wake"
_WAKE: Final = b"\x01wake"
#: Without pyzmq's outer layer, which costs as much again.
_send: Final = Bare.send
_get: Final = Bare.get
_LOST: Final = "the connection to the pool is lost"


def _dealer(context: "zmq.Context[zmq.Socket[bytes]]", prefix: bytes, address: ChildAddress) -> "zmq.Socket[bytes]":
    dealer = context.socket(zmq.DEALER)
    dealer.routing_id = prefix + address.identity.encode("ascii")
    dealer.sndhwm = dealer.rcvhwm = 0  # bounded by the credit instead
    dealer.maxmsgsize = MAX_MESSAGE_BYTES
    dealer.linger = 0
    # Together these greet the pool with an empty message on each connection, and make a lost one visible here as a
    # socket that cannot be written to. What was under way is lost with it, so the pool takes a second greeting for
    # a break.
    dealer.immediate = 1
    dealer.probe_router = 1
    if address.server_key:
        dealer.curve_serverkey = address.server_key.encode("ascii")
        dealer.curve_publickey = address.public_key.encode("ascii")
        dealer.curve_secretkey = address.secret_key.encode("ascii")
    dealer.connect(address.endpoint)
    return dealer


class _Lane:
    """One DEALER and its lock."""

    def __init__(self, dealer: "zmq.Socket[bytes]") -> None:
        self.dealer = dealer
        self.lock = threading.Lock()

    @property
    def connected(self) -> bool:
        return bool(int(self.dealer.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)

    def send(self, kind: bytes, body: bytes) -> None:
        """Queue one message; raises :class:`zmq.Again` if the connection is lost, and then only."""
        _send(self.dealer, kind, _MORE)
        _send(self.dealer, body, _LAST)


class _Speaking(_Lane):
    """The lane that sends. Who waits for credit in it is woken by a descriptor."""

    def __init__(self, dealer: "zmq.Socket[bytes]") -> None:
        super().__init__(dealer)
        self._wake_read, self._wake_write = os.pipe()
        self._poller = zmq.Poller()
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def wait(self) -> bool:
        """Wait until there is something to receive or to look at; False if the connection is lost."""
        return bool(self._poller.poll(_LOOK_MS)) or self.connected

    def drain(self) -> list[list[bytes]]:
        """Return every multipart message that is there."""
        messages: list[list[bytes]] = []
        dealer = self.dealer
        # Asking for the events first is cheaper than one receive that fails.
        while int(_get(dealer, _EVENTS)) & _POLLIN:
            parts = [dealer.recv(_LAST)]
            while _get(dealer, _RCVMORE):
                parts.append(dealer.recv(_LAST))
            messages.append(parts)
        return messages

    def part(self) -> None:
        """Say goodbye and wait until the pool has answered, which it does when it has read all that was sent before.

        A socket that is closed earlier may take that with it: when frames of the pool lie unread here, the kernel
        resets the connection, and the other side loses what it had not read.
        """
        deadline = time.monotonic() + _FAREWELL_SECONDS
        with suppress(zmq.Again):
            self.send(BYE, b"")
        while self.connected and not any(frames[0] == BYE for frames in self.drain()):
            if time.monotonic() > deadline:
                return
            self.dealer.poll(_FAREWELL_LOOK_MS)

    def wake(self) -> None:
        """From another thread: make every wait return."""
        os.write(self._wake_write, b"x")

    def close(self) -> None:
        self.dealer.close(linger=0)
        os.close(self._wake_read)
        os.close(self._wake_write)


class _Hearing(_Lane):
    """The lane that receives. Who waits in it is blocked in a receive, which costs a third of a poll, and is woken by
    a message from within the process.
    """

    def __init__(self, dealer: "zmq.Socket[bytes]") -> None:
        super().__init__(dealer)
        dealer.rcvtimeo = _LOOK_MS
        dealer.bind(_WAKE_ENDPOINT)

    def wait(self) -> list[bytes] | None:
        """Wait for a message and return its frames, none if it is time to look at something else; None if the
        connection is lost.

        Whether there is another one is not asked, which is dearer than to receive it.
        """
        try:
            parts = [self.dealer.recv()]
        except zmq.Again:
            return [] if self.connected else None
        # Everything that comes here has two frames at least; one that has not is found out by what follows it.
        with suppress(zmq.Again):
            parts.append(self.dealer.recv(_LAST))
            while _get(self.dealer, _RCVMORE):
                parts.append(self.dealer.recv(_LAST))
        return parts

    def wake(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        """From another thread: make the wait return. What is sent in this lane afterwards may be lost."""
        with context.socket(zmq.DEALER) as waker:
            waker.linger = _WAKE_LINGER_MS
            waker.connect(_WAKE_ENDPOINT)
            waker.send_multipart((_WAKE, b""))

    def close(self) -> None:
        self.dealer.close(linger=0)


class FrameChild(ChildChannel):
    """A :class:`~llamaherd.transport.channel.ChildChannel` over ZeroMQ. Constructing it waits for the pool to answer.

    Args:
        address: Where and who, as the pool's endpoint wrote it.
        connect_seconds: How long to wait for the connection.

    Raises:
        BrokenChannel: nobody answered in time, or the pool refused this worker's keys.
    """

    def __init__(self, address: ChildAddress, *, connect_seconds: float = _CONNECT_SECONDS) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            up, down = _dealer(self._context, UP, address), _dealer(self._context, DOWN, address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise BrokenChannel(f"no channel to {address.endpoint}: {error}") from error
        self._up: Final = _Speaking(up)
        self._down: Final = _Hearing(down)
        self._close_lock = threading.Lock()
        self._closed = False
        self._send_failure = ""
        self._window = Window(RECEIVE_LIMIT)
        self._meter = Meter(SEND_LIMIT)
        self._consumed = 0
        self._ending: ChannelError | None = None
        for lane in (self._up, self._down):
            if not lane.dealer.poll(round(connect_seconds * 1000), zmq.POLLOUT):
                self._release()
                raise BrokenChannel(f"no pool answered at {address.endpoint} within {connect_seconds:g} s")

    def send(self, message: ChildMessage) -> None:
        self.send_raw(*encode_checked(message))

    def send_raw(self, kind: str, body: bytes) -> None:
        """Send a record as it is; a newer worker may have kinds that this version does not know."""
        with self._up.lock:
            if self._closed:
                raise ChannelClosed("this side closed the channel")
            if not self._window.is_open:
                self._wait_for_credit()
            if not self._send_failure:
                try:
                    self._up.send(kind.encode("ascii"), body)
                except zmq.Again:
                    self._send_failure = _LOST
            if self._send_failure:
                raise BrokenChannel(self._send_failure)
            self._window.sent(wire_size(body))

    def _wait_for_credit(self) -> None:
        while not self._send_failure:
            for kind, *rest in self._up.drain():
                if kind == CREDIT and rest:
                    self._window.acknowledge(rest[0])
                elif kind == BYE:
                    self._send_failure = _POOL_CLOSED
            if self._window.is_open:
                return
            if self._closed:
                raise ChannelClosed("this side closed the channel")
            if not self._up.wait():
                self._send_failure = _LOST

    def receive(self) -> Sequence[PoolMessage]:
        with self._down.lock:
            while True:
                if self._closed:
                    raise ChannelClosed("this side closed the channel")
                if self._ending is not None:
                    raise type(self._ending)(*self._ending.args)
                frames = self._down.wait()
                if frames is None:
                    self._ending = EndOfChannel(_LOST)
                elif frames and (message := self._take(frames)) is not None:
                    return [message]

    def _take(self, frames: list[bytes]) -> PoolMessage | None:
        """Return a message; or None for what is the transport's own, or ends the channel."""
        kind, body = frames[0], frames[-1]
        if kind == _WAKE:
            return None
        if len(frames) != 2:
            self._ending = BrokenChannel(f"not a record: {len(frames)} frames instead of 2")
            return None
        if kind == BYE:
            self._send_failure = _POOL_CLOSED
            self._ending = EndOfChannel(_POOL_CLOSED)
            return None
        if kind.startswith(b"\x01"):
            return None
        self._consumed += wire_size(body)
        credit = self._meter.due(self._consumed)
        if credit is not None:
            with suppress(zmq.Again):
                self._down.send(CREDIT, credit)
        return from_pool(kind, body)

    def close(self) -> None:
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            self._up.wake()
            self._down.wake(self._context)
            # Whoever is blocked leaves now, as soon as it has a core for it; closing a socket under it would be a bug.
            # The goodbye needs no more than its own socket, and what was sent is lost without it.
            if self._up.lock.acquire(timeout=_CLOSE_SECONDS):
                if not self._send_failure:
                    self._up.part()
                if self._down.lock.acquire(timeout=_CLOSE_SECONDS):
                    self._release()
                    self._down.lock.release()
                self._up.lock.release()

    def _release(self) -> None:
        self._up.close()
        self._down.close()
        self._context.term()
