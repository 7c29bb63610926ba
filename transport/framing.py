"""What a byte stream needs to carry messages, and the rules that all transports share about them.

A *framing* turns messages into bytes and bytes into messages and touches no descriptor: ``pipes.py`` and
``lines.py`` hold one each, the pool's end (``streams.py``) and the worker's (``blocking.py``) run either. The
worker imports this module before anything heavy.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast, get_args

import msgspec

from llamaherd.transport.errors import BrokenChannel, MessageTooLarge
from llamaherd.transport.messages import (
    MAX_MESSAGE_BYTES,
    ChildMessage,
    Message,
    PoolMessage,
    Unknown,
    decode,
    encode,
)

__all__ = ["MAX_KIND_BYTES", "VIEW_BYTES", "Body", "Decode", "Framing", "encode_checked", "from_child", "from_pool"]

#: Longest kind that a record may name, in bytes.
MAX_KIND_BYTES: Final = 255
#: A body this large is decoded from a view of what arrived. A view costs more than a copy of little, and far less than
#: one of much: that is mapped anew for each message.
VIEW_BYTES: Final = 16 * 1024
_EXCERPT: Final = 200

Received = TypeVar("Received")
Received_co = TypeVar("Received_co", covariant=True)


#: A large body may be a view of the bytes that arrived; nothing keeps it.
Body: TypeAlias = bytes | bytearray | memoryview


class Decode(Protocol[Received_co]):
    """Makes a message of one record. Never raises on what a peer may send."""

    def __call__(self, kind: bytes, body: Body, /) -> Received_co: ...


class Framing(Protocol[Received]):
    """One direction-aware framing of one stream; :meth:`feed` keeps what is incomplete."""

    def frame(self, kind: str, body: bytes) -> bytes:
        """Return the bytes of one whole record."""
        ...

    def feed(self, data: bytes, into: list[Received]) -> None:
        """Take the next bytes of the stream and append every message that they complete to ``into``.

        Raises:
            BrokenChannel: the stream cannot be framed from here on; messages before that point were appended.
        """
        ...

    @property
    def missing(self) -> int:
        """Bytes that the record which has begun still needs, as far as that is known; 0 where it is not."""
        ...

    def finish(self) -> BrokenChannel | None:
        """Say that the stream ended; return the error if it ended inside a record."""
        ...


def encode_checked(message: Message) -> tuple[str, bytes]:
    """Encode a message for any transport.

    Raises:
        MessageTooLarge: the body is over ``MAX_MESSAGE_BYTES``.
        TypeError: it is no message, or holds what JSON cannot say.
    """
    kind, body = encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(f"a {kind} of {len(body)} bytes is over the cap of {MAX_MESSAGE_BYTES}")
    return kind, body


def _decoders(messages: object) -> dict[bytes, Callable[[Body], Any]]:
    """By kind, what decodes a body that is as it should be."""
    types = (cls for cls in get_args(messages) if cls is not Unknown)
    return {cls.__name__.lower().encode("ascii"): msgspec.json.Decoder(cls).decode for cls in types}


# Messages that are as they should be take the short way: ``decode`` costs half as much again, and a str of the kind.
_from_child: Final[dict[bytes, Callable[[Body], ChildMessage]]] = _decoders(ChildMessage)
_from_pool: Final[dict[bytes, Callable[[Body], PoolMessage]]] = _decoders(PoolMessage)


def from_child(kind: bytes, body: Body) -> ChildMessage:
    """Decode what a worker sent; a kind that only a pool sends is as unknown as any other."""
    known = _from_child.get(kind)
    if known is None:
        return _unknown(kind, body)
    try:
        return known(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return cast(ChildMessage, decode(str(kind, "ascii"), body))


def from_pool(kind: bytes, body: Body) -> PoolMessage:
    """Decode what a pool sent; a kind that only a worker sends is as unknown as any other."""
    known = _from_pool.get(kind)
    if known is None:
        return _unknown(kind, body)
    try:
        return known(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return cast(PoolMessage, decode(str(kind, "ascii"), body))


def _unknown(kind: bytes, body: Body) -> Unknown:
    return Unknown(str(kind[:64], "ascii", "replace"), "unknown kind", bytes(body[:_EXCERPT]))
