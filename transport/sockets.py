"""Runs a ZeroMQ socket on an asyncio or uvloop loop, and answers who may connect to it.

A ZeroMQ socket's descriptor signals that *something changed*, once, and any call on the socket may use that signal
up. So :class:`SocketPump` looks at the socket's events again after whatever was done to it.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import zmq
from zmq.backend import Socket as Bare

__all__ = ["Gatekeeper", "SocketPump"]

_BATCH: Final = 256
# Plain numbers: the arithmetic of zmq's enums costs more than the calls that they are for.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_RCVMORE: Final = int(zmq.RCVMORE)
#: Without pyzmq's outer layer, which makes enums of numbers.
_get: Final = Bare.get

#: Takes the parts of a message, and who sent it if the socket tells.
_Handle = Callable[[list[bytes], str | None], None]


class SocketPump:
    """Hands each multipart message of a socket to ``handle``, on the loop.

    Whoever sends on the socket calls :meth:`touched` afterwards.

    Args:
        named: Whether to tell ``handle`` the ``User-Id`` that the gatekeeper gave to the sender's connection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: "zmq.Socket[bytes]",
        handle: _Handle,
        *,
        named: bool = False,
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._handle = handle
        self._named = named
        self._fd = int(socket.getsockopt(zmq.FD))
        self._look_due = False
        self._when_empty: list[Callable[[], None]] = []
        self._closed = False
        loop.add_reader(self._fd, self._on_signal)
        self.touched()

    def touched(self) -> None:
        if not self._look_due:
            self._look_due = True
            self._loop.call_soon(self._look)

    def when_empty(self, call: Callable[[], None]) -> None:
        """Call once, after everything that ZeroMQ holds at that moment was handled."""
        self._when_empty.append(call)
        self._loop.call_soon(self._pump)

    def close(self, linger_ms: int) -> None:
        """Stop, and close the socket. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=linger_ms)

    def _look(self) -> None:
        # A pump that found the socket empty since the last touch has looked already.
        if self._look_due:
            self._pump()

    def _on_signal(self) -> None:
        # Most signals come with a message; those that come alone cost a receive that fails.
        self._pump(expected=True)

    def _pump(self, *, expected: bool = False) -> None:
        # No signal is lost. Nothing is taken for empty but by asking for the events, which uses up the signal and every
        # change behind it, so what changes later signals anew. What is touched while this runs needs no look of its
        # own, since this ends either by such an answer or by another turn, also when ``handle`` raises.
        self._look_due = True
        empty = False
        try:
            empty = self._handle_batch(expected=expected)
        finally:
            self._look_due = not empty
            if not empty:
                self._loop.call_soon(self._look)
        if empty and self._when_empty and not self._closed:
            calls, self._when_empty = self._when_empty, []
            for call in calls:
                call()

    def _handle_batch(self, *, expected: bool) -> bool:
        """Handle what has arrived, at most so much; return whether nothing is left."""
        if expected and not self._closed:
            try:
                message = self._receive()
            except zmq.Again:
                pass
            else:
                self._handle(*message)
        for _ in range(_BATCH):
            # Dearer than a receive that succeeds, but cheaper than one that fails, and most batches are of one message.
            if self._closed or not int(_get(self._socket, _EVENTS)) & _POLLIN:
                return True
            self._handle(*self._receive())
        return False

    def _receive(self) -> tuple[list[bytes], str | None]:
        socket, user = self._socket, None
        if self._named:
            # All parts tell the user, and telling costs a copy=False; the first one is small.
            first = socket.recv(_NOBLOCK, copy=False)
            user = _user_of(first)
            parts = [first.bytes]
        else:
            parts = [socket.recv(_NOBLOCK)]
        # A routing id, or the version of a question, never comes alone.
        parts.append(socket.recv(_NOBLOCK))
        while _get(socket, _RCVMORE):
            parts.append(socket.recv(_NOBLOCK))
        return parts, user


def _user_of(part: zmq.Frame) -> str | None:
    try:
        return str(part.get("User-Id"))
    except zmq.ZMQError:
        return None


class Gatekeeper:
    """Answers ZeroMQ's ZAP questions: which CURVE keys may connect, and as whom. One per context.

    Must be made before the sockets that it guards are bound.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._names: dict[bytes, bytes] = {}
        self._replies = context.socket(zmq.REP)
        self._replies.linger = 0
        self._replies.bind("inproc://zeromq.zap.01")
        self._pump = SocketPump(loop, self._replies, self._answer)

    def admit(self, key: bytes, name: str) -> None:
        """Let the holder of this raw 32-byte public key in; its frames then carry ``User-Id: name``."""
        self._names[key] = name.encode("ascii")

    def dismiss(self, key: bytes) -> None:
        """Take :meth:`admit` back, for connections to come. Idempotent."""
        self._names.pop(key, None)

    def close(self) -> None:
        self._pump.close(0)

    def _answer(self, question: list[bytes], user: str | None) -> None:
        del user
        # version, request id, domain, address, identity, mechanism, credentials...
        name = None
        if len(question) == 7 and question[5] == b"CURVE":
            name = self._names.get(question[6])
        status, text = (b"200", b"OK") if name is not None else (b"400", b"unknown key")
        request = question[1] if len(question) > 1 else b""
        self._replies.send_multipart([b"1.0", request, status, text, name or b"", b""], zmq.NOBLOCK)
        self._pump.touched()
