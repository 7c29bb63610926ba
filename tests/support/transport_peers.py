"""The worker's side of the transport tests: one function per scenario, run in a process of its own or in a thread.

As a program: ``python transport_peers.py SCENARIO``. Two inherited pipes connect it to the test beside the channel:
*notes* carries text to the test, and reading from *gate* blocks until the test opens it.
"""

import ctypes
import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from llamaherd.transport import (
    CHANNEL_ENV,
    ChannelClosed,
    ChannelError,
    ChildChannel,
    EndOfChannel,
    MessageTooLarge,
    connect,
    take_stdio,
)
from llamaherd.transport.messages import Exit, PoolMessage, Result, State, Stats, Threads, Tokenize

__all__ = ["FIREHOSE_COUNT", "FIREHOSE_TEXT", "FLOOD_STATES", "MANY", "SCENARIOS", "Peer", "RawChannel"]

MANY = 10_000
FIREHOSE_COUNT = 3_000
FIREHOSE_TEXT = "x" * 8_000
FLOOD_STATES = 2_000


class RawChannel(ChildChannel):
    """What the workers' ends of all transports add to the interface, for the tests."""

    @abstractmethod
    def send_raw(self, kind: str, body: bytes) -> None:
        """Send a record that no message of this version says."""


@dataclass
class Peer:
    """What a scenario may use."""

    channel: RawChannel
    notes: int
    gate: int

    def note(self, text: str) -> None:
        os.write(self.notes, text.encode() + b"\n")

    def wait_for_gate(self) -> None:
        os.read(self.gate, 1)

    def receive_until_exit(self) -> list[PoolMessage]:
        received: list[PoolMessage] = []
        while not any(isinstance(message, Exit) for message in received):
            received += self.channel.receive()
        return received[:-1]


def echo(peer: Peer) -> None:
    while True:
        for message in peer.channel.receive():
            if isinstance(message, Threads):
                peer.channel.send(Stats(rss_bytes=message.n))
            elif isinstance(message, Tokenize):
                peer.channel.send(Result(request=message.request, text=str(message.text)))
            elif isinstance(message, Exit):
                peer.channel.close()
                return


def duplex(peer: Peer) -> None:
    def send() -> None:
        for number in range(MANY):
            peer.channel.send(Stats(rss_bytes=number))

    sender = threading.Thread(target=send)
    sender.start()
    received = peer.receive_until_exit()
    sender.join()
    in_order = [m.n for m in received if isinstance(m, Threads)] == list(range(MANY))
    peer.note(f"{len(received)} {in_order}")
    peer.channel.close()


