"""``POST /infill``: llama-server's way to fill the gap between two texts, for editors."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.choices import start_all
from llamaherd.http.delivery import respond
from llamaherd.http.front import Front
from llamaherd.http.native import NativeAnswer
from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.schema import InfillBody, parse
from llamaherd.pool import Generation

__all__ = ["infill"]

#: What llama-server calls a file without a name.
_NAMELESS = "tmp"


async def infill(front: Front, request: Request) -> Response:
    """Fill a gap."""
    body = parse(await front.read(request), InfillBody)
    for name in ("input_prefix", "input_suffix"):
        if getattr(body, name) is None:
            raise Problem(INVALID_REQUEST, f'"{name}" is required', param=name)
    if not (body.prompt is None or isinstance(body.prompt, str)):
        raise Problem(INVALID_REQUEST, '"prompt" must be a string', param="prompt")
    model, prompt = front.model_of(body), body.prompt or ""
    admission = front.admit(request, body, model)
    files = [_file(entry) for entry in body.input_extra or ()]

    def begin(index: int) -> Generation:
        return front.pool.infill(
            model,
            body.input_prefix or "",
            body.input_suffix or "",
            prompt=prompt,
            extra=files,
            **admission,
            **body.to_params(index),
        )

    works = start_all(body.choices, begin)
    answer = NativeAnswer(works[0].model, body, lambda: front.defaults_of(works[0].model))
    return await respond(front, request, body, works, answer)


def _file(entry: dict[str, Any]) -> tuple[str, str]:
    name, text = entry.get("filename", _NAMELESS), entry.get("text")
    if not isinstance(text, str):
        raise Problem(
            INVALID_REQUEST,
            'extra_context chunk must contain a "text" field with a string value',
            param="input_extra",
        )
    if not isinstance(name, str):
        raise Problem(INVALID_REQUEST, 'extra_context chunk\'s "filename" field must be a string', param="input_extra")
    return name, text
