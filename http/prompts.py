"""The shapes in which llama-server takes prompts: one or several, each a text, token ids, both mixed, or an object."""

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from llamaherd.http.problems import INVALID_REQUEST, Problem

__all__ = ["Prompt", "prompts_of"]

#: A text, or token ids with texts between them.
Prompt: TypeAlias = str | list[int | str]


def prompts_of(value: object, name: str) -> list[Prompt]:
    """Return the prompts of a field. A list with a number in it is one prompt, any other list is several.

    Raises:
        Problem: it has none of the shapes, or is an empty list.
    """
    several = _several(value)
    prompts = [_prompt(value, name)] if several is None else [_prompt(one, name) for one in several]
    if not prompts:
        raise Problem(INVALID_REQUEST, f'"{name}" must not be empty', param=name)
    return prompts


def _prompt(value: object, name: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = cast("list[object]", value)
        if all(_is_number(part) or isinstance(part, str) for part in parts):
            return cast("list[int | str]", parts)
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        if "content" in fields:
            return _text_of_parts(fields["content"], name)
        if "prompt_string" in fields:
            if fields.get("multimodal_data"):
                raise Problem(INVALID_REQUEST, f"{name}: this takes texts only, no multimodal_data", param=name)
            return _prompt(fields["prompt_string"], name)
    raise Problem(
        INVALID_REQUEST,
        f'"{name}" elements must be a text, a list of tokens, a list of tokens and texts, or an object with a '
        "prompt_string",
        param=name,
    )


def _text_of_parts(content: object, name: str) -> str:
    """Return the text of OpenAI's list of content parts."""
    texts: list[str] = []
    for part in cast("Sequence[object]", content if isinstance(content, list) else [None]):
        fields = cast("dict[str, Any]", part if isinstance(part, dict) else {})
        text = fields.get("text")
        if fields.get("type") != "text" or not isinstance(text, str):
            raise Problem(INVALID_REQUEST, f'"{name}" content must be a list of parts of type text', param=name)
        texts.append(text)
    return "".join(texts)


def _several(value: object) -> list[object] | None:
    """Return the entries of a list of prompts; None for anything else."""
    if not isinstance(value, list):
        return None
    entries = cast("list[object]", value)
    return None if any(map(_is_number, entries)) else entries


def _is_number(value: object) -> bool:
    return type(value) is int
