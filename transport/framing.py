"""What a byte stream needs to carry messages, and the rules that all transports share about them.

A *framing* turns messages into bytes and bytes into messages and touches no descriptor: ``pipes.py`` and
``lines.py`` hold one each, the pool's end (``streams.py``) and the worker's (``blocking.py``) run either. The
worker imports this module before anything heavy.
"""

from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar, cast, get_args

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

__all__ = [
    "MALFORMED",
    "MAX_KIND_BYTES",
    "VIEW_BYTES",
    "Body",
    "Decoder",
    "Framing",
    "encode_checked",
    "from_child",
    "from_pool",
]

#: Longest kind that a record may name, in bytes.
MAX_KIND_BYTES: Final = 255
#: A body this large is decoded from a view of what arrived. A view costs more than a copy of little, and far less than
#: one of much: that is mapped anew for each message.
VIEW_BYTES: Final = 16 * 1024
_EXCERPT: Final = 200

Received = TypeVar("Received")


#: A large body may be a view of the bytes that arrived; nothing keeps it.
Body: TypeAlias = bytes | bytearray | memoryview


class Framing(Protocol[Received]):
    """One direction-aware framing of one stream; :meth:`feed` keeps what is incomplete.

    Attributes:
        missing: Bytes that the record which has begun still needs, as far as that is known; 0 where it is not.
    """

    missing: int

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


#: What a known kind's decoder raises on a body that does not fit; KeyError stands for a kind that is not known.
MALFORMED: Final = (KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Decoder(Generic[Received]):
    """Makes messages of the records of one direction; a kind of the other direction is as unknown as any.

    A call never raises on what a peer may send. Where every microsecond counts, ``known[kind](body)`` is the short way
    to a message that is as it should be; what that raises is in :data:`MALFORMED`, and the call says what it is.

    Args:
        messages: The union of the direction's message types.
    """

    def __init__(self, messages: object) -> None:
        types = (cls for cls in get_args(messages) if cls is not Unknown)
        self.known: Final[dict[bytes, Callable[[Body], Received]]] = {
            cls.__name__.lower().encode("ascii"): cast(Any, msgspec.json.Decoder(cls).decode) for cls in types
        }

    def __call__(self, kind: bytes, body: Body) -> Received:
        try:
            return self.known[kind](body)
        except MALFORMED:
            if kind in self.known:
                message: Message = decode(str(kind, "ascii"), body)  # an empty body is one without fields
            else:
                message = Unknown(str(kind[:64], "ascii", "replace"), "unknown kind", bytes(body[:_EXCERPT]))
            return cast(Received, message)


#: What a worker sent.
from_child: Final = Decoder[ChildMessage](ChildMessage)
#: What a pool sent.
from_pool: Final = Decoder[PoolMessage](PoolMessage)
