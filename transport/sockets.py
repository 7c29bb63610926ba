"""Runs a ZeroMQ socket on an asyncio or uvloop loop, and answers who may connect to it.

A ZeroMQ socket's descriptor signals that *something changed*, once, and any call on the socket may use that signal
up. So :class:`SocketPump` looks at the socket's events again after whatever was done to it.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import zmq

__all__ = ["Gatekeeper", "SocketPump"]

_BATCH: Final = 256


class SocketPump:
    """Hands each multipart message of a socket to ``handle``, on the loop.

    Whoever sends on the socket calls :meth:`touched` afterwards.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: "zmq.Socket[bytes]",
        handle: Callable[[Sequence[zmq.Frame]], None],
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._handle = handle
        self._fd = int(socket.getsockopt(zmq.FD))
        self._look_scheduled = False
        self._when_empty: list[Callable[[], None]] = []
        self._closed = False
        loop.add_reader(self._fd, self._pump)
        self.touched()

    def touched(self) -> None:
        if not self._look_scheduled:
            self._look_scheduled = True
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
        self._look_scheduled = False
        if not self._closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._pump()

    def _pump(self) -> None:
        for _ in range(_BATCH):
            if self._closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                calls, self._when_empty = self._when_empty, []
                for call in calls:
                    call()
                return
            self._handle(frames)
        self._loop.call_soon(self._pump)


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

    def _answer(self, frames: Sequence[zmq.Frame]) -> None:
        # version, request id, domain, address, identity, mechanism, credentials...
        question = [frame.bytes for frame in frames]
        name = None
        if len(question) == 7 and question[5] == b"CURVE":
            name = self._names.get(question[6])
        status, text = (b"200", b"OK") if name is not None else (b"400", b"unknown key")
        request = question[1] if len(question) > 1 else b""
        self._replies.send_multipart([b"1.0", request, status, text, name or b"", b""], zmq.NOBLOCK)
        self._pump.touched()
