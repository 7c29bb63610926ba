"""From an error to an HTTP answer: the one table, and the one shape of error bodies.

Bodies are llama-server's, ``{"error": {"code": <HTTP status>, "message": ..., "type": ...}}``, with its words for
``type``. The ``openai`` client reads the same body, and obeys the ``x-should-retry`` header that errors of the server's
side carry.
"""

import logging
import math
import re
import secrets
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llamaherd.http.fields import as_sent
from llamaherd.pool import (
    BadRequest,
    DownloadFailed,
    LoadFailed,
    ModelBusy,
    ModelNotFound,
    ModelNotLoaded,
    PoolClosed,
    PoolError,
    QueueFull,
    QueueTimeout,
    WorkerDied,
    WorkerFailed,
)

__all__ = [
    "AUTHENTICATION",
    "DISABLED",
    "EXCEED_CONTEXT",
    "INVALID_REQUEST",
    "NOT_FOUND",
    "NOT_OFFERED",
    "NOT_SUPPORTED",
    "PERMISSION",
    "SERVER_ERROR",
    "TABLE",
    "UNAVAILABLE",
    "Kind",
    "Problem",
    "problem_of",
    "without_folders",
]

logger: Final = logging.getLogger("llamaherd.http")


class Kind(NamedTuple):
    """An HTTP status and llama-server's word for the ``type`` of such an error."""

    status: int
    type: str


INVALID_REQUEST: Final = Kind(400, "invalid_request_error")
EXCEED_CONTEXT: Final = Kind(400, "exceed_context_size_error")
# llama-server has this word with 501; a 4xx says better that the same request will not do next time either.
NOT_SUPPORTED: Final = Kind(400, "not_supported_error")
AUTHENTICATION: Final = Kind(401, "authentication_error")
PERMISSION: Final = Kind(403, "permission_error")
DISABLED: Final = Kind(403, "feature_disabled")
NOT_FOUND: Final = Kind(404, "not_found_error")
SERVER_ERROR: Final = Kind(500, "server_error")
NOT_OFFERED: Final = Kind(501, NOT_SUPPORTED.type)
UNAVAILABLE: Final = Kind(503, "unavailable_error")

#: What each error of the pool is to a client. An unknown model is 400, as in llama-server's router.
TABLE: Final[Mapping[type[PoolError], Kind]] = MappingProxyType(
    {
        BadRequest: INVALID_REQUEST,
        ModelNotFound: INVALID_REQUEST,
        ModelNotLoaded: INVALID_REQUEST,
        ModelBusy: INVALID_REQUEST,
        QueueFull: UNAVAILABLE,
        QueueTimeout: UNAVAILABLE,
        DownloadFailed: INVALID_REQUEST,
        LoadFailed: SERVER_ERROR,
        WorkerDied: SERVER_ERROR,
        WorkerFailed: SERVER_ERROR,
        PoolClosed: UNAVAILABLE,
        PoolError: SERVER_ERROR,
    }
)

#: The folders of an absolute path. A worker's last words may name files; whoever asks the server need not know where it
#: keeps them, and the log tells operators.
_FOLDERS: Final = re.compile(r"(?<![\w./])/(?:[^\s/'\"|:;,]+/)+")

#: Codes that make an error special, whatever its class.
_BY_CODE: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "context_length_exceeded": EXCEED_CONTEXT,
        "rate_limited": UNAVAILABLE,
        "unreachable": UNAVAILABLE,
        "disk_full": SERVER_ERROR,
        "unsupported_by_model": NOT_OFFERED,
    }
)


class Problem(Exception):
    """An HTTP error answer on its way; raise it from a handler.

    Attributes:
        kind: Status and type.
        message: For people; goes to the client as it is.
        param: The field of the request that is wrong, if one is.
        headers: Further headers of the answer.
        details: Further fields of the error, such as llama-server's ``n_prompt_tokens`` and ``n_ctx``.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the error body."""
        error: dict[str, Any] = {"code": self.kind.status, "message": self.message, "type": self.kind.type}
        if self.param is not None:
            error["param"] = self.param
        return {"error": error | self.details}

    def to_response(self, content: Mapping[str, Any] | None = None) -> Response:
        """Return the error as an HTTP answer.

        Args:
            content: A body of another shape than :meth:`to_dict` has.
        """
        body = msgspec.json.encode(self.to_dict() if content is None else content)
        return Response(body, self.kind.status, self.headers, media_type="application/json; charset=utf-8")


def problem_of(error: Exception, sent: Collection[str] = ()) -> Problem:
    """Return what a client is told of an error, by the names of the fields that it has sent.

    What is nobody's known error becomes a 500 that says nothing of the inside; the traceback goes to the log, and the
    answer carries the word to find it by.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, PoolError):
        return _from_pool(error, sent)
    if isinstance(error, HTTPException):
        return _from_starlette(error)
    incident = secrets.token_hex(4)
    logger.error("unexpected error, incident %s", incident, exc_info=error)
    return Problem(
        SERVER_ERROR, f"internal error, incident {incident} in the server's log", headers={"x-should-retry": "false"}
    )


def without_folders(text: str) -> str:
    """Return a text whose absolute paths have lost their folders."""
    return _FOLDERS.sub("", text)


def _from_pool(error: PoolError, sent: Collection[str]) -> Problem:
    kind = _BY_CODE.get(error.code) or next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    if isinstance(error, DownloadFailed) and error.retry and error.code != "cancelled" and kind is INVALID_REQUEST:
        kind = UNAVAILABLE  # it is not the request that is wrong, but the hub, the registry or the worker
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        if kind is SERVER_ERROR:
            kind = UNAVAILABLE  # whoever knows when it will work again is away, not broken
    if kind.status >= 500:
        headers["x-should-retry"] = "true" if error.retry else "false"
    if kind is SERVER_ERROR:
        logger.warning("%s: %r", type(error).__name__, str(error))
    message, param, details = str(error), None, None
    if isinstance(error, BadRequest):
        (message, param), details = as_sent(error, sent), error.details
    if kind.status >= 500:
        message = without_folders(message)
    return Problem(kind, message, param=param, headers=headers, details=details)


def _from_starlette(error: HTTPException) -> Problem:
    if error.status_code == 404:
        return Problem(NOT_FOUND, "no such route")
    message = "method not allowed" if error.status_code == 405 else error.detail
    return Problem(Kind(error.status_code, INVALID_REQUEST.type), message, headers=error.headers)
