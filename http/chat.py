"""``POST /v1/chat/completions``, whole and streamed."""

from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import OpenAIAnswer, Summary, progress_json, timed
from llamaherd.http.choices import start_all
from llamaherd.http.delivery import respond
from llamaherd.http.front import Front
from llamaherd.http.logprobs import kept_probs, logprobs_json
from llamaherd.http.mold import Mold
from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.schema import ChatBody, parse
from llamaherd.pool import CallDelta, Completion, Generation, Piece, TokenProbs

__all__ = ["ChatAnswer", "call_delta_json", "chat_completions", "message_json", "start_chat"]


async def chat_completions(front: Front, request: Request) -> Response:
    """Answer a chat."""
    body = parse(await front.read(request), ChatBody)
    works = start_chat(front, request, body)
    answer = ChatAnswer(works[0].model, body.shown_probs, post=bool(body.post_sampling_probs))
    return await respond(front, request, body, works, answer)


def start_chat(front: Front, request: Request, body: ChatBody) -> list[Generation]:
    """Return the generations that answer a chat. Raises Problem, and as the pool; none is left then."""
    model = front.model_of(body)
    if body.messages is None:
        raise Problem(INVALID_REQUEST, '"messages" is required', param="messages")
    messages, admission = body.messages, front.admit(request, body, model)
    return start_all(
        body.choices, lambda index: front.pool.chat(model, messages, **admission, **body.to_chat_params(index))
    )


def message_json(completion: Completion) -> dict[str, Any]:
    """Return an answer as OpenAI's message. Content is null where calls are all there is."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    if completion.reasoning:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["content"] = completion.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in completion.tool_calls
        ]
    return message


def call_delta_json(call: CallDelta) -> dict[str, Any]:
    """Return what a tool call gained in OpenAI's shape: the first delta has the id and the name."""
    function = {"arguments": call.arguments}
    if not call.id:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


class ChatAnswer(OpenAIAnswer):
    """``chat.completion`` and ``chat.completion.chunk`` objects, with ``logprobs`` where they were asked for.

    Args:
        model: The name under which the pool knows the model.
        shown_probs: How many likely tokens to tell with each; None tells nothing.
        post: Tell what the samplers have left.
    """

    def __init__(self, model: str, shown_probs: int | None = None, *, post: bool = False) -> None:
        super().__init__(model, "chatcmpl")
        self._shown = shown_probs
        self._molds: dict[tuple[int, str], Mold] = {}
        self._post = post

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            {
                "finish_reason": completion.finish_reason,
                "index": index,
                "message": message_json(completion),
                **self._logprobs(kept_probs(completion)),
            }
            for index, completion in enumerate(completions)
        ]
        return self._object("chat.completion", choices, **Summary.of(completions, per_prompt=self.per_prompt).to_json())

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": None})]

    def frames(self, index: int, piece: Piece) -> bytes:
        # Nearly every piece is a text and nothing else.
        plain = self._shown is None and not piece.calls and piece.progress is None and piece.timings is None
        if plain and not (piece.text and piece.reasoning):
            if piece.text:
                return self._mold(index, "content").fill(piece.text)
            return self._mold(index, "reasoning_content").fill(piece.reasoning) if piece.reasoning else b""
        return super().frames(index, piece)

    def _mold(self, index: int, field: str) -> Mold:
        mold = self._molds.get((index, field))
        if mold is None:
            mold = Mold(lambda text: self.frame(self._chunk(index, {field: text})))
            self._molds[index, field] = mold
        return mold

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.progress is not None:
            return [self._chunk(index, {}) | {"prompt_progress": progress_json(piece.progress)}]
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = [call_delta_json(call) for call in piece.calls]
        if not delta and not piece.probs:
            return []
        return [self._chunk(index, delta or {"content": ""}, **self._logprobs(piece.probs)) | timed(piece)]

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        chunks = [self._chunk(index, {}, finish_reason=piece.finish_reason)]
        if summary is not None:
            if summary.wanted:
                chunks.append(self._object("chat.completion.chunk", [], usage=summary.usage_json()))
            chunks[-1] |= summary.timings_json()
        return chunks

    def _logprobs(self, probs: Sequence[TokenProbs]) -> dict[str, Any]:
        logprobs = logprobs_json(probs, self._shown, post=self._post)
        return {} if logprobs is None else {"logprobs": logprobs}

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        choice = {"finish_reason": finish_reason, "index": index, "delta": delta, **more}
        return self._object("chat.completion.chunk", [choice])
