"""The models: their list, loading and unloading, and the stream of what happens to them. None of it wakes a model."""

import asyncio
import contextlib
import time
from collections.abc import Generator
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import DISABLED, INVALID_REQUEST, NOT_FOUND, Problem, problem_of, without_folders
from llamaherd.http.schema import ModelBody, parse
from llamaherd.http.sse import EventStream, FrameSource, frame
from llamaherd.pool import BadRequest, ModelNotFound, ModelStatus, State, Subscription, parse_name

__all__ = [
    "download_model",
    "list_models",
    "load_model",
    "model_events",
    "model_json",
    "model_logs",
    "remove_model",
    "show_model",
    "unload_model",
]

_WITH_INFO: Final = frozenset({State.LOADING, State.LOADED, State.SLEEPING})
#: More digits than an id ever has.
_ID_DIGITS: Final = 20
#: The model of events that are about all.
_ALL: Final = "*"
#: Seconds between two looks at a log that is followed.
_LOG_SECONDS: Final = 0.2
_STARTED: Final = int(time.time())


async def list_models(front: Front, request: Request) -> Response:
    """List every model, loaded or not, with its state. ``?reload=`` reads the catalogue anew before."""
    if request.query_params.get("reload") and front.library is not None:
        front.check_manage(whole=True)
        with _without_folders():
            await front.library.reload(front.pool)
    return json_response(
        {"data": [model_json(status) for status in front.pool.models() if front.may_see(status.name)], "object": "list"}
    )


async def show_model(front: Front, request: Request) -> Response:
    """Answer with one model, loaded or not."""
    name = request.path_params["model"]
    front.check_model(name)
    try:
        return json_response(model_json(front.pool.status(name)))
    except ModelNotFound:
        raise Problem(NOT_FOUND, "model is not found", param="model") from None


async def download_model(front: Front, request: Request) -> Response:
    """Begin to download a model, and answer once the hub has said that it is there. Events tell the rest."""
    front.check_manage(whole=True)
    model = parse(await front.read(request), ModelBody).model
    if not model:
        raise Problem(INVALID_REQUEST, "model must be a non-empty string", param="model")
    if front.library is None:
        raise Problem(DISABLED, "this server has no cache to download to")
    await front.pool.start_download(model, cache=front.library.caches.folder(parse_name(model)))
    return json_response({"success": True})


async def remove_model(front: Front, request: Request) -> Response:
    """Delete a model from the cache, or cancel its download and delete what there is of it."""
    front.check_manage(whole=True)
    model = request.query_params.get("model", "")
    if not model:
        raise Problem(INVALID_REQUEST, "model must be a non-empty string", param="model")
    if front.library is None:
        raise Problem(DISABLED, "this server has no cache to delete from")
    with _without_folders():
        await front.library.remove(front.pool, model)
    return json_response({"success": True})


async def model_logs(front: Front, request: Request) -> Response:
    """Return the last lines that a model's workers printed; with ``?follow=1`` stream them and those that follow."""
    front.check_manage()
    model = request.query_params.get("model") or front.default_model
    if not model:
        raise Problem(INVALID_REQUEST, "model name is missing from the request", param="model")
    front.check_model(model)
    if request.query_params.get("follow") in ("1", "true"):
        front.pool.logs(model)  # an unknown model is an error before the stream begins
        return EventStream(_Logs(front, front.listen(), model), ping=front.event_ping, on_error=_error_frame)
    return json_response({"model": model, "lines": front.pool.logs(model)})


async def load_model(front: Front, request: Request) -> Response:
    """Begin to load a model. What becomes of it is told by ``/models/sse`` and the list."""
    front.check_manage()
    model = front.model_of(parse(await front.read(request), ModelBody), exact=True)
    try:
        front.pool.start_load(model)
    except ModelNotFound:
        raise Problem(NOT_FOUND, "model is not found", param="model") from None
    return json_response({"success": True})


async def unload_model(front: Front, request: Request) -> Response:
    """Begin to unload a model."""
    front.check_manage()
    model = front.model_of(parse(await front.read(request), ModelBody), exact=True)
    try:
        front.pool.start_unload(model)
    except ModelNotFound:
        raise Problem(INVALID_REQUEST, "model is not found", param="model") from None
    return json_response({"success": True})


async def model_events(front: Front, request: Request) -> Response:
    """Stream the pool's events: a snapshot first, then every change; ids increase by one with every change.

    A client that comes back with ``Last-Event-ID`` gets what it has missed, as long as that is kept, or a new snapshot.
    """
    last = request.headers.get("last-event-id", "")
    known = int(last) - front.first_event if last.isascii() and last.isdigit() and len(last) < _ID_DIGITS else None
    return EventStream(_Events(front, front.listen(known)), ping=front.event_ping, on_error=_error_frame)


def model_json(status: ModelStatus) -> dict[str, Any]:
    """Return a model as llama-server's router lists it."""
    state: dict[str, Any] = {"value": status.state, "args": status.args}
    if status.preset:
        state["preset"] = status.preset
    if status.failed:
        state["exit_code"] = status.exit_code
        state["failed"] = True
    if status.progress is not None:
        state["progress"] = status.progress
    model: dict[str, Any] = {
        "id": status.name,
        "aliases": status.aliases,
        "tags": status.tags,
        "object": "model",
        "owned_by": "llamacpp",
        "created": _STARTED,
        "status": state,
        "architecture": {"input_modalities": status.modalities, "output_modalities": ["text"]},
        "source": status.source,
        "can_remove": status.source == "cache",
    }
    if status.path is not None:
        model["path"] = status.path
    info = (status.info or {}) if status.state in _WITH_INFO else {}
    return model | {key: value for key, value in info.items() if key not in model}


@contextlib.contextmanager
def _without_folders() -> Generator[None]:
    """Have errors name the operator's files without their folders."""
    try:
        yield
    except BadRequest as error:
        raise Problem(INVALID_REQUEST, without_folders(str(error))) from None


class _Events(FrameSource):
    """A subscription as frames."""

    def __init__(self, front: Front, subscription: Subscription) -> None:
        self._front = front
        self._subscription = subscription

    async def __anext__(self) -> bytes:
        while True:
            event = await anext(self._subscription)
            if event.model == _ALL or self._front.may_see(event.model):
                break
        data: dict[str, Any] = {"model": event.model, "event": event.event}
        if event.event == "snapshot":
            data["data"] = {"models": [one for one in event.data["models"] if self._front.may_see(one["name"])]}
        elif event.data:
            data["data"] = event.data
        return frame(data, number=self._front.first_event + event.seq)

    async def aclose(self) -> None:
        self._front.listeners.discard(self._subscription)
        await self._subscription.aclose()


class _Logs(FrameSource):
    """A model's log as frames, one for each line. The subscription ends it when the server does."""

    def __init__(self, front: Front, subscription: Subscription, model: str) -> None:
        self._front = front
        self._subscription = subscription
        self._model = model
        self._marks: tuple[int, ...] = ()

    async def __anext__(self) -> bytes:
        while True:
            lines, self._marks = self._front.pool.logs_since(self._model, self._marks)
            if lines:
                return b"".join(frame({"model": self._model, "line": line}) for line in lines)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOG_SECONDS):
                    await anext(self._subscription)

    async def aclose(self) -> None:
        self._front.listeners.discard(self._subscription)
        await self._subscription.aclose()


def _error_frame(error: Exception) -> bytes:
    return frame(problem_of(error).to_dict())
