"""The pool's side of the transport tests: opens a transport, starts peers on it, and leaves nothing behind."""

import asyncio
import fcntl
import os
import subprocess
import sys
import termios
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import uvloop

import transport_peers
from llamaherd.transport import Channel, ChannelError, Transport, make_transport
from llamaherd.transport.memory import memory_pair
from llamaherd.transport.messages import ChildMessage
from patience import patience

__all__ = [
    "LOOPS",
    "PROCESS_TRANSPORTS",
    "TRANSPORTS",
    "Read",
    "Started",
    "World",
    "delivered",
    "open_descriptors",
    "open_world",
    "read_all",
    "run",
]

T = TypeVar("T")

LOOPS = ("asyncio", "uvloop")
PROCESS_TRANSPORTS = ("pipe", "stdio", "zmq-ipc", "zmq-tcp-curve")
TRANSPORTS = ("memory", *PROCESS_TRANSPORTS)

#: No wait of a test lasts longer than this, in seconds; see ``patience``.
DEADLINE = 45.0


def run(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a new loop of the kind named, within the deadline."""

    async def bounded() -> T:
        async with patience(DEADLINE):
            return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        return runner.run(bounded())


def open_descriptors() -> set[int]:
    return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


async def read_all(channel: Channel) -> tuple[list[ChildMessage], ChannelError]:
    """Receive until the channel ends; return every message and the ending."""
    received: list[ChildMessage] = []
    while True:
        try:
            received += await channel.receive()
        except ChannelError as ending:
            return received, ending


async def delivered(channel: Channel) -> tuple[list[ChildMessage], ChannelError]:
    """As :func:`read_all`, by being called."""
    received: list[ChildMessage] = []
    ended: asyncio.Future[ChannelError] = asyncio.get_running_loop().create_future()

    def on_end(error: ChannelError) -> None:
        if not ended.done():  # nobody waits any more where the time was up
            ended.set_result(error)

    channel.deliver(received.extend, on_end)
    return received, await ended


#: Either of the two.
Read = Callable[[Channel], Coroutine[Any, Any, tuple[list[ChildMessage], ChannelError]]]


class Started:
    """A running peer: its channel, and the two side pipes."""

    def __init__(self, channel: Channel, notes: int, gate: int) -> None:
        self.channel = channel
        self._notes = notes
        self._gate = gate
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None
        self.log: list[bytes] = []
        self._log_reader: threading.Thread | None = None

    def open_gate(self) -> None:
        os.write(self._gate, b"o")

    def notes_waiting(self) -> int:
        """Return how many bytes of notes are unread."""
        return int.from_bytes(fcntl.ioctl(self._notes, termios.FIONREAD, bytes(4)), sys.byteorder)

    async def note(self) -> str:
        """Return the next line that the peer noted; empty if it ended without."""

        def read() -> str:
            text = b""
            while not text.endswith(b"\n") and (byte := os.read(self._notes, 1)):
                text += byte
            return text.decode().strip()

        return await asyncio.to_thread(read)

    async def wait(self) -> None:
        """Wait until the peer has ended, and its log with it."""
        if self.process is not None:
            await asyncio.to_thread(self.process.wait)
        for thread in (self.thread, self._log_reader):
            if thread is not None:
                await asyncio.to_thread(thread.join)

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    def collect_log(self) -> None:
        assert self.process is not None and self.process.stderr is not None
        stderr = self.process.stderr
        self._log_reader = threading.Thread(target=lambda: self.log.append(stderr.read()))
        self._log_reader.start()

    async def dispose(self) -> None:
        self.channel.abort()
        os.close(self._gate)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        await self.wait()
        # The end of the notes means that no descendant is left either.
        while await self.note():
            pass
        os.close(self._notes)
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()


class World:
    """One open transport (or none, for memory) and the peers on it."""

    def __init__(self, transport: Transport | None) -> None:
        self.transport = transport
        self.peers: list[Started] = []
        self.stray: list[bytes] = []  # bytes on the protocol stream that were no protocol

    async def start(self, scenario: str, *, collect_log: bool = False) -> Started:
        notes, their_notes = os.pipe()
        their_gate, gate = os.pipe()
        if self.transport is None:
            started = self._start_thread(scenario, notes, gate, their_notes, their_gate)
        else:
            started = await self._start_process(scenario, notes, gate, their_notes, their_gate, collect_log)
        self.peers.append(started)
        return started

    def _start_thread(self, scenario: str, notes: int, gate: int, their_notes: int, their_gate: int) -> Started:
        channel, child = memory_pair()
        started = Started(channel, notes, gate)
        peer = transport_peers.Peer(cast(transport_peers.RawChannel, child), their_notes, their_gate)

        def act() -> None:
            try:
                transport_peers.SCENARIOS[scenario](peer)
            except ChannelError:
                pass  # the test is over and took the channel away
            finally:
                os.close(their_notes)
                os.close(their_gate)

        started.thread = threading.Thread(target=act, name=scenario)
        started.thread.start()
        return started

    async def _start_process(
        self, scenario: str, notes: int, gate: int, their_notes: int, their_gate: int, collect_log: bool
    ) -> Started:
        assert self.transport is not None
        endpoint = await self.transport.endpoint(f"{scenario}#{len(self.peers)}", self.stray.append)
        started = Started(endpoint.channel, notes, gate)
        process = subprocess.Popen(  # noqa: ASYNC220 - a test may block its loop for a spawn
            [sys.executable, "-P", str(Path(transport_peers.__file__)), scenario],
            stdin=endpoint.stdin,
            stdout=2 if endpoint.stdout is None else endpoint.stdout,
            stderr=subprocess.PIPE if collect_log else None,
            pass_fds=(*endpoint.pass_fds, their_notes, their_gate),
            env={**os.environ, **endpoint.env, "PEER_NOTES": str(their_notes), "PEER_GATE": str(their_gate)},
            start_new_session=True,
        )
        endpoint.spawned()
        os.close(their_notes)
        os.close(their_gate)
        started.process = process
        if collect_log:
            started.collect_log()
        return started


@asynccontextmanager
async def open_world(name: str) -> AsyncGenerator[World]:
    """Open a transport by its name in :data:`TRANSPORTS`; on leaving, end every peer and close it."""
    makers: dict[str, Callable[[], Transport]] = {
        "pipe": lambda: make_transport("pipe"),
        "stdio": lambda: make_transport("stdio"),
        "zmq-ipc": lambda: make_transport("zmq"),
        "zmq-tcp-curve": lambda: make_transport("zmq", endpoint="tcp://127.0.0.1:*"),
    }
    transport = makers[name]() if name in makers else None
    if transport is not None:
        await transport.open()
    world = World(transport)
    try:
        yield world
    finally:
        for peer in world.peers:
            await peer.dispose()
        if transport is not None:
            await transport.aclose()
