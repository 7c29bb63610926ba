"""Anthropic's API: ``POST /v1/messages``, whole and streamed, and ``/v1/messages/count_tokens``."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, Summary, respond
from llamaherd.http.anthropic_body import MessagesBody, to_chat
from llamaherd.http.chat import start_chat
from llamaherd.http.counting import count_tokens
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import problem_of
from llamaherd.http.schema import ChatBody, parse
from llamaherd.http.shapes import anthropic_error
from llamaherd.http.sse import named_frame
from llamaherd.pool import Completion, Piece, Usage

__all__ = ["MessageAnswer", "messages", "messages_count"]


async def messages(front: Front, request: Request) -> Response:
    """Answer a conversation."""
    body = _parse(await front.read(request))
    works = start_chat(front, request, body)
    return await respond(front, request, body, works, MessageAnswer(works[0].model))


async def messages_count(front: Front, request: Request) -> Response:
    """Answer with the tokens of a conversation's prompt."""
    body = _parse(await front.read(request))
    return json_response({"input_tokens": await count_tokens(front, request, body)})


def _parse(raw: dict[str, Any]) -> ChatBody:
    return parse(to_chat(parse(raw, MessagesBody)), ChatBody)


class MessageAnswer(Answer):
    """A ``message`` object, or the events that make one: blocks one after the other, each started and stopped."""

    ending = b""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"msg_{secrets.token_hex(16)}"
        self._index = -1
        self._open = ""

    def frame(self, chunk: dict[str, Any]) -> bytes:
        return named_frame(chunk)

    def error_frame(self, error: Exception) -> bytes:
        return named_frame(anthropic_error(problem_of(error)))

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        blocks: list[dict[str, Any]] = []
        if completion.text:
            blocks.append({"type": "text", "text": completion.text})
        return {**self._message(blocks, completion.usage), **_stop_json(completion)}

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        message = {**self._message([], Usage()), "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": message}]

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []
        if piece.text:
            if self._open != "text":
                chunks += self._switch("text", {"type": "text", "text": ""})
            chunks.append(self._delta({"type": "text_delta", "text": piece.text}))
        return chunks

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        usage = piece.usage or Usage()
        return [
            *self._switch("", {}),
            {"type": "message_delta", "delta": _stop_json(piece), "usage": _usage_json(usage)},
            {"type": "message_stop"},
        ]

    def _switch(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        """Stop the block that is open, and start another unless the kind is empty."""
        chunks: list[dict[str, Any]] = []
        if self._open:
            chunks.append({"type": "content_block_stop", "index": self._index})
        self._open = kind
        if kind:
            self._index += 1
            chunks.append({"type": "content_block_start", "index": self._index, "content_block": block})
        return chunks

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _message(self, blocks: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": blocks,
            "model": self._model,
            "usage": _usage_json(usage),
        }


def _stop_json(end: Completion | Piece) -> dict[str, Any]:
    word = end.stopping_word or None
    reason = "max_tokens" if end.finish_reason == "length" else "stop_sequence" if word else "end_turn"
    return {"stop_reason": reason, "stop_sequence": word}


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
