"""Length-prefixed records: the framing of the ``pipe`` transport, the local default.

One record::

    4 bytes   length of all that follows, little-endian
    1 byte    length of the kind
    n bytes   the kind, ASCII
    rest      the body, JSON or nothing

The stream is an inherited pipe that nothing but the channel writes to, so bytes that cannot be a record mean a
broken peer.
"""

import struct
from typing import Final, Generic, TypeVar

from llamaherd.transport.errors import BrokenChannel
from llamaherd.transport.framing import MALFORMED, MAX_KIND_BYTES, VIEW_BYTES, Body, Decoder
from llamaherd.transport.messages import MAX_MESSAGE_BYTES

__all__ = ["RecordFraming"]

Received = TypeVar("Received")

_HEAD: Final = struct.Struct("<IB")
_head_at: Final = _HEAD.unpack_from
_HEADER: Final = _HEAD.size  # the kind's length included, so a record is its length and 4 bytes
_LENGTH: Final = 4
#: The kinds that were sent, as they stand in records; there are few.
_kinds: Final[dict[str, bytes]] = {}
_MAX_RECORD: Final = 1 + MAX_KIND_BYTES + MAX_MESSAGE_BYTES


class RecordFraming(Generic[Received]):
    """See :class:`~llamaherd.transport.framing.Framing`. ``decode`` makes the messages of the receiving direction."""

    __slots__ = ("_decode", "_partial", "_wanted", "missing")

    def __init__(self, decode: Decoder[Received]) -> None:
        self._decode = decode
        self._partial = bytearray()
        self._wanted = _LENGTH  # bytes that _partial must reach before there is anything to do
        self.missing = 0

    def frame(self, kind: str, body: bytes) -> bytes:
        tail = _kinds.get(kind)
        if tail is None:
            raw = kind.encode("ascii")
            tail = _kinds[kind] = bytes((len(raw),)) + raw
        return b"".join(((len(tail) + len(body)).to_bytes(_LENGTH, "little"), tail, body))

    def feed(self, data: bytes, into: list[Received]) -> None:
        if self._partial:
            self._partial += data
            self.missing = max(0, self._wanted - len(self._partial))
            if self.missing:
                return
            data = bytes(self._partial)
            self._partial = bytearray()
        known, start, end = self._decode.known, 0, len(data)
        while start + _HEADER <= end:
            length, kind_size = _head_at(data, start)
            if not kind_size < length <= _MAX_RECORD:
                raise _no_record(length, kind_size)
            stop = start + _LENGTH + length
            if stop > end:
                break
            body_at = start + _HEADER + kind_size
            body: Body = data[body_at:stop] if length < VIEW_BYTES else memoryview(data)[body_at:stop]
            kind = data[start + _HEADER : body_at]
            try:
                into.append(known[kind](body))
            except MALFORMED:
                into.append(self._decode(kind, body))
            start = stop
        if start < end:
            self._keep(data[start:])

    def _keep(self, rest: bytes) -> None:
        self._wanted = _LENGTH
        if len(rest) >= _LENGTH:
            length = int.from_bytes(rest[:_LENGTH], "little")
            if not 1 <= length <= _MAX_RECORD:
                raise _no_record(length, 0)
            self._wanted += length
        self._partial += rest
        self.missing = self._wanted - len(rest)

    def finish(self) -> BrokenChannel | None:
        if not self._partial:
            return None
        return BrokenChannel(f"the stream ended inside a record: {len(self._partial)} of {self._wanted} bytes")


def _no_record(length: int, kind_size: int) -> BrokenChannel:
    if 1 <= length <= _MAX_RECORD:
        return BrokenChannel(f"not a record: a kind of {kind_size} bytes in a record of {length}")
    return BrokenChannel(f"not a record: length {length}, allowed 1 to {_MAX_RECORD}")
