"""Embeddings in OpenAI's shape (``POST /v1/embeddings``) and in llama-server's (``/embedding``, ``/embeddings``)."""

from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front
from llamaherd.http.parts import PartedResponse, in_parts
from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.prompts import prompts_of
from llamaherd.http.schema import EmbeddingsBody, parse
from llamaherd.pool import Embedding, Embeddings

__all__ = ["native_embeddings", "openai_embeddings"]

_encode: Final = msgspec.json.Encoder().encode


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
    fragments = _native_json(result) if native else _openai_json(body, result)
    return PartedResponse(await in_parts(fragments))


def _native_json(result: Embeddings) -> Iterator[bytes]:
    """Yield llama-server's list, row by row."""
    yield b"["
    for index, item in enumerate(result):
        yield b'%b{"index":%d,"embedding":[' % (b"," if index else b"", index)
        size = max(1, len(item.data) // max(1, item.rows))
        for start in range(0, len(item.data), size):
            row = Embedding(data=item.data[start : start + size])
            yield (b"," if start else b"") + _encode(row.values)
        yield b"]}"
    yield b"]"


def _openai_json(body: EmbeddingsBody, result: Embeddings) -> Iterator[bytes]:
    """Yield OpenAI's object, input by input."""
    to_json = _base64_json if body.encoding_format == "base64" else _float_json
    count = result.usage.prompt_tokens
    head = {
        "model": body.model or result.model,
        "object": "list",
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    yield _encode(head)[:-1] + b',"data":['
    for index, item in enumerate(result):
        yield (b"," if index else b"") + _encode(to_json(index, item))
    yield b"]}"


def _float_json(index: int, item: Embedding) -> dict[str, Any]:
    return {"embedding": item.values, "index": index, "object": "embedding"}


def _base64_json(index: int, item: Embedding) -> dict[str, Any]:
    data = b64encode(item.data).decode()
    return {"embedding": data, "index": index, "object": "embedding", "encoding_format": "base64"}
