"""ZeroMQ frames: the ``zmq`` transport, which also reaches workers on other hosts.

The pool binds one ROUTER; each worker connects two DEALERs (``dealers.py`` says why). A message is ``[kind,
json]``. The routing ids are the spawn's identity behind ``u:`` and ``d:``, so an older spawn's message never
reaches a newer one's channel.

Locally the socket lies in a private directory. Over TCP it speaks CURVE only, each worker has a key of its own, and
a frame counts only if the key that brought it belongs to the identity that it claims.
"""

import asyncio
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import zmq
from zmq.backend import Socket as Bare
from zmq.utils import z85

from llamaherd.transport.channel import RECEIVE_LIMIT, SEND_LIMIT, ChildAddress, Endpoint
from llamaherd.transport.directory import PrivateDirectory
from llamaherd.transport.errors import BrokenChannel, ChannelError, EndOfChannel
from llamaherd.transport.flow import BYE, CREDIT, DOWN, PROBE, UP, Meter, Window, wire_size
from llamaherd.transport.framing import from_child
from llamaherd.transport.local import PreparedEndpoint, check_identity
from llamaherd.transport.messages import MAX_MESSAGE_BYTES, ChildMessage
from llamaherd.transport.queued import QueuedChannel
from llamaherd.transport.sockets import Gatekeeper, SocketPump

__all__ = ["FrameChannel", "FrameTransport"]

#: How long the frames of channels just closed may take to leave, in milliseconds.
_LINGER_MS: Final = 100
#: After a worker's death: how often to ask whether its connection is gone, and how long to go on asking, in seconds.
_PROBE_SECONDS: Final = 0.005
_PROBE_LIMIT_SECONDS: Final = 1.0
#: The same for a worker that died before it greeted, whose greeting may still be on its way.
_GREETING_SECONDS: Final = 0.25
_BACKLOG: Final = 1024
# Plain numbers: the arithmetic of zmq's enums costs more than a send.
_LAST: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)

#: Without pyzmq's outer layer, which costs as much again.
_send: Final = Bare.send

#: Sends ``[routing id, kind, body]``; False if nobody with that id is connected.
_Send = Callable[[bytes, bytes, bytes], bool]


