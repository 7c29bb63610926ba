"""``POST /v1/completions``, whole and streamed."""

from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import OpenAIAnswer, Summary, respond
from llamaherd.http.choices import start_all
from llamaherd.http.front import Front
from llamaherd.http.schema import CompletionBody, parse
from llamaherd.pool import Completion, Piece

__all__ = ["TextAnswer", "completions"]


async def completions(front: Front, request: Request) -> Response:
    """Continue a prompt."""
    body = parse(await front.read(request), CompletionBody)
    model = front.model_of(body)
    prompt = body.to_prompt()
    autoload = front.autoload_of(request)
    works = start_all(
        body.choices, lambda index: front.pool.complete(model, prompt, autoload=autoload, **body.to_params(index))
    )
    return await respond(front, request, body, works, TextAnswer(works[0].model))


class TextAnswer(OpenAIAnswer):
    """``text_completion`` objects; whole answers and chunks share the name."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "cmpl")

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            _choice(index, completion.text, completion.finish_reason) for index, completion in enumerate(completions)
        ]
        return self._object("text_completion", choices, **Summary.of(completions).to_json())

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        return []

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        return [self._object("text_completion", [_choice(index, piece.text, None)])] if piece.text else []

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        chunks = [self._object("text_completion", [_choice(index, "", piece.finish_reason)])]
        if summary is not None:
            if summary.wanted:
                chunks.append(self._object("text_completion", []))
            # llama-server counts in the last chunk, asked or not; OpenAI in one of its own, if asked. Never in both.
            chunks[-1] |= summary.to_json()
        return chunks


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}
