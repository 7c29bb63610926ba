r"""Lines on standard input and output: the framing of the ``stdio`` transport, and what llama.cpp's own children speak.

::

    cmd_child_to_router:<kind>:<json>\n      worker to pool, on the worker's standard output
    cmd_router_to_child:<kind>[:<json>]\n    pool to worker, on its standard input

``cmd_child_to_router:state:{"state":...,"payload":{...}}`` and ``cmd_router_to_child:exit`` are llama.cpp's, byte
for byte. A worker writes a newline before its line as well, in the same write, to end whatever a print left open.

Standard output may carry any program's prints. So a record is recognised at the start of a line only, every other
byte is log, and nothing on the stream can break it: a line over the cap is skipped and reported once.
"""

from collections.abc import Callable
from typing import Final, Generic, Literal, TypeVar, cast

from llamaherd.transport.errors import BrokenChannel
from llamaherd.transport.framing import MALFORMED, MAX_KIND_BYTES, VIEW_BYTES, Decoder
from llamaherd.transport.messages import MAX_MESSAGE_BYTES, Unknown

__all__ = ["CHILD_PREFIX", "POOL_PREFIX", "LineFraming"]

Received = TypeVar("Received")

#: Starts each line that a worker sends.
CHILD_PREFIX: Final = b"cmd_child_to_router:"
#: Starts each line that a pool sends.
POOL_PREFIX: Final = b"cmd_router_to_child:"

_MAX_LINE: Final = len(CHILD_PREFIX) + MAX_KIND_BYTES + 1 + MAX_MESSAGE_BYTES
_EXCERPT: Final = 200


def _ignore(data: bytes) -> None:
    del data


class LineFraming(Generic[Received]):
    """See :class:`~llamaherd.transport.framing.Framing`.

    Args:
        decode: Makes the messages of the receiving direction.
        sends: The prefix of lines sent.
        receives: The prefix of lines received.
        on_log: Called with the bytes that are not protocol, as soon as they are known not to be; empty lines are
            dropped.
    """

    def __init__(
        self,
        decode: Decoder[Received],
        *,
        sends: bytes,
        receives: bytes,
        on_log: Callable[[bytes], None] = _ignore,
    ) -> None:
        self._decode = decode
        # A stray print may have left a line open on a worker's output, never on its input.
        self._opening = (b"\n" if sends == CHILD_PREFIX else b"") + sends
        self._prefix = receives
        self._on_log = on_log
        self._partial = bytearray()
        self.missing = 0
        # What the bytes up to the next newline are: a line of which _partial is the start, log, or an over-long record.
        self._inside: Literal["line", "log", "oversize"] = "line"

    def frame(self, kind: str, body: bytes) -> bytes:
        if not body:
            return b"".join((self._opening, kind.encode("ascii"), b"\n"))
        return b"".join((self._opening, kind.encode("ascii"), b":", body, b"\n"))

    def feed(self, data: bytes, into: list[Received]) -> None:
        log: list[bytes] = []
        known, prefix, kind_at, start = self._decode.known, self._prefix, len(self._prefix), 0
        if self._partial or self._inside != "line":
            start = data.find(b"\n") + 1
            if start == 0:
                self._extend_line(data, into, log)
                start = len(data)
            else:
                self._end_line(data[: start - 1], into, log)
        while (stop := data.find(b"\n", start)) >= 0:
            if data.startswith(prefix, start) and stop - start < VIEW_BYTES:
                kind, _, body = data[start + kind_at : stop].partition(b":")
                try:
                    into.append(known[kind](body))
                except MALFORMED:
                    into.append(self._decode(kind, body))
            elif stop > start:
                self._end_line(data[start:stop], into, log)
            start = stop + 1
        if start < len(data):
            self._extend_line(data[start:], into, log)
        if log:
            self._on_log(b"".join(log))

    def _end_line(self, piece: bytes, into: list[Received], log: list[bytes]) -> None:
        inside, self._inside = self._inside, "line"
        if inside == "log":
            log += (piece, b"\n")
        if inside != "line":
            return
        line: bytes | bytearray = piece
        if self._partial:
            self._partial += piece
            line, self._partial = self._partial, bytearray()
        if line.startswith(self._prefix):
            into.append(self._parse(line))
        elif line:
            log += (bytes(line), b"\n")

    def _extend_line(self, piece: bytes, into: list[Received], log: list[bytes]) -> None:
        if self._inside == "log":
            log.append(piece)
        if self._inside != "line":
            return
        self._partial += piece
        if self._partial.startswith(self._prefix):
            if len(self._partial) <= _MAX_LINE:
                return
            into.append(self._parse(self._partial[: _MAX_LINE + 1]))
            self._inside = "oversize"
        elif self._prefix.startswith(self._partial):
            return
        else:
            log.append(bytes(self._partial))
            self._inside = "log"
        self._partial.clear()

    def _parse(self, line: bytes | bytearray) -> Received:
        kind_end = line.find(b":", len(self._prefix))
        if kind_end < 0:
            kind_end = len(line)
        kind = bytes(line[len(self._prefix) : kind_end])
        body = line[kind_end + 1 :] if len(line) < VIEW_BYTES else memoryview(line)[kind_end + 1 :]
        if len(line) > _MAX_LINE or len(body) > MAX_MESSAGE_BYTES:
            reason = f"a line over the cap of {_MAX_LINE} bytes"
            unknown = Unknown(str(kind[:64], "ascii", "replace"), reason, bytes(body[:_EXCERPT]))
            return cast("Received", unknown)  # every direction's messages include it
        return self._decode(kind, body)

    def finish(self) -> BrokenChannel | None:
        rest = bytes(self._partial)
        self._partial.clear()
        if rest.startswith(self._prefix):
            return BrokenChannel(f"the stream ended inside a line: {len(rest)} bytes, {rest[:_EXCERPT]!r}")
        if rest:
            self._on_log(rest)
        return None
