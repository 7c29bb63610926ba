"""Anthropic's API: ``POST /v1/messages``, whole and streamed, and ``/v1/messages/count_tokens``."""

import secrets
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, Summary
from llamaherd.http.anthropic_body import MessagesBody, to_chat
from llamaherd.http.chat import start_chat
from llamaherd.http.counting import count_tokens
from llamaherd.http.delivery import respond
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import problem_of
from llamaherd.http.schema import ChatBody, parse
from llamaherd.http.shapes import anthropic_error
from llamaherd.http.sse import named_frame
from llamaherd.pool import Completion, Piece, Usage

__all__ = ["MessageAnswer", "messages", "messages_count"]

#: Anthropic's words for ends that have others here.
_STOP_REASONS: Final = MappingProxyType({"length": "max_tokens", "tool_calls": "tool_use"})


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
        self._started = False

    def frame(self, chunk: dict[str, Any]) -> bytes:
        return named_frame(chunk)

    def error_frame(self, error: Exception) -> bytes:
        return named_frame(anthropic_error(problem_of(error)))

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        blocks: list[dict[str, Any]] = []
        if completion.reasoning:
            blocks.append({"type": "thinking", "thinking": completion.reasoning, "signature": ""})
        if completion.text:
            blocks.append({"type": "text", "text": completion.text})
        blocks.extend(_use_json(call.id, call.name, _read_input(call.arguments)) for call in completion.tool_calls)
        return {**self._message(blocks, completion.usage), **_stop_json(completion)}

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        return []

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        chunks = self._start(piece)
        if piece.reasoning:
            if self._open != "thinking":
                chunks += self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            chunks.append(self._delta({"type": "thinking_delta", "thinking": piece.reasoning}))
        if piece.text:
            if self._open != "text":
                chunks += self._switch("text", {"type": "text", "text": ""})
            chunks.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.calls:
            if call.id:
                chunks += self._switch("tool_use", _use_json(call.id, call.name, {}))
            if call.arguments:
                chunks.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return chunks

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        usage = piece.usage or Usage()
        return [
            *self._start(piece),
            *self._switch("", {}),
            {"type": "message_delta", "delta": _stop_json(piece), "usage": _usage_json(usage)},
            {"type": "message_stop"},
        ]

    def _start(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the event that begins the message, unless it has begun. The first piece tells of the prompt."""
        if self._started:
            return []
        self._started = True
        usage = piece.usage or Usage()
        if piece.progress is not None:
            usage = Usage(prompt_tokens=piece.progress.total, cached_tokens=piece.progress.cache)
        counts = {**_usage_json(usage), "output_tokens": 0}
        message = {**self._message([], usage), "stop_reason": None, "stop_sequence": None, "usage": counts}
        return [{"type": "message_start", "message": message}]

    def _switch(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        """Stop the block that is open, and start another unless the kind is empty."""
        chunks: list[dict[str, Any]] = []
        if self._open == "thinking":
            # There is nothing to sign with, but clients wait for it.
            chunks.append(self._delta({"type": "signature_delta", "signature": ""}))
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
    reason = _STOP_REASONS.get(end.finish_reason or "") or ("stop_sequence" if word else "end_turn")
    return {"stop_reason": reason, "stop_sequence": word}


def _use_json(call: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call, "name": name, "input": arguments}


def _read_input(arguments: str) -> Any:
    """Return the arguments of a call; none of those that broke off, as in llama-server, or nest beyond any reader."""
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return {}


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
