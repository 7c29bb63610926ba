"""What the answers of ``/chat/completions`` and ``/completions`` share: counts, timings, the way to the client."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import problem_of
from llamaherd.http.schema import GenerateBody
from llamaherd.http.sse import DONE, EventStream, frame
from llamaherd.pool import Completion, Generation, Piece, Timings, Usage, WorkerFailed

__all__ = ["Answer", "respond", "timings_json", "usage_json"]

FINGERPRINT: Final = f"llamaherd-{version('llamaherd')}"


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return token counts in OpenAI's shape."""
    return {
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timings_json(usage: Usage, timings: Timings) -> dict[str, Any]:
    """Return llama-server's ``timings``: milliseconds, and rates that are 0 where nothing was measured."""
    prompt_n = usage.prompt_tokens - usage.cached_tokens
    return {
        "cache_n": usage.cached_tokens,
        **_pace("prompt", prompt_n, timings.prompt_ms),
        **_pace("predicted", usage.completion_tokens, timings.predicted_ms),
    }


def _pace(name: str, count: int, ms: float) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": ms,
        f"{name}_per_token_ms": ms / count if count else 0.0,
        f"{name}_per_second": count * 1000 / ms if ms > 0 else 0.0,
    }


class Answer(ABC):
    """The JSON of one answer, whole or in chunks; each API has its own.

    Args:
        model: The name under which the pool knows the model.
        prefix: How the answer's id begins.
    """

    def __init__(self, model: str, prefix: str) -> None:
        self._common = {
            "created": int(time.time()),
            "id": f"{prefix}-{secrets.token_hex(16)}",
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"choices": choices, **self._common, "object": kind, **more}

    @abstractmethod
    def whole(self, completion: Completion) -> dict[str, Any]:
        """Return the answer to a request without ``stream``."""

    @abstractmethod
    def opening(self) -> Iterable[dict[str, Any]]:
        """Return the chunks that come before the first text."""

    @abstractmethod
    def middle(self, text: str) -> dict[str, Any]:
        """Return the chunk of a text."""

    @abstractmethod
    def closing(self, piece: Piece, *, include_usage: bool) -> Iterable[dict[str, Any]]:
        """Return the chunks that the last piece becomes."""


async def respond(front: Front, request: Request, body: GenerateBody, work: Generation, answer: Answer) -> Response:
    """Return the response that carries a generation to its client; a client that leaves cancels it."""
    if body.stream:
        wish = body.sse_ping_interval
        ping = front.stream_ping if wish is None else float(wish) if wish > 0 else None
        return EventStream(_Chunks(work, answer, include_usage=body.include_usage), ping=ping, on_error=_error_frame)
    completion = await while_connected(request.receive, work.collect())
    if completion.finish_reason == "cancelled":
        raise _cancelled()
    return json_response(answer.whole(completion))


class _Chunks:
    """A generation as frames. ``anext`` on a generation loses nothing when cancelled, so neither does this."""

    def __init__(self, work: Generation, answer: Answer, *, include_usage: bool) -> None:
        self._work = work
        self._answer = answer
        self._include_usage = include_usage
        self._opened = False

    async def __anext__(self) -> bytes:
        while True:
            frames = self._frames(await anext(self._work))
            if frames:
                return frames

    def _frames(self, piece: Piece) -> bytes:
        if piece.finish_reason == "cancelled":
            raise _cancelled()
        chunks: list[dict[str, Any]] = []
        if not self._opened:
            self._opened = True
            chunks.extend(self._answer.opening())
        if piece.text:
            chunks.append(self._answer.middle(piece.text))
        if piece.finish_reason is not None:
            chunks.extend(self._answer.closing(piece, include_usage=self._include_usage))
        frames = b"".join(map(frame, chunks))
        return frames if piece.finish_reason is None else frames + DONE

    async def aclose(self) -> None:
        await self._work.aclose()


def _cancelled() -> WorkerFailed:
    # This client did not cancel, or it would not read this. "stop" would pass half an answer off as a whole one.
    return WorkerFailed("the generation was cancelled before its end", code="cancelled", retry=True)


def _error_frame(error: Exception) -> bytes:
    return frame(problem_of(error).to_dict())
