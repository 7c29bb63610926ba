"""OpenAI's newer API: ``POST /v1/responses``, whole and streamed, and ``/v1/responses/input_tokens``."""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, Summary, progress_json, timings_json
from llamaherd.http.chat import start_chat
from llamaherd.http.counting import count_tokens, counted_json
from llamaherd.http.delivery import respond
from llamaherd.http.front import Front
from llamaherd.http.logprobs import kept_probs, probs_json
from llamaherd.http.problems import problem_of
from llamaherd.http.responses_body import ResponsesBody, to_chat
from llamaherd.http.responses_items import CallItem, Item, MessageItem, ReasoningItem
from llamaherd.http.schema import ChatBody, parse
from llamaherd.http.sse import named_frame
from llamaherd.pool import Completion, Piece, Timings, Usage

__all__ = ["ResponseAnswer", "responses", "responses_input_tokens"]

AnyItem = TypeVar("AnyItem", bound=Item)


async def responses(front: Front, request: Request) -> Response:
    """Answer a conversation."""
    raw = await front.read(request)
    body = parse(raw, ResponsesBody)
    chat = parse(to_chat(body, raw), ChatBody)
    works = start_chat(front, request, chat)
    return await respond(front, request, chat, works, ResponseAnswer(works[0].model, body, chat))


async def responses_input_tokens(front: Front, request: Request) -> Response:
    """Answer with the tokens of a conversation's prompt."""
    raw = await front.read(request)
    chat = parse(to_chat(parse(raw, ResponsesBody), raw), ChatBody)
    return counted_json(await count_tokens(front, request, chat))


class ResponseAnswer(Answer):
    """A ``response`` object, or the events that make one: its items one after the other, each added and done.

    Args:
        model: The name under which the pool knows the model.
        body: What was asked for; the object repeats some of it.
        chat: The same as a chat.
    """

    ending = b""

    def __init__(self, model: str, body: ResponsesBody, chat: ChatBody) -> None:
        self._shown = chat.shown_probs
        self._common = _common_json(model, body, chat)
        self._number = 0
        self._done: list[dict[str, Any]] = []
        self._item: Item | None = None

    def frame(self, chunk: dict[str, Any]) -> bytes:
        chunk["sequence_number"] = self._number
        self._number += 1
        return named_frame(chunk)

    def error_frame(self, error: Exception) -> bytes:
        # OpenAI's event has the fields at its top; its client looks for llama-server's object, and raises that.
        body = problem_of(error).to_dict()
        told = body["error"]
        return self.frame(
            {
                "type": "error",
                "code": told["type"],
                "message": told["message"],
                "param": told.get("param"),
                "error": told,
            }
        )

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        if completion.reasoning:
            self._open(ReasoningItem(len(self._done))).add(completion.reasoning)
        if completion.text:
            self._close()
            message = self._open(MessageItem(len(self._done)))
            message.add(completion.text, probs_json(kept_probs(completion), self._shown or 0))
        for call in completion.tool_calls:
            self._close()
            self._open(CallItem(len(self._done), call.id, call.name)).add(call.arguments)
        self._close(limit=completion.finish_reason == "length")
        return {
            **self._response(completion),
            "timings": timings_json(completion.usage, completion.timings),
        }

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        return [
            {"type": "response.created", "response": self._response()},
            {"type": "response.in_progress", "response": self._response()},
        ]

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.progress is not None:
            # Of the response as little as llama-server says: a long prompt has many of these events.
            response = {"id": self._common["id"], "object": "response", "status": "in_progress"}
            told = {"prompt_progress": progress_json(piece.progress)}
            return [{"type": "response.in_progress", "response": response, **told}]
        chunks: list[dict[str, Any]] = []
        item = self._item
        if piece.reasoning:
            if not isinstance(item, ReasoningItem):
                chunks += self._close()
                item = self._open(ReasoningItem(len(self._done)))
                chunks += item.begin()
            chunks.append(item.add(piece.reasoning))
        if piece.text:
            if not isinstance(item, MessageItem):
                chunks += self._close()
                item = self._open(MessageItem(len(self._done)))
                chunks += item.begin()
            chunks.append(item.add(piece.text, probs_json(piece.probs, self._shown or 0)))
        for call in piece.calls:
            if call.id:
                chunks += self._close()
                item = self._open(CallItem(len(self._done), call.id, call.name))
                chunks += item.begin()
            if call.arguments and isinstance(item, CallItem):
                chunks.append(item.add(call.arguments))
        return chunks

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        chunks = self._close(limit=piece.finish_reason == "length")
        response = self._response(piece)
        timings = timings_json(piece.usage or Usage(), piece.timings or Timings())
        return [*chunks, {"type": f"response.{response['status']}", "response": response, "timings": timings}]

    def _open(self, item: AnyItem) -> AnyItem:
        self._item = item
        return item

    def _close(self, *, limit: bool = False) -> list[dict[str, Any]]:
        """End the item that is open, if one is; with ``limit`` it is what the answer was cut in."""
        if self._item is None:
            return []
        status = self._item.status_at(limit=limit)
        chunks = self._item.end(status)
        self._done.append(self._item.to_json(status))
        self._item = None
        return chunks

    def _response(self, end: Completion | Piece | None = None) -> dict[str, Any]:
        response = {**self._common, "status": "in_progress", "output": list(self._done), "usage": None}
        if end is None:
            return response
        cut = end.finish_reason == "length"
        return response | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "usage": _usage_json(end.usage or Usage(), end.reasoning_tokens),
        }


def _common_json(model: str, body: ResponsesBody, chat: ChatBody) -> dict[str, Any]:
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": chat.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "store": False,
        "temperature": chat.temperature,
        "text": {"format": (body.text.format if body.text is not None else None) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool for tool in body.tools or () if tool.get("type") == "function"],
        "top_p": chat.top_p,
        "truncation": "disabled",
    }


def _usage_json(usage: Usage, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
