"""The LoRA adapters of a model, as callers see them: what they say of themselves, and how strongly they are applied."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from llamaherd.pool.config import MOST_SCALE
from llamaherd.pool.errors import BadRequest
from llamaherd.pool.gguf_header import GGUFError, Header, read_header

__all__ = ["AdapterStatus", "check_lora", "describe", "scales_of"]

_INT32_MAX: Final = 2**31 - 1
_MOST_TEXT: Final = 1024


class AdapterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One LoRA adapter of a model.

    Attributes:
        id: Its place among the model's adapters; what requests call it by.
        path: Its GGUF file.
        scale: The factor that it is applied with where a request names none; 0 is off.
        task_name: What its file says that it is for; empty where it does not, or cannot be read.
        prompt_prefix: What its file wants prompts to begin with; the pool makes nothing of it.
    """

    id: int
    path: str
    scale: float
    task_name: str = ""
    prompt_prefix: str = ""


def describe(paths: Sequence[str], scales: Sequence[float]) -> list[AdapterStatus]:
    """Return the adapters of these files. Reads their headers, which takes a moment."""
    return [
        AdapterStatus(id=index, path=path, scale=scale, **_texts(Path(path)))
        for index, (path, scale) in enumerate(zip(paths, scales, strict=True))
    ]


def _texts(path: Path) -> dict[str, str]:
    try:
        header = read_header(path)
    except GGUFError:
        return {}  # its load will fail, and say why
    return {name: _text(header, f"adapter.lora.{name}") for name in ("task_name", "prompt_prefix")}


def _text(header: Header, key: str) -> str:
    value = header.keys.get(key, "")
    return value[:_MOST_TEXT] if isinstance(value, str) else ""


def check_lora(value: object, name: str = "lora") -> tuple[tuple[int, float], ...]:
    """Return a list of objects with ``id`` and ``scale`` as pairs, the last of equal ids; or raise BadRequest.

    Whether the model has such adapters is for others to check.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise BadRequest(f"{name} must be a list of objects with id and scale")
    scales: dict[int, float] = {}
    for entry in cast("Sequence[object]", value):
        if not isinstance(entry, Mapping):
            raise BadRequest(f"{name} must be a list of objects with id and scale")
        fields = cast("Mapping[str, Any]", entry)
        adapter, scale = fields.get("id"), fields.get("scale")
        if type(adapter) is not int or not 0 <= adapter <= _INT32_MAX:
            raise BadRequest(f"{name}: an adapter's id must be an integer, 0 or more")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not -MOST_SCALE <= scale <= MOST_SCALE:
            raise BadRequest(f"{name}: a scale must be a number from {-MOST_SCALE:g} to {MOST_SCALE:g}")
        scales[adapter] = float(scale)
    return tuple(scales.items())


def scales_of(lora: Sequence[tuple[int, float]], count: int) -> tuple[float, ...]:
    """Return a scale for each of a model's ``count`` adapters; 0 for those that ``lora`` does not name.

    Raises:
        BadRequest: it names one that there is not.
    """
    unknown = [adapter for adapter, _ in lora if adapter >= count]
    if unknown:
        raise BadRequest(f"lora: there is no adapter {unknown[0]}, the model has {count}", code="invalid_lora")
    named = dict(lora)
    return tuple(named.get(adapter, 0.0) for adapter in range(count))
