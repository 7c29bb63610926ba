"""``POST /v1/chat/completions``, whole and streamed."""

from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, respond, timings_json, usage_json
from llamaherd.http.body import read_json
from llamaherd.http.front import Front
from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.schema import ChatBody, parse
from llamaherd.pool import Completion, Piece, Timings, Usage

__all__ = ["ChatAnswer", "chat_completions"]


async def chat_completions(front: Front, request: Request) -> Response:
    """Answer a chat."""
    body = parse(await read_json(request, front.max_body_bytes), ChatBody)
    model = front.model_of(body)
    if body.messages is None:
        raise Problem(INVALID_REQUEST, '"messages" is required', param="messages")
    work = front.pool.chat(model, body.messages, autoload=front.autoload_of(request), **body.to_chat_params())
    return await respond(front, request, body, work, ChatAnswer(work.model))


class ChatAnswer(Answer):
    """``chat.completion`` and ``chat.completion.chunk`` objects."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "chatcmpl")

    def whole(self, completion: Completion) -> dict[str, Any]:
        choice = {
            "finish_reason": completion.finish_reason,
            "index": 0,
            "message": {"role": "assistant", "content": completion.text},
        }
        return self._object(
            "chat.completion",
            [choice],
            usage=usage_json(completion.usage),
            timings=timings_json(completion.usage, completion.timings),
        )

    def opening(self) -> Iterable[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": None})]

    def middle(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def closing(self, piece: Piece, *, include_usage: bool) -> Iterable[dict[str, Any]]:
        usage = piece.usage or Usage()
        chunks = [self._chunk({}, finish_reason=piece.finish_reason)]
        if include_usage:
            chunks.append(self._object("chat.completion.chunk", [], usage=usage_json(usage)))
        chunks[-1]["timings"] = timings_json(usage, piece.timings or Timings())
        return chunks

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [{"finish_reason": finish_reason, "index": 0, "delta": delta}])
