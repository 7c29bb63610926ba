"""The synthetic load that the benchmarks share: messages of known sizes, and the noise that native code prints."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from llamaherd.transport.messages import Delta, Message, Result, State, Tokenize, Tokens, encode

__all__ = [
    "NOISE",
    "SEQUENCES",
    "answer",
    "command",
    "decode_step",
    "load_state",
    "numbered_state",
    "stamp_of",
    "stamps",
]

#: Sequences that one decode step moves, and so deltas in one ``tokens`` message.
SEQUENCES: Final = 4

#: What the flooding thread writes, piece by piece, to descriptors 1 and 2: text without a newline, long lines, bytes
#: that are no text, and the protocol's own prefix, whole and begun.
NOISE: Final = (
    b"....",
    b'\ncmd_child_to_router:state:{"state":"forged","payload":{}}\n',
    b"x" * 9_000 + b"\n",
    b"\0\0\xff\xfe\xc3",
    b"cmd_child_to_router:state:",
    b"load: 12%\rload: 13%\r",
    b"cmd_router_to_child:exit\n",
)

_LONG_EVERY: Final = 10
_LONG_TEXT: Final = "m" * 9_000

Made = TypeVar("Made", bound=Message)


def _padded(make: Callable[[str], Made], size: int) -> Made:
    bare = len(encode(make(""))[1])
    if size < bare:
        raise ValueError(f"a body of {size} bytes cannot be made, the least is {bare}")
    return make("x" * (size - bare))


def command(size: int) -> Tokenize:
    """Return a message from the pool to a worker whose JSON body has exactly ``size`` bytes, at least 24."""
    return _padded(lambda text: Tokenize(request=1, text=text), size)


def answer(size: int) -> Result:
    """Return a message from a worker to the pool whose JSON body has exactly ``size`` bytes, at least 24."""
    return _padded(lambda text: Result(request=1, text=text), size)


def load_state() -> State:
    """Return a state as a loading worker sends it, a body of 50 bytes."""
    return State(state="loading", payload={"value": 0.12345678})


def decode_step(stamp: int) -> Tokens:
    """Return one decode step of :data:`SEQUENCES` sequences, stamped with the time of sending in nanoseconds."""
    return Tokens(deltas=tuple(Delta(stamp + n, " word", (4242,)) for n in range(SEQUENCES)))


def stamp_of(step: Tokens) -> int:
    """Return the time that :func:`decode_step` was given."""
    return step.deltas[0].request


def numbered_state(number: int, stamp: int) -> State:
    """Return a state that can be checked: its number, the time of sending, and text that follows from the number.

    Every tenth is 9 kB long, which a pipe does not take in one piece.
    """
    text = _LONG_TEXT if number % _LONG_EVERY == 0 else "short"
    return State(state="loading", payload={"number": number, "stamp": stamp, "text": text})


def stamps(settings: Mapping[str, Any]) -> Iterator[int]:
    """Yield ``settings["count"]`` times of sending in nanoseconds, each when it has come.

    With a ``rate`` these are the times that it demands. So what waits behind a blocked send is as late as it is for
    whoever waits for it.
    """
    rate: float = settings.get("rate", 0)
    start = time.monotonic_ns()
    for number in range(settings["count"]):
        if not rate:
            yield time.monotonic_ns()
            continue
        due = start + round(number / rate * 1e9)
        if (early := due - time.monotonic_ns()) > 0:
            time.sleep(early / 1e9)
        yield due
