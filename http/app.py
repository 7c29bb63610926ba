"""The application: which path leads to which handler, and how whatever is raised becomes an answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Unpack

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaherd.http.access import AccessLog
from llamaherd.http.adapters import list_adapters, set_adapters
from llamaherd.http.anthropic import messages, messages_count
from llamaherd.http.chat import chat_completions
from llamaherd.http.completions import completions
from llamaherd.http.counting import chat_input_tokens
from llamaherd.http.embeddings import native_embeddings, openai_embeddings
from llamaherd.http.front import Front, sent_fields
from llamaherd.http.gate import Gate
from llamaherd.http.health import health
from llamaherd.http.infill import infill
from llamaherd.http.library import Library
from llamaherd.http.metrics import metrics as get_metrics
from llamaherd.http.models import (
    download_model,
    list_models,
    load_model,
    model_events,
    model_logs,
    remove_model,
    show_model,
    unload_model,
)
from llamaherd.http.native import native_completion
from llamaherd.http.offer import Offer
from llamaherd.http.openapi import openapi
from llamaherd.http.problems import UNAVAILABLE, Problem, problem_of
from llamaherd.http.props import props
from llamaherd.http.rerank import rerank
from llamaherd.http.responses import responses, responses_input_tokens
from llamaherd.http.security import Security
from llamaherd.http.shapes import problem_response
from llamaherd.http.slots import list_slots, slot_action
from llamaherd.http.text import apply_template, detokenize, tokenize
from llamaherd.http.transcriptions import transcriptions
from llamaherd.pool import ModelSpec, Pool, PoolError

__all__ = ["create_app"]


def create_app(
    pool: Pool,
    *,
    specs: Iterable[ModelSpec] = (),
    library: Library | None = None,
    security: Security | None = None,
    access_log: bool = False,
    **settings: Unpack[Offer],
) -> Starlette:
    """Return the application that serves a pool. The pool is opened and closed by the caller.

    Args:
        specs: The models' settings, which ``/props`` tells of; models without one have fewer properties.
        library: The catalogue behind the pool: it is reloaded by ``GET /models?reload=1`` and downloads end in it. Its
            specs take the place of ``specs``.
        security: Who may use it. By default everybody who can reach it, except for pages of strangers in a browser.
        access_log: Whether every request is logged, without what was said in it.
        **settings: See :class:`~llamaherd.http.front.Front`.

    The app's ``state.front`` is the :class:`~llamaherd.http.front.Front` behind it.
    """
    known = library.specs if library is not None else {spec.name: spec for spec in specs}
    front = Front(pool=pool, specs=known, library=library, **settings)
    app = Starlette(
        routes=_routes(front),
        middleware=[
            *([Middleware(AccessLog)] if access_log else []),
            Middleware(Gate, security=security or Security()),
            Middleware(_LastResort),
        ],
        exception_handlers={
            PoolError: _answer_problem,
            Problem: _answer_problem,
            HTTPException: _answer_problem,
            ClientDisconnect: _answer_nobody,
        },
    )
    app.router.redirect_slashes = False
    app.state.front = front
    return app


def _routes(front: Front) -> list[Route]:
    def route(path: str, handler: Callable[[Front, Request], Awaitable[Response]], method: str) -> Route:
        return Route(path, partial(handler, front), methods=[method])

    return [
        route("/health", health, "GET"),
        route("/v1/health", health, "GET"),
        route("/models", list_models, "GET"),
        route("/v1/models", list_models, "GET"),
        route("/v1/models/{model:path}", show_model, "GET"),
        route("/models", download_model, "POST"),
        route("/models", remove_model, "DELETE"),
        route("/models/load", load_model, "POST"),
        route("/models/unload", unload_model, "POST"),
        route("/models/sse", model_events, "GET"),
        route("/models/logs", model_logs, "GET"),
        route("/chat/completions", chat_completions, "POST"),
        route("/v1/chat/completions", chat_completions, "POST"),
        route("/chat/completions/input_tokens", chat_input_tokens, "POST"),
        route("/v1/chat/completions/input_tokens", chat_input_tokens, "POST"),
        route("/v1/completions", completions, "POST"),
        route("/responses", responses, "POST"),
        route("/v1/responses", responses, "POST"),
        route("/responses/input_tokens", responses_input_tokens, "POST"),
        route("/v1/responses/input_tokens", responses_input_tokens, "POST"),
        route("/v1/messages", messages, "POST"),
        route("/v1/messages/count_tokens", messages_count, "POST"),
        route("/audio/transcriptions", transcriptions, "POST"),
        route("/v1/audio/transcriptions", transcriptions, "POST"),
        route("/embedding", native_embeddings, "POST"),
        route("/embeddings", native_embeddings, "POST"),
        route("/v1/embeddings", openai_embeddings, "POST"),
        route("/rerank", rerank, "POST"),
        route("/reranking", rerank, "POST"),
        route("/v1/rerank", rerank, "POST"),
        route("/v1/reranking", rerank, "POST"),
        route("/infill", infill, "POST"),
        route("/completion", native_completion, "POST"),
        route("/completions", native_completion, "POST"),
        route("/tokenize", tokenize, "POST"),
        route("/detokenize", detokenize, "POST"),
        route("/apply-template", apply_template, "POST"),
        route("/lora-adapters", list_adapters, "GET"),
        route("/lora-adapters", set_adapters, "POST"),
        route("/props", props, "GET"),
        route("/metrics", get_metrics, "GET"),
        route("/slots", list_slots, "GET"),
        route("/slots/{id_slot}", slot_action, "POST"),
        route("/openapi.json", openapi, "GET"),
    ]


async def _answer_problem(request: Request, error: Exception) -> Response:
    return problem_response(problem_of(error, sent_fields(request)), request.url.path)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    # The client has gone; the status is nginx's word for that and reaches nobody.
    return Response(status_code=499)


class _LastResort:
    """Answers what no handler expected, so that even then a client gets JSON and the log a traceback.

    It stands inside Starlette's own error middleware, which would answer in plain text and raise again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except asyncio.CancelledError:
            if started:
                raise
            # Only the server's shutdown cancels a request; the task ends here either way.
            problem = Problem(UNAVAILABLE, "the server is shutting down")
            await problem_response(problem, scope["path"])(scope, receive, send)
        except Exception as error:
            if started:
                raise
            await problem_response(problem_of(error), scope["path"])(scope, receive, send)
