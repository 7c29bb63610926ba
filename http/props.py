"""``GET /props``: what the server is, or with ``?model=`` what one model is. Asking wakes and loads nothing.

Without ``model`` a server of a single model tells both: clients that know no router look for the context's size here.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import FINGERPRINT
from llamaherd.http.front import Front, json_response
from llamaherd.http.native import default_settings
from llamaherd.pool import ModelStatus, State

__all__ = ["props"]


async def props(front: Front, request: Request) -> Response:
    """Answer with the properties of the server or of a model."""
    model = request.query_params.get("model")
    if model:
        front.check_model(model)
        return json_response(_model(front, front.pool.status(model)))
    answer, only = _router(front), front.default_model
    if only and front.may_see(only):
        answer |= _model(front, front.pool.status(only))
    return json_response(answer)


def _router(front: Front) -> dict[str, Any]:
    # The first three are what clients of llama-server's router look for; the next three keep its web page from failing.
    return {
        "role": "router",
        "models_autoload": front.autoload,
        "build_info": FINGERPRINT,
        "model_alias": "llamaherd",
        "model_path": "none",
        "default_generation_settings": {"params": {}, "n_ctx": 0},
    }


def _model(front: Front, status: ModelStatus) -> dict[str, Any]:
    settings: dict[str, Any] = {"params": default_settings(front.defaults_of(status.name))}
    meta: dict[str, Any] = (status.info or {}).get("meta", {})
    if "n_ctx" in meta:
        settings["n_ctx"] = meta["n_ctx"]
    answer: dict[str, Any] = {
        "default_generation_settings": settings,
        "model_alias": status.name,
        "modalities": {"vision": "image" in status.modalities, "audio": "audio" in status.modalities},
        "build_info": FINGERPRINT,
        "is_sleeping": status.state == State.SLEEPING,
        "status": status.state,
    }
    if status.path is not None:
        answer["model_path"] = status.path
    spec = front.specs.get(status.name)
    if spec is not None:
        answer["total_slots"] = spec.options.n_parallel
        if spec.options.chat_template:
            answer["chat_template"] = spec.options.chat_template
    return answer
