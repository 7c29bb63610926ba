"""What a server may be told to do for its clients; apart from the front, which the command line need not import."""

from typing import Final, TypedDict

__all__ = ["DEFAULT_BODY_SECONDS", "DEFAULT_MAX_BODY_BYTES", "DEFAULT_MAX_INPUTS", "Offer"]

DEFAULT_MAX_BODY_BYTES: Final = 64 * 1024 * 1024
DEFAULT_BODY_SECONDS: Final = 30.0
#: OpenAI's limit.
DEFAULT_MAX_INPUTS: Final = 2048


class Offer(TypedDict, total=False):
    """Fields of :class:`~llamaherd.http.front.Front` by their names, which describes them."""

    default_model: str | None
    any_name: bool
    health_waits: bool
    autoload: bool
    manage: bool
    metrics: bool
    slots: bool
    max_inputs: int
    max_body_bytes: int
    body_seconds: float
    stream_ping: float | None
    event_ping: float
