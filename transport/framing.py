"""What a byte stream needs to carry messages, and the rules that all transports share about them.

A *framing* turns messages into bytes and bytes into messages and touches no descriptor: ``pipes.py`` and
``lines.py`` hold one each, the pool's end (``streams.py``) and the worker's (``blocking.py``) run either. The
worker imports this module before anything heavy.
"""

from typing import Final, Protocol, TypeVar, cast

from llamaherd.transport.errors import BrokenChannel, MessageTooLarge
from llamaherd.transport.messages import (
    CHILD_KINDS,
    MAX_MESSAGE_BYTES,
    POOL_KINDS,
    ChildMessage,
    Message,
    PoolMessage,
    Unknown,
    decode,
    encode,
)

__all__ = ["MAX_KIND_BYTES", "Decode", "Framing", "encode_checked", "from_child", "from_pool"]

#: Longest kind that a record may name, in bytes.
MAX_KIND_BYTES: Final = 255
_EXCERPT: Final = 200

Received = TypeVar("Received")
Received_co = TypeVar("Received_co", covariant=True)


class Decode(Protocol[Received_co]):
    """Makes a message of one record. Never raises on what a peer may send."""

    def __call__(self, kind: str, body: bytes, /) -> Received_co: ...


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


def from_child(kind: str, body: bytes) -> ChildMessage:
    """Decode what a worker sent; a kind that only a pool sends is as unknown as any other."""
    if kind in CHILD_KINDS:
        return cast(ChildMessage, decode(kind, body))
    return Unknown(kind[:64], "unknown kind", body[:_EXCERPT])


def from_pool(kind: str, body: bytes) -> PoolMessage:
    """Decode what a pool sent; a kind that only a worker sends is as unknown as any other."""
    if kind in POOL_KINDS:
        return cast(PoolMessage, decode(kind, body))
    return Unknown(kind[:64], "unknown kind", body[:_EXCERPT])
