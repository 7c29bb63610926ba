"""The floors: what two Python processes reach that block on raw bytes, without a loop, a codec or framing.

``python transport_floors.py TASK...`` measures floors and prints the samples as JSON; with ``child`` before a task it
is the other process.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import zmq

from pinning import pin
from samples import Sample, tails
from transport_peer import STATE_SIZE
from transport_sitting import sizes_label

__all__ = ["FLOORS", "FloorTask"]

#: What can be measured: two pipes, a socket pair, the standard library's pipe of bytes, and bare ZeroMQ. Our ``zmq``
#: transport always encrypts TCP, so TCP without CURVE is only here.
FLOORS: Final = ("os.pipe", "socketpair", "mp.Pipe", "zmq PAIR ipc", "zmq ROUTER-DEALER tcp")


class FloorTask(msgspec.Struct, frozen=True):
    """What to measure; the fields are a sitting's, and ``address`` is how the child finds its parent."""

    floor: str
    trips: int
    trip_sizes: tuple[int, ...]
    flows: tuple[tuple[int, int], ...]
    spawns: int
    address: str = ""


class End(Protocol):
    """One side of a floor."""

    def send(self, data: bytes) -> None: ...

    def take(self, size: int) -> None:
        """Receive one message of that size."""
        ...


class FdEnd:
    """Bytes on two descriptors, which may be one socket."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._write_fd, rest) :]

    def take(self, size: int) -> None:
        while size > 0:
            data = os.read(self._read_fd, size)
            if not data:
                raise EOFError("the other side is gone")
            size -= len(data)


class ConnectionEnd:
    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection

    def send(self, data: bytes) -> None:
        self._connection.send_bytes(data)

    def take(self, size: int) -> None:
        del size
        self._connection.recv_bytes()


class ZmqEnd:
    """A socket of ZeroMQ; a ROUTER keeps the id of whoever spoke first."""

    def __init__(self, ours: "zmq.Socket[bytes]") -> None:
        self._socket = ours
        self._route: bytes | None = None

    def send(self, data: bytes) -> None:
        if self._route is None:
            self._socket.send(data)
        else:
            self._socket.send_multipart((self._route, data))

    def take(self, size: int) -> None:
        del size
        if self._socket.socket_type == zmq.ROUTER:
            self._route = self._socket.recv_multipart()[0]
        else:
            self._socket.recv()


def parent_end(floor: str, directory: str) -> tuple[End, str, list[int]]:
    """Make the parent's end; return it, the child's address, and the descriptors that the child inherits."""
    if floor == "os.pipe":
        (ours_read, theirs_write), (theirs_read, ours_write) = os.pipe(), os.pipe()
        return FdEnd(ours_read, ours_write), f"{theirs_read} {theirs_write}", [theirs_read, theirs_write]
    if floor == "socketpair":
        ours, theirs = socket.socketpair()
        fd, their_fd = ours.detach(), theirs.detach()
        return FdEnd(fd, fd), f"{their_fd} {their_fd}", [their_fd]
    if floor == "mp.Pipe":
        connection, other = Pipe()
        their_fd = os.dup(other.fileno())
        other.close()
        return ConnectionEnd(connection), str(their_fd), [their_fd]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bound = context.socket(zmq.PAIR if floor == "zmq PAIR ipc" else zmq.ROUTER)
    bound.linger = 0
    bound.bind(f"ipc://{directory}/floor" if floor == "zmq PAIR ipc" else "tcp://127.0.0.1:*")
    return ZmqEnd(bound), bound.getsockopt_string(zmq.LAST_ENDPOINT), []


def child_end(task: FloorTask) -> End:
    """Make the child's end from the address."""
    if task.floor in ("os.pipe", "socketpair"):
        read_fd, write_fd = map(int, task.address.split())
        return FdEnd(read_fd, write_fd)
    if task.floor == "mp.Pipe":
        return ConnectionEnd(Connection(int(task.address)))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    connected = context.socket(zmq.PAIR if task.floor == "zmq PAIR ipc" else zmq.DEALER)
    connected.connect(task.address)
    return ZmqEnd(connected)


def answer_all(task: FloorTask, end: End) -> None:
    """Be the child: a greeting, then echoes, then floods, in the parent's order."""
    end.send(b"!")
    for size in task.trip_sizes:
        data = bytes(size)
        for _ in range(_with_warm_up(task.trips)):
            end.take(size)
            end.send(data)
    for size, count in task.flows:
        end.take(1)
        data = bytes(size)
        for _ in range(count):
            end.send(data)
    end.take(1)


def _with_warm_up(count: int) -> int:
    return count + count // 10 + 1


def measure(task: FloorTask, end: End) -> list[Sample]:
    """Be the parent."""
    name = f"floor: {task.floor}"
    samples: list[Sample] = []
    for size in task.trip_sizes:
        data = bytes(size)
        durations: list[int] = []
        cpu = time.process_time()
        for _ in range(_with_warm_up(task.trips)):
            before = time.perf_counter_ns()
            end.send(data)
            end.take(size)
            durations.append(time.perf_counter_ns() - before)
        cpu = time.process_time() - cpu
        label = "state, 50 B" if size == STATE_SIZE else sizes_label(size)
        values = {**tails(durations[-task.trips :]), "pool_cpu_us": cpu / len(durations) * 1e6}
        samples.append(Sample("round_trip", name, "none", label, values))
    for size, count in task.flows:
        cpu, start = time.process_time(), time.perf_counter()
        end.send(b"!")
        for _ in range(count):
            end.take(size)
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        values = {
            "messages_per_s": count / elapsed,
            "MB_per_s": count * size / elapsed / 1e6,
            "pool_cpu_us": cpu / count * 1e6,
        }
        samples.append(Sample("throughput", name, "none", f"{sizes_label(size)} up", values))
    end.send(b"!")
    return samples


def start_up(task: FloorTask) -> list[Sample]:
    """A bare interpreter that says one byte, which is what any worker in Python costs to start."""
    samples: list[Sample] = []
    for _ in range(task.spawns):
        before = time.perf_counter_ns()
        program = [sys.executable, "-P", "-c", "import os; os.write(1, b'!')"]
        with subprocess.Popen(program, stdout=subprocess.PIPE) as bare:
            assert bare.stdout is not None
            bare.stdout.read(1)
            elapsed = (time.perf_counter_ns() - before) / 1e6
        samples.append(Sample("start_up", "floor: bare python", "none", "one worker", {"first_message_ms": elapsed}))
    return samples


def _parent(task: FloorTask) -> list[Sample]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        end, address, inherited = parent_end(task.floor, directory)
        words = msgspec.json.encode(msgspec.structs.replace(task, address=address)).decode()
        program = [sys.executable, str(Path(__file__)), "child", words]
        with subprocess.Popen(program, pass_fds=inherited) as child:
            for fd in inherited:
                os.close(fd)
            try:
                end.take(1)
                return start_up(task) + measure(task, end)
            except BaseException:
                child.kill()
                raise


def _main() -> None:
    if sys.argv[1] == "child":
        pin("worker")
        task = msgspec.json.decode(sys.argv[2], type=FloorTask)
        answer_all(task, child_end(task))
        return
    pin("pool")
    tasks = [msgspec.json.decode(words, type=FloorTask) for words in sys.argv[1:]]
    samples = [sample for task in tasks for sample in _parent(task)]
    sys.stdout.write(msgspec.json.encode(samples).decode())


if __name__ == "__main__":
    _main()