def two_senders(peer: Peer) -> None:
    def send(first: int) -> None:
        for number in range(first, first + 1000):
            peer.channel.send(Stats(rss_bytes=number))

    senders = [threading.Thread(target=send, args=(first,)) for first in (0, 1000)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    peer.channel.close()


def send_too_large(peer: Peer) -> None:
    try:
        peer.channel.send(Result(request=1, text="x" * (64 * 1024 * 1024)))
    except MessageTooLarge as error:
        peer.channel.send(Result(request=2, text=type(error).__name__))
    peer.channel.close()


def deaf(peer: Peer) -> None:
    peer.channel.send(Stats())
    peer.wait_for_gate()
    received = peer.receive_until_exit()
    peer.channel.send(Result(request=0, tokens=tuple(m.request for m in received if isinstance(m, Tokenize))))
    peer.channel.close()


def firehose(peer: Peer) -> None:
    for number in range(FIREHOSE_COUNT):
        peer.channel.send(Result(request=number, text=FIREHOSE_TEXT))
        os.write(peer.notes, b".")
    peer.channel.close()


def send_and_close(peer: Peer) -> None:
    for number in range(500):
        peer.channel.send(Stats(rss_bytes=number))
    peer.channel.close()


def send_and_close_unread(peer: Peer) -> None:
    """Close in order although commands are waiting to be read."""
    peer.wait_for_gate()
    send_and_close(peer)


def send_and_hang(peer: Peer) -> None:
    for number in range(500):
        peer.channel.send(Stats(rss_bytes=number))
    peer.note("sent")
    peer.wait_for_gate()


def count_to_the_end(peer: Peer) -> None:
    numbers: list[int] = []
    try:
        while True:
            numbers += [m.n for m in peer.channel.receive() if isinstance(m, Threads)]
    except ChannelError as error:
        peer.note(f"{numbers == list(range(500))} {type(error).__name__}")
    try:
        while True:
            peer.channel.send(Stats())
    except ChannelError as error:
        peer.note(type(error).__name__)
    peer.channel.close()


def close_in_another_thread(peer: Peer) -> None:
    def close() -> None:
        peer.wait_for_gate()
        peer.channel.close()

    closer = threading.Thread(target=close)
    closer.start()
    peer.channel.send(Stats())
    endings: list[str] = []
    for call in (peer.channel.receive, peer.channel.receive, lambda: peer.channel.send(Stats())):
        try:
            call()
        except ChannelClosed as error:
            endings.append(type(error).__name__)
    closer.join()
    peer.channel.close()
    peer.note(" ".join(endings))


def strangers(peer: Peer) -> None:
    peer.channel.send(State(state="hibernating", payload={}))
    peer.channel.send_raw("invented", b'{"a":1}')
    peer.channel.send_raw("load", b'{"model":"m"}')
    peer.channel.send_raw("stats", b'{"rss_bytes":"many"}')
    peer.channel.send_raw("stats", b"\xff\x00{")
    peer.channel.send_raw("stats", b"")
    peer.channel.send_raw("stats", b'{"rss_bytes":3,"colour":"red"}')
    peer.channel.close()


def leave_a_grandchild(peer: Peer) -> None:
    peer.channel.send(Stats())
    peer.channel.receive()
    if os.fork() == 0:
        peer.wait_for_gate()
    os._exit(0)


def flood(peer: Peer) -> None:
    """Print from C on both standard streams, the protocol's own prefix included, while states are sent."""
    write = ctypes.CDLL(None).write
    noise = (
        b"....",
        b'\ncmd_child_to_router:state:{"state":"forged","payload":{}}\n',
        b"x" * 9_000,
        b"\0\0\xff\xfe\xc3",
        b"cmd_child_to_router:state:",
        b"load: 12%\rload: 13%\r",
        b"cmd_router_to_child:exit\n",
    )
    done = threading.Event()

    def print_noise() -> None:
        while not done.is_set():
            for piece in noise:
                write(1, piece, len(piece))
                write(2, piece, len(piece))

    printer = threading.Thread(target=print_noise)
    printer.start()
    for number in range(FLOOD_STATES):
        peer.channel.send(State(state="loading", payload={"number": number}))
    done.set()
    printer.join()
    peer.channel.close()


def end_with_pool(peer: Peer) -> None:
    peer.channel.send(Stats())
    try:
        while True:
            peer.channel.receive()
    except EndOfChannel:
        peer.note("end")
    peer.channel.close()


SCENARIOS: dict[str, Callable[[Peer], None]] = {
    scenario.__name__: scenario
    for scenario in (
        echo,
        duplex,
        two_senders,
        send_too_large,
        deaf,
        firehose,
        send_and_close,
        send_and_close_unread,
        send_and_hang,
        count_to_the_end,
        close_in_another_thread,
        strangers,
        leave_a_grandchild,
        flood,
        end_with_pool,
    )
}


def _main() -> None:
    stdio = take_stdio()
    notes, gate = int(os.environ["PEER_NOTES"]), int(os.environ["PEER_GATE"])
    channel = cast(RawChannel, connect(stdio))
    assert CHANNEL_ENV not in os.environ
    SCENARIOS[sys.argv[1]](Peer(channel, notes, gate))


if __name__ == "__main__":
    _main()
