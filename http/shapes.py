"""The shape of error bodies: Anthropic's on its routes, llama-server's everywhere else."""

from types import MappingProxyType
from typing import Any, Final

from starlette.responses import Response

from llamaherd.http.problems import Problem

__all__ = ["anthropic_error", "problem_response"]

#: Where errors have Anthropic's shape.
_ANTHROPIC: Final = "/v1/messages"
#: Anthropic's words for the types of errors that have others here.
_ANTHROPIC_TYPES: Final = MappingProxyType(
    {
        "exceed_context_size_error": "invalid_request_error",
        "not_supported_error": "invalid_request_error",
        "feature_disabled": "permission_error",
        "server_error": "api_error",
        "unavailable_error": "overloaded_error",
    }
)


def anthropic_error(problem: Problem) -> dict[str, Any]:
    """Return an error body in Anthropic's shape; the fields of llama-server's are in it too."""
    error: dict[str, Any] = problem.to_dict()["error"]
    return {"type": "error", "error": {**error, "type": _ANTHROPIC_TYPES.get(error["type"], error["type"])}}


def problem_response(problem: Problem, path: str) -> Response:
    """Return the answer to a request for a path that came to nothing."""
    return problem.to_response(anthropic_error(problem) if path.startswith(_ANTHROPIC) else None)
