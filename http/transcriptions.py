"""OpenAI's ``POST /v1/audio/transcriptions``, whole and streamed: a chat that shows the model a sound.

As in llama-server the ``prompt`` is what the model is told to do with it.
"""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, Summary
from llamaherd.http.chat import start_chat
from llamaherd.http.delivery import respond
from llamaherd.http.form import parse_form, texts_of
from llamaherd.http.front import Front
from llamaherd.http.problems import INVALID_REQUEST, NOT_OFFERED, NOT_SUPPORTED, Problem
from llamaherd.http.schema import ChatBody, QueuedBody, parse
from llamaherd.pool import Completion, Piece, Usage

__all__ = ["TranscriptAnswer", "TranscriptionBody", "TranscriptionForm", "transcriptions"]

#: llama-server's.
_INSTRUCTION: Final = "Transcribe audio to text"


class TranscriptionBody(QueuedBody, frozen=True, kw_only=True):
    """The texts of the form.

    Attributes:
        prompt: What to do with the sound; by default to transcribe it.
        language: Of the sound; the model is told.
        response_format: ``json``; others are refused.
    """

    prompt: str | None = None
    language: str | None = None
    response_format: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


class TranscriptionForm(TranscriptionBody, frozen=True, kw_only=True):
    """The form. Its texts are the values of the types that they have here.

    Attributes:
        file: WAV or MP3.
    """

    file: bytes


async def transcriptions(front: Front, request: Request) -> Response:
    """Write down what is said in a sound file."""
    fields = parse_form(request.headers.get("content-type", ""), await front.read_bytes(request))
    sound = fields.pop("file", b"")
    if not sound:
        raise Problem(INVALID_REQUEST, '"file" is required', param="file")
    body = parse(texts_of(fields), TranscriptionBody, strict=False)
    if body.response_format not in (None, "", "json"):
        message = "response_format: only 'json' is supported; there are no times that other formats could tell"
        raise Problem(NOT_SUPPORTED, message, param="response_format")
    _check_hears(front, front.model_of(body))
    chat = _chat_of(body, sound)
    works = start_chat(front, request, chat)
    return await respond(front, request, chat, works, TranscriptAnswer())


def _check_hears(front: Front, model: str) -> None:
    """Raise Problem if a model is known to take no sounds; of one that is still to come its worker says so."""
    status = front.pool.status(model)
    if "audio" not in status.modalities and status.path is not None and Path(status.path).exists():
        raise Problem(
            NOT_OFFERED, f"model {status.name!r} does not take in sounds: it has no projector for them", param="model"
        )


def _chat_of(body: TranscriptionBody, sound: bytes) -> ChatBody:
    text = body.prompt or _INSTRUCTION
    if body.language:
        text += f" (language: {body.language})"
    content: list[dict[str, Any]] = [
        {"type": "text", "text": text},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode()}},
    ]
    own = {"prompt", "language", "response_format"}
    kept = {name: getattr(body, name) for name in body.__struct_fields__ if name not in own}
    return ChatBody(messages=[{"role": "user", "content": content}], **kept)


class TranscriptAnswer(Answer):
    """A transcript, or the events that make one; reasoning is left out."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        return _done_json(completion.text, completion.usage)

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        return ()

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        if not piece.text:
            return ()
        self._texts.append(piece.text)
        return ({"type": "transcript.text.delta", "delta": piece.text},)

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        return (_done_json("".join(self._texts), piece.usage or Usage()),)


def _done_json(text: str, usage: Usage) -> dict[str, Any]:
    return {
        "type": "transcript.text.done",
        "text": text,
        "usage": {
            "type": "tokens",
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
    }
