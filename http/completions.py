"""``POST /v1/completions``, whole and streamed."""

from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import OpenAIAnswer, Summary, progress_json, timed
from llamaherd.http.choices import start_prompts
from llamaherd.http.delivery import respond
from llamaherd.http.front import Front
from llamaherd.http.logprobs import kept_probs, logprobs_json
from llamaherd.http.mold import Mold
from llamaherd.http.schema import CompletionBody, parse
from llamaherd.pool import Completion, Piece, TokenProbs

__all__ = ["TextAnswer", "completions"]


async def completions(front: Front, request: Request) -> Response:
    """Continue one prompt, or several."""
    body = parse(await front.read(request), CompletionBody)
    works = start_prompts(front, request, body)
    return await respond(
        front, request, body, works, TextAnswer(works[0].model, body.shown_probs, post=bool(body.post_sampling_probs))
    )


class TextAnswer(OpenAIAnswer):
    """``text_completion`` objects; whole answers and chunks share the name.

    Args:
        model: The name under which the pool knows the model.
        shown_probs: How many likely tokens ``logprobs`` tells with each; None makes it null.
        post: It tells what the samplers have left.
    """

    def __init__(self, model: str, shown_probs: int | None = None, *, post: bool = False) -> None:
        super().__init__(model, "cmpl")
        self._shown = shown_probs
        self._molds: dict[int, Mold] = {}
        self._post = post

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            self._choice(index, completion.text, completion.finish_reason, kept_probs(completion))
            for index, completion in enumerate(completions)
        ]
        return self._object("text_completion", choices, **Summary.of(completions, per_prompt=self.per_prompt).to_json())

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        return []

    def frames(self, index: int, piece: Piece) -> bytes:
        if piece.probs or piece.progress is not None or piece.timings is not None or not piece.text:
            return super().frames(index, piece)
        mold = self._molds.get(index)
        if mold is None:
            mold = Mold(lambda text: self.frame(self._object("text_completion", [self._choice(index, text, None)])))
            self._molds[index] = mold
        return mold.fill(piece.text)

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.progress is not None:
            progress = progress_json(piece.progress)
            return [self._object("text_completion", [self._choice(index, "", None)], prompt_progress=progress)]
        if not piece.text and not piece.probs:
            return []
        return [self._object("text_completion", [self._choice(index, piece.text, None, piece.probs)], **timed(piece))]

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        chunks = [self._object("text_completion", [self._choice(index, "", piece.finish_reason)])]
        if summary is not None:
            if summary.wanted:
                chunks.append(self._object("text_completion", []))
            # llama-server counts in the last chunk, asked or not; OpenAI in one of its own, if asked. Never in both.
            chunks[-1] |= summary.to_json()
        return chunks

    def _choice(
        self, index: int, text: str, finish_reason: str | None, probs: Sequence[TokenProbs] = ()
    ) -> dict[str, Any]:
        logprobs = logprobs_json(probs, self._shown, post=self._post) if probs else None
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}
