"""What a pool has counted since it was opened; reading it changes nothing."""

import msgspec

__all__ = ["PoolCounts"]


class PoolCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one pool.

    Attributes:
        transport: How it speaks to its workers: ``pipe``, ``zmq`` or ``stdio``.
        received, received_bytes: Messages of its workers, and their bytes.
        sent, sent_bytes: Messages to its workers, and the bytes of their bodies.
        evictions: How often a model was stopped to make room for another, by name; models that never were are left out.
        ahead: The model that the spare worker has loaded ahead; empty if it has none.
    """

    transport: str
    received: int = 0
    received_bytes: int = 0
    sent: int = 0
    sent_bytes: int = 0
    evictions: dict[str, int] = {}
    ahead: str = ""
