"""The front end's state: which pool it serves, its limits, and who listens to its events."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.body import read_bytes, read_json, read_json_list
from llamaherd.http.grants import CURRENT
from llamaherd.http.library import Library
from llamaherd.http.offer import DEFAULT_BODY_SECONDS, DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_INPUTS
from llamaherd.http.problems import DISABLED, INVALID_REQUEST, PERMISSION, UNAVAILABLE, Problem
from llamaherd.http.schema import ModelBody, QueuedBody
from llamaherd.http.tally import Meter, Tally
from llamaherd.http.turn import Turn
from llamaherd.pool import (
    Generation,
    ModelNotFound,
    ModelNotLoaded,
    ModelSpec,
    Pool,
    State,
    Subscription,
    read_duration,
)

__all__ = [
    "MAX_LISTENERS",
    "Admission",
    "Front",
    "json_response",
    "sent_fields",
]

#: Most clients of ``/models/sse`` at a time.
MAX_LISTENERS: Final = 2048
#: Of a request with more fields no error says which is wrong: their names would be kept as long as it runs.
_MOST_FIELDS: Final = 256
_RUNNING: Final = frozenset({State.LOADING, State.LOADED, State.SLEEPING})


class Admission(TypedDict):
    """How a request comes to a worker: arguments of the pool's methods."""

    autoload: bool
    priority: int | None
    keep_alive: float | None
    queue_timeout: float | None


