"""What the answers of ``/chat/completions`` and ``/completions`` share: counts, timings, the way to the client."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.choices import Choices, collect_all
from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import problem_of
from llamaherd.http.schema import GenerateBody
from llamaherd.http.sse import DONE, EventStream, frame
from llamaherd.http.tally import Meter
from llamaherd.pool import Completion, Generation, Piece, PromptProgress, Timings, Usage, WorkerFailed

__all__ = ["FINGERPRINT", "Answer", "OpenAIAnswer", "Summary", "progress_json", "respond", "timings_json", "usage_json"]

#: Longest interval between comments that is set, in seconds: more is none, and a number may have any length.
_LONGEST_PING: Final = 86_400
#: Who made an answer.
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


def progress_json(progress: PromptProgress) -> dict[str, Any]:
    """Return llama-server's ``prompt_progress``."""
    return {
        "total": progress.total,
        "cache": progress.cache,
        "processed": progress.processed,
        "time_ms": round(progress.time_ms),
    }


class Answer(ABC):
    """The JSON of one answer, whole or in chunks; each API has its own.

    Attributes:
        ending: What a stream ends with, after its last chunk.
        per_prompt: How many answers each prompt of the request has; they follow each other.
    """

    ending: bytes = DONE
    per_prompt: int = 1

    def frame(self, chunk: dict[str, Any]) -> bytes:
        """Return the event of a stream that a chunk is."""
        return frame(chunk)

    def error_frame(self, error: Exception) -> bytes:
        """Return the event that tells of an error in the middle of a stream."""
        return frame(problem_of(error).to_dict())

    @abstractmethod
    def whole(self, completions: Sequence[Completion]) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the answer to a request without ``stream``."""

    @abstractmethod
    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        """Return the chunks that come before the first text of a choice."""

    @abstractmethod
    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        """Return the chunks that a piece of a choice before its last becomes."""

    @abstractmethod
    def closing(self, index: int, piece: Piece, summary: "Summary | None") -> Iterable[dict[str, Any]]:
        """Return the chunks that the last piece of a choice becomes; with the summary, the stream ends with them."""


class Summary(NamedTuple):
    """What all choices of an answer took together.

    Attributes:
        usage: Each prompt counts once, as OpenAI has it.
        timings: None where several generations ran side by side.
        wanted: Whether the client has asked for the usage.
    """

    usage: Usage
    timings: Timings | None
    wanted: bool = False

    @classmethod
    def of(cls, ends: Sequence[Completion | Piece], *, per_prompt: int = 1, wanted: bool = False) -> "Summary":
        """Return the summary of answers, or of their last pieces; ``per_prompt`` that follow each other have one."""
        usages = [end.usage or Usage() for end in ends]
        prompts = usages[::per_prompt]
        usage = Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
        )
        return cls(usage, (ends[0].timings or Timings()) if len(ends) == 1 else None, wanted)

    def to_json(self) -> dict[str, Any]:
        """Return ``usage``, and ``timings`` where there are some."""
        return {"usage": usage_json(self.usage), **self.timings_json()}

    def timings_json(self) -> dict[str, Any]:
        """Return ``timings`` where there are some."""
        return {} if self.timings is None else {"timings": timings_json(self.usage, self.timings)}


class OpenAIAnswer(Answer):
    """What the objects of the OpenAI family share.

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


async def respond(
    front: Front, request: Request, body: GenerateBody, works: Sequence[Generation], answer: Answer
) -> Response:
    """Return the response that carries generations to their client; a client that leaves cancels them."""
    meters = [front.meter(work) for work in works]
    answer.per_prompt = body.choices
    if body.stream:
        wish = body.sse_ping_interval
        ping = front.stream_ping if wish is None else float(min(wish, _LONGEST_PING)) if wish > 0 else None
        return EventStream(
            _Chunks(meters, answer, include_usage=body.include_usage), ping=ping, on_error=answer.error_frame
        )
    completions = await while_connected(request.receive, collect_all(meters))
    if any(completion.finish_reason == "cancelled" for completion in completions):
        raise _cancelled()
    return json_response(answer.whole(completions))


class _Chunks:
    """Generations as frames. ``anext`` on choices loses nothing when cancelled, so neither does this."""

    def __init__(self, meters: Sequence[Meter], answer: Answer, *, include_usage: bool) -> None:
        self._choices = Choices(meters)
        self._answer = answer
        self._include_usage = include_usage
        self._opened: set[int] = set()
        self._ends: dict[int, Piece] = {}
        self._count = len(meters)
        self._cancelled = False

    async def __anext__(self) -> bytes:
        while True:
            if self._cancelled:
                raise _cancelled()
            frames = self._frames(*await anext(self._choices))
            # What has come meanwhile goes out in the same write: a client that lags costs fewer of them, not more.
            while (more := self._choices.next_nowait()) is not None:
                frames += self._frames(*more)
            if frames:
                return frames

    def _frames(self, index: int, piece: Piece) -> bytes:
        if piece.finish_reason == "cancelled":
            self._cancelled = True
            return b""
        chunks: list[dict[str, Any]] = []
        if index not in self._opened:
            self._opened.add(index)
            chunks.extend(self._answer.opening(index))
        if piece.finish_reason is None:
            chunks.extend(self._answer.middle(index, piece))
            return b"".join(map(self._answer.frame, chunks))
        self._ends[index] = piece
        summary = None
        if len(self._ends) == self._count:
            ends = [self._ends[number] for number in range(self._count)]
            summary = Summary.of(ends, per_prompt=self._answer.per_prompt, wanted=self._include_usage)
        chunks.extend(self._answer.closing(index, piece, summary))
        return b"".join(map(self._answer.frame, chunks)) + (self._answer.ending if summary is not None else b"")

    async def aclose(self) -> None:
        await self._choices.aclose()


def _cancelled() -> WorkerFailed:
    # This client did not cancel, or it would not read this. "stop" would pass half an answer off as a whole one.
    return WorkerFailed("the generation was cancelled before its end", code="cancelled", retry=True)