class FrameChannel(QueuedChannel):
    """One worker's channel on the shared ROUTER."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        identity: str,
        *,
        send: _Send,
        when_empty: Callable[[Callable[[], None]], None],
        lifeline: int,
        on_release: Callable[["FrameChannel"], None],
    ) -> None:
        super().__init__(loop)
        self.identity = identity
        self.up_id = UP + identity.encode("ascii")
        self.down_id = DOWN + identity.encode("ascii")
        self._send_frames = send
        self._when_empty = when_empty
        self._lifeline = lifeline
        self._on_release = on_release
        self._greeted: set[bytes] = set()
        self._unsent: deque[tuple[bytes, bytes]] = deque()
        self._unsent_size = 0
        self._window = Window(SEND_LIMIT)
        self._meter = Meter(RECEIVE_LIMIT)
        self._exited_at: float | None = None

    def __repr__(self) -> str:
        ending = self._inbox.ending
        state = type(ending).__name__ if ending else "connected" if len(self._greeted) == 2 else "waiting"
        return f"<FrameChannel {self.identity} {state}, {len(self._inbox)} unread, {self._unsent_size} bytes unsent>"

    # --- receiving ----------------------------------------------------------------------------------------------------

    async def receive(self) -> Sequence[ChildMessage]:
        messages = await self._inbox.take()
        self._resume_receiving()
        return messages

    def arrived(self, parts: Sequence[bytes]) -> None:
        """Take one message from one of the worker's sockets, behind the socket's routing id."""
        if len(parts) == 3:
            routing_id, kind, body = parts
            if routing_id == self.up_id:
                self._hear(kind, body)
            elif kind == CREDIT:
                self._take_credit(body)
        elif len(parts) == 2 and not parts[1]:
            self._greet(parts[0])
        else:
            self._finish(BrokenChannel(f"not a record: {len(parts) - 1} frames instead of 2"))

    def _take_credit(self, total: bytes) -> None:
        self._window.acknowledge(total)
        self._flush()
        self._room_made()

    def _greet(self, routing_id: bytes) -> None:
        if routing_id in self._greeted:
            self._finish(BrokenChannel("the worker's connection was lost and made again; messages may be missing"))
            return
        self._greeted.add(routing_id)
        self._flush()

    def _hear(self, kind: bytes, body: bytes) -> None:
        if kind == BYE:
            # The worker closes its socket only now, when nothing of it can be lost any more.
            self._send_frames(self.up_id, BYE, b"")
            self._finish(EndOfChannel("the worker closed the channel"))
        elif self._inbox.ending is None and not kind.startswith(b"\x01"):
            self._inbox.put((from_child(kind, body),), wire_size(body))
            if self._inbox.on_messages is not None:
                self._resume_receiving()
            elif self._inbox.size > RECEIVE_LIMIT + wire_size(b"") + MAX_MESSAGE_BYTES:
                self._finish(BrokenChannel(f"the worker sent {self._inbox.size} bytes, more than it had credit for"))

    def peer_exited(self) -> None:
        if self._inbox.ending is None and self._exited_at is None:
            self._exited_at = self._loop.time()
            self._await_silence()

    def _await_silence(self) -> None:
        """End once ZeroMQ has read the dead worker's connection to its end.

        It says so by having no route to it any more. A descendant that kept the connection open is not waited for.
        """
        if self._inbox.ending is not None or self._exited_at is None:
            return
        greeted = self.up_id in self._greeted
        over = self._loop.time() - self._exited_at > (_PROBE_LIMIT_SECONDS if greeted else _GREETING_SECONDS)
        if over or (greeted and not self._send_frames(self.up_id, PROBE, b"")):
            self._when_empty(lambda: self._finish(EndOfChannel("the worker exited")))
        else:
            self._loop.call_later(_PROBE_SECONDS, self._await_silence)

    def _finish(self, error: ChannelError) -> None:
        self._inbox.end(error)
        self._lose_unsent(error)

    def _stop_receiving(self) -> None:
        """The credit stops with the reader."""

    def _resume_receiving(self) -> None:
        """Give credit for what the reader took."""
        if self._inbox.ending is None:
            credit = self._meter.due(self._inbox.taken)
            if credit is not None:
                self._send_frames(self.up_id, CREDIT, credit)

    # --- sending ------------------------------------------------------------------------------------------------------

    def _has_room(self) -> bool:
        return self._unsent_size <= SEND_LIMIT

    def _unsent_bytes(self) -> int:
        return self._unsent_size

    def _put(self, kind: str, body: bytes) -> None:
        self._unsent.append((kind.encode("ascii"), body))
        self._unsent_size += wire_size(body)
        self._flush()

    def _flush(self) -> None:
        if self.down_id not in self._greeted:
            return
        while self._unsent and self._window.is_open:
            kind, body = self._unsent[0]
            if not self._send_frames(self.down_id, kind, body):
                self._lose_unsent(EndOfChannel("the worker closed its end"))
                return
            self._unsent.popleft()
            self._unsent_size -= wire_size(body)
            self._window.sent(wire_size(body))
        if not self._unsent:
            self._sent_all()

    def _lose_unsent(self, error: ChannelError) -> None:
        self._unsent.clear()
        self._unsent_size = 0
        self._end_sending(error)
        self._sent_all()

    def _release(self) -> None:
        for routing_id in self._greeted:
            self._send_frames(routing_id, BYE, b"")
        self._unsent.clear()
        self._unsent_size = 0
        os.close(self._lifeline)
        self._on_release(self)


class FrameTransport:
    """One ROUTER for all workers.

    Args:
        endpoint: Empty for ``ipc`` in a private directory, or ``tcp://HOST:PORT``, where ``*`` lets the system
            choose the port.

    Raises:
        ValueError: the endpoint is anything else.
    """

    name = "zmq"

    def __init__(self, endpoint: str = "") -> None:
        if endpoint and not endpoint.startswith("tcp://"):
            raise ValueError(
                f"the zmq transport listens on tcp://HOST:PORT or, by default, a private socket, not {endpoint!r}"
            )
        self._listen = endpoint
        self._directory: PrivateDirectory | None = None
        self._channels: dict[bytes, FrameChannel] = {}
        self._keys: dict[str, bytes] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._gatekeeper: Gatekeeper | None = None

    def __repr__(self) -> str:
        return f"<FrameTransport {self._listen or 'not open'}, {len(self._channels) // 2} channels>"

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        # Keys are made before the context: libsodium's set-up and a closing context do not mix.
        self._server_key, secret = zmq.curve_keypair()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.router_mandatory = 1
        # A worker whose connection was cut may be back before ZeroMQ has noticed; without this it would be ignored.
        self._router.router_handover = 1
        self._router.sndhwm = self._router.rcvhwm = 0  # bounded by the credit instead
        self._router.maxmsgsize = MAX_MESSAGE_BYTES
        self._router.backlog = _BACKLOG
        self._router.linger = 0
        try:
            if self._listen:
                self._gatekeeper = Gatekeeper(loop, self._context)
                self._router.curve_server = 1
                self._router.curve_secretkey = secret
                self._router.zap_domain = b"llamaherd"
            else:
                self._directory, self._listen = _private_socket()
            self._router.bind(self._listen)
        except (OSError, zmq.ZMQError):
            self._close_sockets(0)
            self._context.term()
            raise
        self._listen = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._pump = SocketPump(loop, self._router, self._dispatch, named=self._gatekeeper is not None)

    async def endpoint(self, identity: str, on_log: Callable[[bytes], None]) -> Endpoint:
        del on_log  # a frame is never a log
        check_identity(identity)
        if self._context is None or self._router.closed:
            raise RuntimeError("the transport is not open")
        if identity in self._keys:
            raise ValueError(f"the identity {identity!r} is in use")
        public, secret = zmq.curve_keypair() if self._gatekeeper else (b"", b"")
        child_stdin, lifeline = os.pipe()
        channel = FrameChannel(
            asyncio.get_running_loop(),
            identity,
            send=self._send,
            when_empty=self._pump.when_empty,
            lifeline=lifeline,
            on_release=self._forget,
        )
        self._channels[channel.up_id] = self._channels[channel.down_id] = channel
        self._keys[identity] = public
        if self._gatekeeper:
            self._gatekeeper.admit(z85.decode(public), identity)
        address = ChildAddress(
            transport=self.name,
            endpoint=self._listen,
            identity=identity,
            server_key=self._server_key.decode() if self._gatekeeper else "",
            public_key=public.decode(),
            secret_key=secret.decode(),
        )
        return PreparedEndpoint(channel, address, stdin=child_stdin)

    async def aclose(self) -> None:
        if self._context is None or self._context.closed:
            return
        for channel in set(self._channels.values()):
            channel.abort()
        self._pump.close(_LINGER_MS)
        self._close_sockets(_LINGER_MS)
        # Waits for the lingering frames.
        await asyncio.to_thread(self._context.term)

    def _close_sockets(self, linger_ms: int) -> None:
        self._router.close(linger=linger_ms)
        if self._gatekeeper:
            self._gatekeeper.close()
        if self._directory:
            self._directory.remove()

    def _send(self, routing_id: bytes, kind: bytes, body: bytes) -> bool:
        self._pump.touched()
        router = self._router
        try:
            # Only the routing id can be refused, and then the socket waits for another one: nothing is half sent.
            _send(router, routing_id, _MORE)
            _send(router, kind, _MORE)
            _send(router, body, _LAST)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def _dispatch(self, parts: list[bytes], user: str | None) -> None:
        channel = self._channels.get(parts[0])
        if channel is None:
            # A stranger, or a spawn whose channel was closed before it connected: do not leave it waiting.
            if len(parts) == 2:
                self._send(parts[0], BYE, b"")
        elif self._gatekeeper is None or user == channel.identity:
            channel.arrived(parts)

    def _forget(self, channel: FrameChannel) -> None:
        del self._channels[channel.up_id], self._channels[channel.down_id]
        public = self._keys.pop(channel.identity)
        if self._gatekeeper:
            self._gatekeeper.dismiss(z85.decode(public))


def _private_socket() -> tuple[PrivateDirectory, str]:
    """Make a directory that only this user can enter; return it and the ``ipc`` endpoint inside it."""
    path = ""
    for base in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - the directory in it is private
        directory = PrivateDirectory(base)
        path = os.path.join(directory.path, "pool")
        if len(os.fsencode(path)) <= zmq.IPC_PATH_MAX_LEN:
            return directory, f"ipc://{path}"
        directory.remove()
    raise BrokenChannel(
        f"no directory for the socket: every path is over {zmq.IPC_PATH_MAX_LEN} bytes, the last is {path}"
    )
