"""What the answers of the APIs share: their shape, counts and timings."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, Final, NamedTuple

from llamaherd.http.problems import problem_of
from llamaherd.http.sse import DONE, frame
from llamaherd.pool import Completion, Piece, PromptProgress, Timings, Usage

__all__ = [
    "FINGERPRINT",
    "Answer",
    "OpenAIAnswer",
    "Summary",
    "progress_json",
    "timed",
    "timings_json",
    "usage_json",
]

#: Who made an answer.
FINGERPRINT: Final = f"llamaherd-{version('llamaherd')}"


def usage_json(usage: Usage, reasoning: int = 0) -> dict[str, Any]:
    """Return token counts in OpenAI's shape; so many of the answer's were reasoning."""
    return {
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def timings_json(usage: Usage, timings: Timings) -> dict[str, Any]:
    """Return llama-server's ``timings``: milliseconds, and rates that are 0 where nothing was measured.

    The prompt's time ends with the answer's first token, so the rates of the answer are those of the tokens after it.
    """
    prompt_n, predicted_n = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": prompt_n,
        **_pace("prompt", prompt_n, timings.prompt_ms),
        "predicted_n": predicted_n,
        **_pace("predicted", predicted_n - 1, timings.predicted_ms),
    }


def _pace(name: str, count: int, ms: float) -> dict[str, Any]:
    return {
        f"{name}_ms": ms,
        f"{name}_per_token_ms": ms / count if count > 0 else 0.0,
        f"{name}_per_second": count * 1000 / ms if count > 0 and ms > 0 else 0.0,
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

    def frames(self, index: int, piece: Piece) -> bytes:
        """Return the events that a piece of a choice before its last becomes."""
        return b"".join(map(self.frame, self.middle(index, piece)))

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


def timed(piece: Piece) -> dict[str, Any]:
    """Return the ``timings`` of a piece before the last, where they were asked for."""
    return {} if piece.timings is None or piece.usage is None else {"timings": timings_json(piece.usage, piece.timings)}


class Summary(NamedTuple):
    """What all choices of an answer took together.

    Attributes:
        usage: Each prompt counts once, as OpenAI has it.
        timings: None where several generations ran side by side.
        wanted: Whether the client has asked for the usage.
        reasoning: Tokens of all answers that were reasoning.
    """

    usage: Usage
    timings: Timings | None
    wanted: bool = False
    reasoning: int = 0

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
        timings = (ends[0].timings or Timings()) if len(ends) == 1 else None
        return cls(usage, timings, wanted, sum(end.reasoning_tokens for end in ends))

    def usage_json(self) -> dict[str, Any]:
        """Return the content of ``usage``."""
        return usage_json(self.usage, self.reasoning)

    def to_json(self) -> dict[str, Any]:
        """Return ``usage``, and ``timings`` where there are some."""
        return {"usage": self.usage_json(), **self.timings_json()}

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