@dataclass(kw_only=True)
class Front:
    """What every handler is given.

    Attributes:
        default_model: Serves requests that name no model; None refuses them.
        any_name: Whether the default model also serves requests for names that no model has: programs are often written
            for one of OpenAI's, and llama-server looks at no name where it has one model.
        health_waits: Whether ``/health`` is 503 until the default model was loaded once.
        autoload: Whether a request loads its model; ``?autoload=`` overrides it.
        manage: Whether clients may load, unload, download, delete and reload models, read logs and set adapters.
        max_inputs: Most inputs of one request for embeddings, and most documents of one that ranks.
        max_body_bytes: Largest request body; a larger one is refused with 413.
        body_seconds: Seconds to wait for the next part of a body before the request is refused with 408.
        stream_ping: Seconds of silence before a generation's stream sends a comment; also how long the first piece is
            waited for before the headers go out. None sends none, and waits.
        event_ping: The same for ``/models/sse``.
        metrics: Whether ``/metrics`` answers.
        slots: Whether ``GET /slots`` answers.
        specs: What is known of the models' settings, by name.
        tallies: What was counted, by model.
        first_event: What ids of ``/models/sse`` count from. It grows with time, so that an id of an earlier server is
            not taken for one of this.
        library: The catalogue behind the pool; None if there is none that could be read anew.
        listeners: The open ``/models/sse`` streams.
        turn: Pushes the frames of all streams that a step has fed.
    """

    pool: Pool
    default_model: str | None = None
    any_name: bool = False
    health_waits: bool = False
    autoload: bool = True
    manage: bool = True
    max_inputs: int = DEFAULT_MAX_INPUTS
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    body_seconds: float = DEFAULT_BODY_SECONDS
    stream_ping: float | None = 10.0
    event_ping: float = 15.0
    metrics: bool = True
    slots: bool = True
    specs: Mapping[str, ModelSpec] = field(default_factory=dict[str, ModelSpec])
    tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    first_event: int = field(default_factory=lambda: int(time.time()) * 1_000_000)
    library: Library | None = None
    listeners: set[Subscription] = field(default_factory=set[Subscription])
    turn: Turn = field(default_factory=Turn)

    async def read(self, request: Request) -> dict[str, Any]:
        """Return a request's body. Raises as :func:`~llamaherd.http.body.read_json`."""
        body = await read_json(request, self.max_body_bytes, patience=self.body_seconds)
        if len(body) <= _MOST_FIELDS:
            request.state.sent = frozenset(name for name, value in body.items() if value is not None)
        return body

    async def read_list(self, request: Request) -> list[object]:
        """Return a request's body that is a list. Raises as :func:`~llamaherd.http.body.read_json_list`."""
        return await read_json_list(request, self.max_body_bytes, patience=self.body_seconds)

    async def read_bytes(self, request: Request) -> bytes:
        """Return a request's body as it is. Raises as :func:`~llamaherd.http.body.read_bytes`."""
        return await read_bytes(request, self.max_body_bytes, patience=self.body_seconds)

    def model_of(self, body: ModelBody, *, exact: bool = False) -> str:
        """Return the model that serves what a body asks for; with ``exact`` the one that it names, be it there or not.
        Raises Problem if it names none and there is no default.
        """
        name, default = body.model or self.default_model, self.default_model
        if not name:
            raise Problem(INVALID_REQUEST, "model name is missing from the request", param="model")
        if self.any_name and default and name != default and not exact and not self._is_known(name):
            name = default
        self.check_model(name)
        return name

    def _is_known(self, name: str) -> bool:
        try:
            self.pool.status(name)
        except ModelNotFound:
            return False
        return True

    def defaults_of(self, model: str) -> Mapping[str, Any]:
        """Return the parameters of a model's requests where they say nothing else: what its settings say, and for the
        rest what its file recommends, as far as that is known, which it is from the first load on.
        """
        spec = self.specs.get(model)
        said: Mapping[str, Any] = {} if spec is None else spec.defaults
        try:
            info = self.pool.status(model).info or {}
        except ModelNotFound:
            return said  # it was removed since
        return {**info.get("meta", {}).get("sampling", {}), **said}

    def check_model(self, name: str) -> None:
        """Raise Problem if the key of the request does not open this model, whether there is one or not."""
        if not self.may_see(name):
            raise Problem(PERMISSION, f"this key does not open model {name[:100]!r}", param="model")

    def may_see(self, name: str) -> bool:
        """Whether the key of the request opens a model, by any of its names."""
        models = CURRENT.get().models
        if models is None or name in models:
            return True
        try:
            status = self.pool.status(name)
        except ModelNotFound:
            return False
        return not models.isdisjoint((status.name, *status.aliases))

    def autoload_of(self, request: Request) -> bool:
        """Return whether a request may load its model."""
        wish = request.query_params.get("autoload", "")
        return wish in ("true", "1") if wish else self.autoload

    def admit(self, request: Request, body: QueuedBody, model: str) -> Admission:
        """Return how a request comes to a worker.

        A key that is limited to models cannot put its requests before others': at most the model's own priority counts.
        ``keep_alive`` says when a model is unloaded, so whoever may not do that may not say it.

        Raises:
            Problem, BadRequest: a value means nothing, or ``keep_alive`` is not for this client to say.
        """
        priority = body.priority
        if priority is not None and CURRENT.get().models is not None:
            priority = min(priority, self._priority_of(model))
        if body.keep_alive is not None:
            self.check_manage()
        return Admission(
            autoload=self.autoload_of(request),
            priority=priority,
            keep_alive=None if body.keep_alive is None else read_duration(body.keep_alive, "keep_alive"),
            queue_timeout=None if body.queue_timeout is None else read_duration(body.queue_timeout, "queue_timeout"),
        )

    def _priority_of(self, model: str) -> int:
        """Return the priority of a model's requests that name none."""
        try:
            spec = self.specs.get(self.pool.status(model).name)
        except ModelNotFound:
            return 0  # the pool refuses the request
        return 0 if spec is None else spec.priority

    def check_inputs(self, count: int, name: str) -> None:
        """Raise Problem if a request has more inputs than one may have."""
        if count > self.max_inputs:
            raise Problem(
                INVALID_REQUEST,
                f"{name} has {count} entries, and one request may have {self.max_inputs} (--max-inputs)",
                param=name,
            )

    def meter(self, work: Generation) -> Meter:
        """Return the generation as one whose pieces are counted."""
        return Meter(work, self.tallies[work.model])

    def find_ready(self, request: Request, body: ModelBody) -> str:
        """Return the name of the model that a body names, and that the request may use.

        Raises:
            Problem, ModelNotFound: as :meth:`model_of` and the pool.
            ModelNotLoaded: it is not running, and the request may not load it.
        """
        status = self.pool.status(self.model_of(body))
        if status.state not in _RUNNING and not self.autoload_of(request):
            raise ModelNotLoaded(f"model {status.name!r} is not loaded", code="model_not_loaded")
        return status.name

    def check_manage(self, *, whole: bool = False) -> None:
        """Raise Problem if the request may not load and unload models, or with ``whole`` not change which there are."""
        if not self.manage:
            raise Problem(DISABLED, "this feature is disabled")
        grant = CURRENT.get()
        if grant.read_only or (whole and grant.models is not None):
            raise Problem(PERMISSION, "this key does not open that")

    def listen(self, since: int | None = None) -> Subscription:
        """Return a new subscription to the pool's events, after one of them. Raises Problem if there are too many."""
        if len(self.listeners) >= MAX_LISTENERS:
            raise Problem(UNAVAILABLE, f"{MAX_LISTENERS} clients listen already", headers={"Retry-After": "30"})
        subscription = self.pool.events(since)
        self.listeners.add(subscription)
        return subscription

    async def hang_up(self) -> None:
        """End every ``/models/sse`` stream: they have no end of their own that a shutdown could wait for."""
        for subscription in tuple(self.listeners):
            await subscription.aclose()


def sent_fields(request: Request) -> frozenset[str]:
    """Return the fields of a request's body, as far as it was read; those that are null are not there."""
    sent: frozenset[str] = getattr(request.state, "sent", frozenset())
    return sent


def json_response(content: object) -> Response:
    """Return an answer of JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json; charset=utf-8")
