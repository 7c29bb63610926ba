"""The front end's state: which pool it serves, its limits, and who listens to its events."""

from dataclasses import dataclass, field
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.problems import INVALID_REQUEST, UNAVAILABLE, Problem
from llamaherd.http.schema import ModelBody
from llamaherd.pool import Pool, Subscription

__all__ = ["DEFAULT_MAX_BODY_BYTES", "MAX_LISTENERS", "Front", "json_response"]

DEFAULT_MAX_BODY_BYTES: Final = 64 * 1024 * 1024
#: Most clients of ``/models/sse`` at a time.
MAX_LISTENERS: Final = 256


@dataclass(kw_only=True)
class Front:
    """What every handler is given.

    Attributes:
        default_model: Serves requests that name no model; None refuses them.
        autoload: Whether a request loads its model; ``?autoload=`` overrides it.
        max_body_bytes: Largest request body.
        stream_ping: Seconds of silence before a generation's stream sends a comment; also how long the first piece is
            waited for before the headers go out.
        event_ping: The same for ``/models/sse``.
        listeners: The open ``/models/sse`` streams.
    """

    pool: Pool
    default_model: str | None = None
    autoload: bool = True
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    stream_ping: float = 10.0
    event_ping: float = 15.0
    listeners: set[Subscription] = field(default_factory=set[Subscription])

    def model_of(self, body: ModelBody) -> str:
        """Return the model that a body names. Raises Problem if it names none and there is no default."""
        name = body.model or self.default_model
        if not name:
            raise Problem(INVALID_REQUEST, "model name is missing from the request", param="model")
        return name

    def autoload_of(self, request: Request) -> bool:
        """Return whether a request may load its model."""
        wish = request.query_params.get("autoload", "")
        return wish in ("true", "1") if wish else self.autoload

    def listen(self) -> Subscription:
        """Return a new subscription to the pool's events. Raises Problem if there are too many."""
        if len(self.listeners) >= MAX_LISTENERS:
            raise Problem(UNAVAILABLE, f"{MAX_LISTENERS} clients listen already", headers={"Retry-After": "30"})
        subscription = self.pool.events()
        self.listeners.add(subscription)
        return subscription

    async def hang_up(self) -> None:
        """End every ``/models/sse`` stream: they have no end of their own that a shutdown could wait for."""
        for subscription in tuple(self.listeners):
            await subscription.aclose()


def json_response(content: object) -> Response:
    """Return an answer of JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json; charset=utf-8")
