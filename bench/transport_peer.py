"""The worker's side of the transport benchmark: ``python transport_peer.py``, started on an endpoint, or a thread.

It says one ``state`` when it is connected. Then each ``load`` names a piece of work, and its ``script`` the settings;
when that is done the peer sends a ``result`` for request 0 with what it cost here, as JSON.
"""

import ctypes
import json
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from llamaherd.transport import ChannelError, ChildChannel, connect, take_stdio
from llamaherd.transport.messages import Exit, Load, PoolMessage, Result, State, Threads, Tokenize
from pinning import pin
from workload import NOISE, answer, decode_step, load_state, numbered_state, stamps

__all__ = ["STATE_SIZE", "RawChannel", "serve"]

#: Bodies of this size are answered with a state.
STATE_SIZE: Final = 50

Settings = dict[str, Any]


class RawChannel(ChildChannel):
    """What the workers' ends of all transports add to the interface."""

    @abstractmethod
    def send_raw(self, kind: str, body: bytes) -> None:
        """Send a record that is encoded already."""


class Post:
    """What has arrived and was not yet worked on."""

    def __init__(self, channel: ChildChannel) -> None:
        self.channel = channel
        self._waiting: Sequence[PoolMessage] = ()

    def batch(self) -> Sequence[PoolMessage]:
        """Return at least one message."""
        if self._waiting:
            waiting, self._waiting = self._waiting, ()
            return waiting
        return self.channel.receive()

    def one(self) -> PoolMessage:
        first, *rest = self.batch()
        self._waiting = rest
        return first


def echo(post: Post, settings: Settings) -> None:
    """Answer every message until ``threads``."""
    size: int = settings["size"]
    reply = load_state() if size == STATE_SIZE else answer(size)
    send = post.channel.send
    while True:
        for message in post.batch():
            if isinstance(message, Threads):
                return
            send(reply)


def pace(post: Post, settings: Settings) -> Settings:
    """Send stamped decode steps at a rate; a step that comes late is not skipped."""
    rate, count = settings["rate"], settings["count"]
    calls: list[int] = []
    start = time.monotonic()
    for number in range(count):
        if (early := start + number / rate - time.monotonic()) > 0:
            time.sleep(early)
        before = time.monotonic_ns()
        post.channel.send(decode_step(before))
        calls.append(time.monotonic_ns() - before)
    elapsed = time.monotonic() - start
    return {"send_us": sorted(calls)[count // 2] / 1000, "rate": count / elapsed}


def pour(post: Post, settings: Settings) -> None:
    """Send as fast as the pool takes it, one call per message."""
    message = decode_step(10**15) if settings["size"] == 0 else answer(settings["size"])
    send = post.channel.send
    for _ in range(settings["count"]):
        send(message)


def drain(post: Post, settings: Settings) -> None:
    """Take a number of messages."""
    left: int = settings["count"]
    while left > 0:
        left -= len(post.batch())


def flood(post: Post, settings: Settings) -> None:
    """Send numbered states while native code prints on both standard streams."""
    write = ctypes.CDLL(None).write
    done = threading.Event()

    def print_noise() -> None:
        while not done.is_set():
            for piece in NOISE:
                write(1, piece, len(piece))
                write(2, piece, len(piece))

    printer = threading.Thread(target=print_noise)
    printer.start()
    try:
        states(post, settings)
    finally:
        done.set()
        printer.join()


def states(post: Post, settings: Settings) -> None:
    """Send numbered states, at a rate if there is one."""
    for number, stamp in enumerate(stamps(settings)):
        post.channel.send(numbered_state(number, stamp))


def stall(post: Post, settings: Settings) -> Settings:
    """Read nothing for some seconds, then take all commands; they carry their numbers."""
    time.sleep(settings["seconds"])
    numbers: list[int] = []
    while True:
        for message in post.batch():
            if isinstance(message, Threads):
                count: int = settings["count"]
                return {"received": len(set(numbers) & set(range(count))), "in_order": numbers == sorted(numbers)}
            numbers.append(message.request if isinstance(message, Tokenize) else -1)


WORK: Final[dict[str, Callable[[Post, Settings], Settings | None]]] = {
    work.__name__: work for work in (echo, pace, pour, drain, flood, states, stall)
}


def serve(channel: ChildChannel, clock: Callable[[], float], hello: Settings) -> None:
    """Do what the pool asks until ``exit``. ``clock`` counts this side's processor seconds."""
    post = Post(channel)
    channel.send(State(state="ready", payload=hello))
    while not isinstance(message := post.one(), Exit):
        if isinstance(message, Load):
            before = clock()
            report = WORK[message.model](post, message.script) or {}
            report["cpu_s"] = clock() - before
            channel.send(Result(request=0, text=json.dumps(report)))
    channel.close()


def _main() -> None:
    pin("worker")
    stdio = take_stdio()
    before = time.perf_counter_ns()
    channel = connect(stdio)
    hello = {"connect_us": (time.perf_counter_ns() - before) / 1000}
    try:
        serve(cast(RawChannel, channel), time.process_time, hello)
    except ChannelError:
        os._exit(1)  # the pool's side gave up


if __name__ == "__main__":
    _main()
