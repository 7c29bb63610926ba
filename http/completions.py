"""``POST /v1/completions``, whole and streamed."""

from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, respond, timings_json, usage_json
from llamaherd.http.body import read_json
from llamaherd.http.front import Front
from llamaherd.http.schema import CompletionBody, parse
from llamaherd.pool import Completion, Piece, Timings, Usage

__all__ = ["TextAnswer", "completions"]


async def completions(front: Front, request: Request) -> Response:
    """Continue a prompt."""
    body = parse(await read_json(request, front.max_body_bytes), CompletionBody)
    model = front.model_of(body)
    work = front.pool.complete(model, body.to_prompt(), autoload=front.autoload_of(request), **body.to_params())
    return await respond(front, request, body, work, TextAnswer(work.model))


class TextAnswer(Answer):
    """``text_completion`` objects; whole answers and chunks share the name."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "cmpl")

    def whole(self, completion: Completion) -> dict[str, Any]:
        return self._chunk(
            completion.text,
            completion.finish_reason,
            usage=usage_json(completion.usage),
            timings=timings_json(completion.usage, completion.timings),
        )

    def opening(self) -> Iterable[dict[str, Any]]:
        return []

    def middle(self, text: str) -> dict[str, Any]:
        return self._chunk(text, None)

    def closing(self, piece: Piece, *, include_usage: bool) -> Iterable[dict[str, Any]]:
        usage = piece.usage or Usage()
        chunks = [self._chunk("", piece.finish_reason)]
        if include_usage:
            chunks.append(self._object("text_completion", []))
        # llama-server counts in the last chunk, asked or not; OpenAI in one of its own, if asked. Never in both.
        chunks[-1]["usage"] = usage_json(usage)
        chunks[-1]["timings"] = timings_json(usage, piece.timings or Timings())
        return chunks

    def _chunk(self, text: str, finish_reason: str | None, **more: Any) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}
        return self._object("text_completion", [choice], **more)
