"""``GET /slots`` and ``POST /slots/{id_slot}``: what runs where in a model, and what its slots hold.

Looking wakes and loads nothing. The three actions are offered where ``--slot-save-path`` names a folder, as in
llama-server; ``--no-models-manage`` has no say in them.
"""

from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.front import Front, json_response
from llamaherd.http.problems import INVALID_REQUEST, NOT_OFFERED, UNAVAILABLE, Problem
from llamaherd.http.schema import ModelBody, SlotBody, parse
from llamaherd.pool import BadRequest, SlotState

__all__ = ["list_slots", "slot_action"]

_NO_FOLDER: Final = "This server does not support slots action. Start it with `--slot-save-path`"
#: Fields of the pool's sampling parameters that are no setting of llama-server's list.
_HIDDEN: Final = frozenset({"logit_bias"})


async def list_slots(front: Front, request: Request) -> Response:
    """List the slots of the model that the query names."""
    if not front.slots:
        raise Problem(NOT_OFFERED, "This server does not support slots endpoint. Start it with `--slots`")
    slots = await front.pool.slots(front.model_of(ModelBody(model=request.query_params.get("model"))))
    if request.query_params.get("fail_on_no_slot") and all(slot.busy for slot in slots):
        raise Problem(UNAVAILABLE, "no slot available")
    return json_response([_slot_json(slot) for slot in slots])


async def slot_action(front: Front, request: Request) -> Response:
    """Save, restore or erase what a slot holds, as the query's ``action`` says."""
    number, action = request.path_params["id_slot"], request.query_params.get("action", "")
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise Problem(INVALID_REQUEST, "Invalid slot ID", param="id_slot")
    if action not in ("save", "restore", "erase"):
        raise Problem(INVALID_REQUEST, "Invalid action", param="action")
    body = SlotBody() if action == "erase" else parse(await front.read(request), SlotBody)
    model = front.model_of(ModelBody(model=request.query_params.get("model") or body.model))
    if action != "erase" and body.filename is None:
        raise Problem(INVALID_REQUEST, '"filename" is required', param="filename")
    try:
        return json_response(await _act(front, model, int(number), action, body.filename or ""))
    except BadRequest as error:
        if error.code == "not_supported" and "slot_save_path" in str(error):
            raise Problem(NOT_OFFERED, _NO_FOLDER) from None
        raise


async def _act(front: Front, model: str, slot: int, action: str, name: str) -> dict[str, Any]:
    if action == "save":
        file = await front.pool.save_slot(model, slot, name)
        counts = {"n_saved": file.n_tokens, "n_written": file.n_bytes}
        return {"id_slot": slot, "filename": name, **counts, "timings": {"save_ms": file.ms}}
    if action == "restore":
        file = await front.pool.restore_slot(model, slot, name)
        counts = {"n_restored": file.n_tokens, "n_read": file.n_bytes}
        return {"id_slot": slot, "filename": name, **counts, "timings": {"restore_ms": file.ms}}
    return {"id_slot": slot, "n_erased": (await front.pool.erase_slot(model, slot)).n_tokens}


def _slot_json(slot: SlotState) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": slot.id,
        "n_ctx": slot.n_ctx,
        "speculative": False,
        "is_processing": slot.busy,
        "n_prompt_tokens": slot.n_tokens,
    }
    if slot.request is None:
        return entry
    sampling = {name: value for name, value in msgspec.structs.asdict(slot.sampling).items() if name not in _HIDDEN}
    return {
        **entry,
        "id_task": slot.request,
        "n_prompt_tokens_processed": slot.n_processed,
        "n_prompt_tokens_cache": slot.n_cached,
        "params": {
            **sampling,
            "n_predict": slot.max_tokens,
            "max_tokens": slot.max_tokens,
            "n_keep": slot.n_keep,
            "n_discard": slot.n_discard,
            "ignore_eos": slot.ignore_eos,
        },
        "next_token": [
            {
                "has_next_token": slot.busy,
                "has_new_line": slot.new_line,
                "n_remain": slot.n_remaining,
                "n_decoded": slot.n_decoded,
            }
        ],
    }
