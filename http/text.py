"""Between text and tokens: ``POST /tokenize``, ``/detokenize`` and ``/apply-template``."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.schema import ChatBody, DetokenizeBody, TokenizeBody, parse

__all__ = ["apply_template", "detokenize", "render", "tokenize"]


async def tokenize(front: Front, request: Request) -> Response:
    """Answer with the tokens of a text."""
    body = parse(await front.read(request), TokenizeBody)
    model = front.find_ready(request, body)
    work = _tokens(front, model, body)
    return json_response({"tokens": await while_connected(request.receive, work)})


async def detokenize(front: Front, request: Request) -> Response:
    """Answer with the text of tokens."""
    body = parse(await front.read(request), DetokenizeBody)
    model = front.find_ready(request, body)
    if not body.tokens:
        return json_response({"content": ""})
    work = front.pool.detokenize(model, body.tokens)
    return json_response({"content": await while_connected(request.receive, work)})


async def apply_template(front: Front, request: Request) -> Response:
    """Answer with the prompt that a chat becomes."""
    body = parse(await front.read(request), ChatBody)
    model = front.find_ready(request, body)
    return json_response({"prompt": await while_connected(request.receive, render(front, model, body))})


async def render(front: Front, model: str, body: ChatBody) -> str:
    """Return the prompt that a chat becomes. Raises Problem if it has no messages, and as the pool."""
    if body.messages is None:
        raise Problem(INVALID_REQUEST, '"messages" is required', param="messages")
    return await front.pool.apply_template(model, body.messages, **body.to_template_params())


async def _tokens(front: Front, model: str, body: TokenizeBody) -> list[Any]:
    if not body.content:
        return []
    pool, add_special, parse_special = front.pool, bool(body.add_special), body.parse_special is not False
    if not body.with_pieces:
        return await pool.tokenize(model, body.content, add_special=add_special, parse_special=parse_special)
    tokens = await pool.token_pieces(model, body.content, add_special=add_special, parse_special=parse_special)
    return [{"id": token, "piece": _piece_json(piece)} for token, piece in tokens]


def _piece_json(piece: bytes) -> str | list[int]:
    """Return a token's text, or its bytes where they are not whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
