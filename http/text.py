"""Between text and tokens: ``POST /tokenize``, ``/detokenize`` and ``/apply-template``."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import INVALID_REQUEST, NOT_SUPPORTED, Problem
from llamaherd.http.schema import ChatBody, DetokenizeBody, TokenizeBody, parse

__all__ = ["apply_template", "detokenize", "render", "tokenize"]

#: Questions that one request has open with a worker at a time.
_AT_ONCE: Final = 64
_REPLACED: Final = "\ufffd"


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
    tokens = await front.pool.tokenize(
        model, body.content, add_special=bool(body.add_special), parse_special=body.parse_special is not False
    )
    if not body.with_pieces:
        return tokens
    pieces = await _pieces(front, model, list(dict.fromkeys(tokens)))
    if _REPLACED not in body.content and any(_REPLACED in piece for piece in pieces.values()):
        # llama-server gives the bytes of such a token; a made-up character would be wrong.
        raise Problem(
            NOT_SUPPORTED, "with_pieces: a token of this text is only a part of a character", param="with_pieces"
        )
    return [{"id": token, "piece": pieces[token]} for token in tokens]


async def _pieces(front: Front, model: str, tokens: Sequence[int]) -> dict[int, str]:
    """Return the text of each token."""
    pieces: dict[int, str] = {}
    for start in range(0, len(tokens), _AT_ONCE):
        some = tokens[start : start + _AT_ONCE]
        texts = await asyncio.gather(*(front.pool.detokenize(model, [token]) for token in some))
        pieces.update(zip(some, texts, strict=True))
    return pieces
