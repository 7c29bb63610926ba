"""``GET`` and ``POST /lora-adapters``: a model's LoRA adapters. Neither loads nor wakes it."""

from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.front import Front, json_response
from llamaherd.http.schema import ModelBody

__all__ = ["list_adapters", "set_adapters"]


async def list_adapters(front: Front, request: Request) -> Response:
    """List the adapters of the model that the query names."""
    adapters = await front.pool.adapters(_model_of(front, request))
    return json_response([msgspec.structs.asdict(adapter) for adapter in adapters])


async def set_adapters(front: Front, request: Request) -> Response:
    """Set the scales for requests that name none. Adapters that the list leaves out are off."""
    front.check_manage()
    lora = cast("list[Any]", await front.read_list(request))  # the pool looks at every entry
    front.pool.set_adapters(_model_of(front, request), lora)
    return json_response({"success": True})


def _model_of(front: Front, request: Request) -> str:
    return front.model_of(ModelBody(model=request.query_params.get("model")))
