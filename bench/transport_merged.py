r"""The reference's way, to compare with: standard output and error are one pipe, and a state is a line with a prefix.

The reader takes a state wherever a line begins with the prefix. The writer of the current reference puts a newline
before its line, in the same write; the earlier one did not (``--bare``). Commands are lines on standard input. As a
program this is the worker: ``python transport_merged.py WORK SETTINGS [--bare]``.
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any, Final

from llamaherd.transport.messages import encode
from pinning import pin
from workload import NOISE, numbered_state, stamps

__all__ = ["PREFIX", "read_states", "start_merged", "write_commands"]

PREFIX: Final = b"cmd_child_to_router:state:"
_COMMAND: Final = b"cmd_router_to_child:"
#: Longest line that the reader keeps together.
_MAX_LINE: Final = 1024 * 1024

Settings = dict[str, Any]


def start_merged(work: str, settings: Settings, *, bare: bool) -> subprocess.Popen[bytes]:
    """Start a worker whose standard output and error are one pipe."""
    return subprocess.Popen(
        [sys.executable, __file__, work, json.dumps(settings), *(["--bare"] if bare else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def read_states(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield what follows the prefix on each line that begins with it, until the end of the stream."""
    while line := stream.readline(_MAX_LINE):
        if line.startswith(PREFIX):
            yield line[len(PREFIX) :].rstrip(b"\n")


def write_commands(stream: IO[bytes], count: int, size: int) -> None:
    """Send numbered commands of about ``size`` bytes and an ``exit``, blocking."""
    for number in range(count):
        stream.write(b"%snumber:%d:%s\n" % (_COMMAND, number, b"x" * size))
        stream.flush()
    stream.write(_COMMAND + b"exit\n")
    stream.flush()


def _send(body: bytes, opening: bytes) -> None:
    data = memoryview(opening + PREFIX + body + b"\n")
    while data:
        data = data[os.write(1, data) :]


def _states(settings: Settings, opening: bytes) -> None:
    for number, stamp in enumerate(stamps(settings)):
        _send(encode(numbered_state(number, stamp))[1], opening)


def _flood(settings: Settings, opening: bytes) -> None:
    write = ctypes.CDLL(None).write
    done = threading.Event()

    def print_noise() -> None:
        while not done.is_set():
            for piece in NOISE:
                write(1, piece, len(piece))
                write(2, piece, len(piece))

    printer = threading.Thread(target=print_noise)
    printer.start()
    _states(settings, opening)
    done.set()
    printer.join()


def _stall(settings: Settings, opening: bytes) -> None:
    time.sleep(settings["seconds"])
    numbers: set[int] = set()
    for line in sys.stdin.buffer:
        if not line.startswith(_COMMAND):
            continue
        word, _, rest = line[len(_COMMAND) :].partition(b":")
        if word.strip() == b"exit":
            break
        numbers.add(int(rest.partition(b":")[0]))
    _send(b'{"received":%d}' % len(numbers), opening)


def _main() -> None:
    pin("worker")
    work = {"states": _states, "flood": _flood, "stall": _stall}[sys.argv[1]]
    work(json.loads(sys.argv[2]), b"" if "--bare" in sys.argv else b"\n")


if __name__ == "__main__":
    _main()
