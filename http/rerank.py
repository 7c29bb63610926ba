"""``POST /rerank`` and its other names: documents scored against a query, in Jina's shape or, for ``texts``, TEI's."""

from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.schema import RerankBody, parse
from llamaherd.pool import Ranking

__all__ = ["rerank"]


async def rerank(front: Front, request: Request) -> Response:
    """Score documents, best first."""
    body = parse(await front.read(request), RerankBody)
    if body.query is None:
        raise Problem(INVALID_REQUEST, '"query" must be provided', param="query")
    documents = [_text_of(document) for document in body.documents or body.texts or ()]
    if not documents:
        raise Problem(INVALID_REQUEST, '"documents" must be a non-empty string array', param="documents")
    if body.top_n is not None and body.top_n < 0:
        raise Problem(INVALID_REQUEST, "top_n must be 0 or more", param="top_n")
    front.check_inputs(len(documents), "documents" if body.documents else "texts")
    model = front.model_of(body)
    work = front.pool.rerank(model, body.query, documents, **front.admit(request, body, model))
    ranking = await while_connected(request.receive, work)
    front.tallies[ranking.model].prompt_tokens += ranking.usage.prompt_tokens
    best = ranking.order[: len(documents) if body.top_n is None else body.top_n]
    if body.texts is not None:
        return json_response([_tei_json(index, ranking, documents, body) for index in best])
    count = ranking.usage.prompt_tokens
    answer = {
        "model": body.model or ranking.model,
        "object": "list",
        "usage": {"prompt_tokens": count, "total_tokens": count},
        "results": [_jina_json(index, ranking, documents, body) for index in best],
    }
    return json_response(answer)


def _tei_json(index: int, ranking: Ranking, documents: list[str], body: RerankBody) -> dict[str, Any]:
    text = {"text": documents[index]} if body.return_text else {}
    return {"index": index, "score": ranking.scores[index], **text}


def _jina_json(index: int, ranking: Ranking, documents: list[str], body: RerankBody) -> dict[str, Any]:
    document = {"document": {"text": documents[index]}} if body.return_documents else {}
    return {"index": index, "relevance_score": ranking.scores[index], **document}


def _text_of(document: object) -> str:
    """Return a document's text; Jina's clients may send an object with it."""
    if isinstance(document, dict):
        document = cast("dict[str, Any]", document).get("text")
    if not isinstance(document, str):
        raise Problem(INVALID_REQUEST, '"documents" must be a non-empty string array', param="documents")
    return document
