"""What a pool has counted since it was opened; reading it changes nothing."""

import msgspec

from llamaherd.transport.messages import Done

__all__ = ["Abandoned", "PoolCounts"]


class Abandoned(msgspec.Struct, kw_only=True):
    """What was done of requests whose callers left before the end, of which nobody else is told.

    Attributes:
        prompt_tokens, cached_tokens: Of their prompts, what was computed and what was found in the cache.
        prompt_ms, predicted_ms: Time in the worker.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0

    def add(self, end: Done) -> None:
        """Count the end of one more."""
        self.prompt_tokens += end.usage.prompt_tokens - end.usage.cached_tokens
        self.cached_tokens += end.usage.cached_tokens
        self.prompt_ms += end.timings.prompt_ms
        self.predicted_ms += end.timings.predicted_ms


class PoolCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one pool.

    Attributes:
        transport: How it speaks to its workers: ``pipe``, ``zmq`` or ``stdio``.
        received, received_bytes: Messages of its workers, and their bytes.
        sent, sent_bytes: Messages to its workers, and the bytes of their bodies.
        evictions: How often a model was stopped to make room for another, by name; models that never were are left out.
        abandoned: What was done of requests whose callers left, by model; without those that nobody left.
        ahead: The model that the spare worker has loaded ahead; empty if it has none.
    """

    transport: str
    received: int = 0
    received_bytes: int = 0
    sent: int = 0
    sent_bytes: int = 0
    evictions: dict[str, int] = {}
    abandoned: dict[str, Abandoned] = {}
    ahead: str = ""
