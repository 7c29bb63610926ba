"""``GET /health``: whether the front end answers. It never touches a model."""

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import UNAVAILABLE, Problem

__all__ = ["health"]


async def health(front: Front, request: Request) -> Response:
    """Answer ``{"status": "ok"}``, or 503 as long as the model that the server is there for was never loaded."""
    if front.health_waits and front.default_model:
        status = front.pool.status(front.default_model)
        if status.info is None:
            raise Problem(UNAVAILABLE, "The model could not be loaded" if status.failed else "Loading model")
    return json_response({"status": "ok"})
