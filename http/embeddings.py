"""Embeddings in OpenAI's shape (``POST /v1/embeddings``) and in llama-server's (``/embedding``, ``/embeddings``)."""

from base64 import b64encode
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.prompts import prompts_of
from llamaherd.http.schema import EmbeddingsBody, parse
from llamaherd.pool import Embedding, Embeddings

__all__ = ["native_embeddings", "openai_embeddings"]


async def openai_embeddings(front: Front, request: Request) -> Response:
    """Embed inputs, one vector each. A body with ``content`` instead of ``input`` gets llama-server's shape."""
    body = parse(await front.read(request), EmbeddingsBody)
    native = body.input is None and body.content is not None
    return await _answer(front, request, body, native=native)


async def native_embeddings(front: Front, request: Request) -> Response:
    """Embed inputs, one or, without pooling, several vectors each."""
    return await _answer(front, request, parse(await front.read(request), EmbeddingsBody), native=True)


async def _answer(front: Front, request: Request, body: EmbeddingsBody, *, native: bool) -> Response:
    if body.input is None and body.content is None:
        raise Problem(INVALID_REQUEST, '"input" or "content" must be provided', param="input")
    name = "content" if body.input is None else "input"
    inputs = prompts_of(getattr(body, name), name)
    if body.encoding_format not in (None, "float", "base64"):
        raise Problem(
            INVALID_REQUEST,
            "The format to return the embeddings in. Can be either float or base64",
            param="encoding_format",
        )
    front.check_inputs(len(inputs), name)
    model = front.model_of(body)
    work = front.pool.embed(
        model,
        inputs,
        normalize=body.embd_normalize,
        dimensions=body.dimensions,
        pooled=not native,
        **front.admit(request, body, model),
    )
    result = await while_connected(request.receive, work)
    front.tallies[result.model].prompt_tokens += result.usage.prompt_tokens
    if native:
        return json_response([{"index": index, "embedding": item.vectors} for index, item in enumerate(result)])
    return json_response(_openai_json(body, result))


def _openai_json(body: EmbeddingsBody, result: Embeddings) -> dict[str, Any]:
    to_json = _base64_json if body.encoding_format == "base64" else _float_json
    count = result.usage.prompt_tokens
    return {
        "model": body.model or result.model,
        "object": "list",
        "usage": {"prompt_tokens": count, "total_tokens": count},
        "data": [to_json(index, item) for index, item in enumerate(result)],
    }


def _float_json(index: int, item: Embedding) -> dict[str, Any]:
    return {"embedding": item.values, "index": index, "object": "embedding"}


def _base64_json(index: int, item: Embedding) -> dict[str, Any]:
    data = b64encode(item.data).decode()
    return {"embedding": data, "index": index, "object": "embedding", "encoding_format": "base64"}
