"""``GET /health``: whether the front end answers. It never touches a model."""

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.front import Front, json_response

__all__ = ["health"]


async def health(front: Front, request: Request) -> Response:
    """Answer ``{"status": "ok"}``."""
    return json_response({"status": "ok"})
