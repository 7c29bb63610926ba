"""The worker's end of the ``zmq`` transport: one DEALER to speak and one to hear.

ZeroMQ sockets are not thread-safe and their descriptor signals changes only, so a socket shared by a sending and a
receiving thread needs a careful dance. Two sockets need none: each is used under its own lock and waited for with
ZeroMQ's own poll.
"""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import zmq

from llamaherd.transport.channel import RECEIVE_LIMIT, SEND_LIMIT, ChildAddress, ChildChannel
from llamaherd.transport.errors import BrokenChannel, ChannelClosed, ChannelError, EndOfChannel
from llamaherd.transport.flow import BYE, CREDIT, DOWN, UP, Meter, Window, wire_size
from llamaherd.transport.framing import encode_checked, from_pool
from llamaherd.transport.messages import MAX_MESSAGE_BYTES, ChildMessage, PoolMessage

__all__ = ["FrameChild"]

_CONNECT_SECONDS: Final = 10.0
#: How often a blocked call looks whether the connection is still there, in milliseconds.
_LOOK_MS: Final = 1000
_LINGER_MS: Final = 1000
_CLOSE_SECONDS: Final = 1.0
_POOL_CLOSED: Final = "the pool closed the channel"
# Plain numbers: the arithmetic of zmq's enums costs more than a send.
_LAST: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_RCVMORE: Final = int(zmq.RCVMORE)
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
    """One DEALER, its lock, and a poller that another thread can wake."""

    def __init__(self, dealer: "zmq.Socket[bytes]", wake_fd: int) -> None:
        self.dealer = dealer
        self.lock = threading.Lock()
        self._poller = zmq.Poller()
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(wake_fd, zmq.POLLIN)

    def wait(self) -> bool:
        """Wait until there is something to receive or to look at; False if the connection is lost."""
        return bool(self._poller.poll(_LOOK_MS)) or self.connected

    @property
    def connected(self) -> bool:
        return bool(int(self.dealer.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)

    def drain(self) -> list[list[bytes]]:
        """Return every multipart message that is there."""
        messages: list[list[bytes]] = []
        dealer = self.dealer
        # Asking for the events first is cheaper than one receive that fails.
        while int(dealer.get(_EVENTS)) & _POLLIN:
            parts = [dealer.recv(_LAST)]
            while dealer.get(_RCVMORE):
                parts.append(dealer.recv(_LAST))
            messages.append(parts)
        return messages

    def send(self, kind: bytes, body: bytes) -> None:
        """Queue one message; raises :class:`zmq.Again` if the connection is lost, and then only."""
        self.dealer.send(kind, _MORE)
        self.dealer.send(body, _LAST)


class FrameChild(ChildChannel):
    """A :class:`~llamaherd.transport.channel.ChildChannel` over ZeroMQ. Constructing it waits for the pool to answer.

    Args:
        address: Where and who, as the pool's endpoint wrote it.
        connect_seconds: How long to wait for the connection.

    Raises:
        BrokenChannel: nobody answered in time, or the pool refused this worker's keys.
    """

    def __init__(self, address: ChildAddress, *, connect_seconds: float = _CONNECT_SECONDS) -> None:
        self._wake_read, self._wake_write = os.pipe()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._up = _Lane(_dealer(self._context, UP, address), self._wake_read)
            self._down = _Lane(_dealer(self._context, DOWN, address), self._wake_read)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            os.close(self._wake_read)
            os.close(self._wake_write)
            raise BrokenChannel(f"no channel to {address.endpoint}: {error}") from error
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
                if self._ending is None and (messages := self._take()):
                    return messages
                if self._ending is not None:
                    raise type(self._ending)(*self._ending.args)
                if not self._down.wait():
                    self._ending = EndOfChannel(_LOST)

    def _take(self) -> list[PoolMessage]:
        messages: list[PoolMessage] = []
        for frames in self._down.drain():
            if len(frames) != 2:
                self._ending = BrokenChannel(f"not a record: {len(frames)} frames instead of 2")
                break
            kind, body = frames
            if kind == BYE:
                self._send_failure = _POOL_CLOSED
                self._ending = EndOfChannel(_POOL_CLOSED)
                break
            if not kind.startswith(b"\x01"):
                messages.append(from_pool(kind, body))
                self._consumed += wire_size(body)
        credit = self._meter.due(self._consumed)
        if credit is not None:
            with suppress(zmq.Again):
                self._down.send(CREDIT, credit)
        return messages

    def close(self) -> None:
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            os.write(self._wake_write, b"x")
            # Whoever is blocked leaves at once now; a call that does not is a bug, and closing under it would be a
            # worse one.
            if self._up.lock.acquire(timeout=_CLOSE_SECONDS) and self._down.lock.acquire(timeout=_CLOSE_SECONDS):
                with suppress(zmq.Again):
                    self._up.send(BYE, b"")
                self._release()
                self._down.lock.release()
                self._up.lock.release()

    def _release(self) -> None:
        self._up.dealer.close(linger=_LINGER_MS)
        self._down.dealer.close(linger=0)
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)
