"""Length-prefixed records: the framing of the ``pipe`` transport, the local default.

One record::

    4 bytes   length of all that follows, little-endian
    1 byte    length of the kind
    n bytes   the kind, ASCII
    rest      the body, JSON or nothing

The stream is an inherited socket that nothing but the channel writes to, so bytes that cannot be a record mean a
broken peer.
"""

import struct
from typing import Final, Generic, TypeVar

from llamaherd.transport.errors import BrokenChannel
from llamaherd.transport.framing import MAX_KIND_BYTES, Decode
from llamaherd.transport.messages import MAX_MESSAGE_BYTES

__all__ = ["RecordFraming"]

Received = TypeVar("Received")

_LENGTH: Final = struct.Struct("<I")
_HEADER: Final = _LENGTH.size
_MAX_RECORD: Final = 1 + MAX_KIND_BYTES + MAX_MESSAGE_BYTES


class RecordFraming(Generic[Received]):
    """See :class:`~llamaherd.transport.framing.Framing`. ``decode`` makes the messages of the receiving direction."""

    def __init__(self, decode: Decode[Received]) -> None:
        self._decode = decode
        self._partial = bytearray()
        self._wanted = _HEADER  # bytes that _partial must reach before there is anything to do
        self._kinds: dict[str, bytes] = {}

    def frame(self, kind: str, body: bytes) -> bytes:
        prefix = self._kinds.get(kind)
        if prefix is None:
            raw = kind.encode("ascii")
            prefix = self._kinds[kind] = bytes((len(raw),)) + raw
        return b"".join((_LENGTH.pack(len(prefix) + len(body)), prefix, body))

    def feed(self, data: bytes, into: list[Received]) -> None:
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                return
            data = bytes(self._partial)
            self._partial = bytearray()
        start, end = 0, len(data)
        while (body_at := start + _HEADER) <= end:
            (length,) = _LENGTH.unpack_from(data, start)
            if not 1 <= length <= _MAX_RECORD:
                raise BrokenChannel(f"not a record: length {length}, allowed 1 to {_MAX_RECORD}")
            stop = body_at + length
            if stop > end:
                break
            into.append(self._record(data, body_at, stop))
            start = stop
        self._keep(data[start:])

    def _record(self, data: bytes, start: int, stop: int) -> Received:
        kind_end = start + 1 + data[start]
        if kind_end > stop:
            raise BrokenChannel(f"not a record: a kind of {data[start]} bytes in a record of {stop - start}")
        return self._decode(str(data[start + 1 : kind_end], "ascii", "replace"), data[kind_end:stop])

    def _keep(self, rest: bytes) -> None:
        self._partial += rest
        self._wanted = _HEADER
        if len(rest) >= _HEADER:
            self._wanted += _LENGTH.unpack_from(rest)[0]

    def finish(self) -> BrokenChannel | None:
        if not self._partial:
            return None
        return BrokenChannel(f"the stream ended inside a record: {len(self._partial)} of {self._wanted} bytes")
