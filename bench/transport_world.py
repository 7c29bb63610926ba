"""The pool's side of the transport benchmark: opens transports by name and runs peers on them."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import transport_peer
from llamaherd.transport import Channel, ChannelError, Endpoint, Transport, make_transport
from llamaherd.transport.memory import memory_pair
from llamaherd.transport.messages import ChildMessage, Exit, Load, Result, State

__all__ = ["PROCESS_TRANSPORTS", "TRANSPORTS", "Peer", "World", "no_log", "open_transport", "open_world", "run"]

T = TypeVar("T")

PROCESS_TRANSPORTS: Final = ("pipe", "stdio", "zmq-ipc", "zmq-tcp-curve")
TRANSPORTS: Final = ("memory", *PROCESS_TRANSPORTS)

_PEER: Final = str(Path(transport_peer.__file__))


def run(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a new loop, ``asyncio`` or ``uvloop``."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def no_log(data: bytes) -> None:
    """Take what is on a protocol stream and is no protocol."""
    del data


def open_transport(name: str) -> Transport:
    """Return a transport of :data:`PROCESS_TRANSPORTS`, not open yet."""
    if name == "zmq-ipc":
        return make_transport("zmq")
    if name == "zmq-tcp-curve":
        return make_transport("zmq", endpoint="tcp://127.0.0.1:*")
    return make_transport(name)


class Peer:
    """A peer that said hello.

    Attributes:
        channel: The pool's end.
        hello: What the peer says of its start.
        created_us: How long the pool took to make the channel.
        started_ms: From before that until the hello arrived.
    """

    def __init__(self, channel: Channel, runs: subprocess.Popen[bytes] | threading.Thread) -> None:
        self.channel = channel
        self.hello: dict[str, float] = {}
        self.created_us = 0.0
        self.started_ms = 0.0
        self._runs = runs
        self._waiting: Sequence[ChildMessage] = ()

    async def batch(self, most: int) -> Sequence[ChildMessage]:
        """Return what has arrived, but at most so many messages, and at least one."""
        waiting = self._waiting or await self.channel.receive()
        self._waiting = waiting[most:]
        return waiting[:most]

    async def one(self) -> ChildMessage:
        return (await self.batch(1))[0]

    def cpu_s(self) -> float:
        """Return the processor seconds of the pool's side so far."""
        # In memory both sides are threads of this process.
        return time.thread_time() if isinstance(self._runs, threading.Thread) else time.process_time()

    async def begin(self, work: str, **settings: object) -> None:
        await self.channel.send(Load(model=work, script=settings))

    async def report(self) -> dict[str, float]:
        """Return what the peer says after a piece of work; the next message must be that."""
        message = await self.one()
        if not (isinstance(message, Result) and message.request == 0 and message.text):
            raise RuntimeError(f"the peer should have reported, but it sent {message!r:.200}")
        report: dict[str, float] = json.loads(message.text)
        return report

    async def stop(self) -> None:
        with suppress(ChannelError):
            await self.channel.send(Exit())
        if isinstance(self._runs, threading.Thread):
            await asyncio.to_thread(self._runs.join)
        else:
            try:
                await asyncio.to_thread(self._runs.wait, 10)
            except subprocess.TimeoutExpired:
                self.kill()
        self.channel.abort()

    def kill(self) -> None:
        if isinstance(self._runs, subprocess.Popen) and self._runs.poll() is None:
            self._runs.kill()
            self._runs.wait()
        self.channel.abort()


class World:
    """One open transport, or none for ``memory``, and the peers on it."""

    def __init__(self, transport: Transport | None) -> None:
        self._transport = transport
        self._peers: list[Peer] = []

    async def start(self, *, stderr: int = subprocess.DEVNULL) -> Peer:
        """Start a peer and wait for its hello. ``stderr`` is where its log goes."""
        before = time.perf_counter_ns()
        if self._transport is None:
            channel, child = memory_pair()
            created = time.perf_counter_ns()
            thread = threading.Thread(target=transport_peer.serve, args=(child, time.thread_time, {"connect_us": 0}))
            thread.start()
            peer = Peer(channel, thread)
        else:
            endpoint = await self._transport.endpoint(f"peer#{len(self._peers)}", no_log)
            created = time.perf_counter_ns()
            peer = Peer(endpoint.channel, spawn([_PEER], endpoint, stderr))
        self._peers.append(peer)
        hello = await peer.one()
        peer.started_ms = (time.perf_counter_ns() - before) / 1e6
        peer.created_us = (created - before) / 1000
        if not isinstance(hello, State):
            raise RuntimeError(f"the peer did not say hello but {hello!r:.200}")
        peer.hello = dict(hello.payload or {})
        return peer

    async def dispose(self) -> None:
        for peer in self._peers:
            peer.kill()
        if self._transport is not None:
            await self._transport.aclose()


def spawn(arguments: list[str], endpoint: Endpoint, stderr: int) -> subprocess.Popen[bytes]:
    """Start a Python program on an endpoint as the pool's launcher does."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=endpoint.stdin,
        stdout=stderr if endpoint.stdout is None else endpoint.stdout,
        stderr=stderr,
        pass_fds=endpoint.pass_fds,
        env={**os.environ, **endpoint.env},
        start_new_session=True,
    )
    endpoint.spawned()
    return process


@asynccontextmanager
async def open_world(name: str) -> AsyncGenerator[World]:
    """Open a transport of :data:`TRANSPORTS`; on leaving, end every peer and close it."""
    transport = None if name == "memory" else open_transport(name)
    if transport is not None:
        await transport.open()
    world = World(transport)
    try:
        yield world
    finally:
        await world.dispose()
