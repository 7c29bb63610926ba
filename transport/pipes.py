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
from llamaherd.transport.framing import MAX_KIND_BYTES, VIEW_BYTES, Decode
from llamaherd.transport.messages import MAX_MESSAGE_BYTES

__all__ = ["RecordFraming"]

Received = TypeVar("Received")

_LENGTH: Final = struct.Struct("<I")
_length_at: Final = _LENGTH.unpack_from
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
        decode, start, end = self._decode, 0, len(data)
        while start + _HEADER <= end:
            (length,) = _length_at(data, start)
            if not 1 <= length <= _MAX_RECORD:
                raise BrokenChannel(f"not a record: length {length}, allowed 1 to {_MAX_RECORD}")
            stop = start + _HEADER + length
            if stop > end:
                break
            kind_at = start + _HEADER + 1
            body_at = kind_at + data[kind_at - 1]
            if body_at > stop:
                raise BrokenChannel(f"not a record: a kind of {data[kind_at - 1]} bytes in a record of {length}")
            body = data[body_at:stop] if length < VIEW_BYTES else memoryview(data)[body_at:stop]
            into.append(decode(data[kind_at:body_at], body))
            start = stop
        if start < end:
            self._keep(data[start:])

    def _keep(self, rest: bytes) -> None:
        self._partial += rest
        self._wanted = _HEADER
        if len(rest) >= _HEADER:
            self._wanted += _length_at(rest)[0]

    @property
    def missing(self) -> int:
        return self._wanted - len(self._partial) if self._partial else 0

    def finish(self) -> BrokenChannel | None:
        if not self._partial:
            return None
        return BrokenChannel(f"the stream ended inside a record: {len(self._partial)} of {self._wanted} bytes")
