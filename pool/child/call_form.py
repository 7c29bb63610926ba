"""How an answer begins that is calls, where it must be either calls or JSON of a schema.

Both may be objects. An object is a call if it begins as the calls' grammar writes one: a known function's name and then
its arguments. That is decided within some characters, so that JSON is told as it comes.
"""

import json
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from llamaherd.pool.child.dialect import Dialect
from llamaherd.pool.child.thinking import Tags

__all__ = ["Alike", "Form", "begins_as", "forms_of"]

#: One text of each tuple after the other, with white space between them or not.
Form: TypeAlias = tuple[tuple[str, ...], ...]

_ARGUMENTS: Final = {"llama": "parameters", "generic": "arguments"}


class Alike(NamedTuple):
    """What tells calls from JSON where both are objects.

    Attributes:
        calls: The grammar of calls alone, with the reasoning before them.
        forms: How they begin.
        tags: Of the reasoning; ``opened``: the prompt has opened it.
    """

    calls: str
    forms: tuple[Form, ...]
    tags: Tags | None
    opened: bool


def forms_of(dialect: Dialect, names: Sequence[str]) -> tuple[Form, ...]:
    """Return the ways in which calls of these functions may begin."""
    marks: tuple[Form, ...] = tuple(((text,),) for text in (*dict(dialect.marks), *dialect.noise))
    if not dialect.bare:
        return marks
    quoted = tuple(json.dumps(name, ensure_ascii=False) for name in names)
    arguments = f'"{_ARGUMENTS[dialect.name]}"'
    call: Form = (("{",), ('"name"',), (":",), quoted, (",",), (arguments,), (":",))
    if dialect.name == "llama":
        return (*marks, call)
    wrapped: list[Form] = [
        (("{",), ('"tool_call"',), (":",), *call),
        (("{",), ('"tool_calls"',), (":",), ("[",), *call),
    ]
    return (*marks, *wrapped)


def begins_as(text: str, forms: Sequence[Form]) -> bool | None:
    """Whether a text begins in one of these forms; None if the next characters will tell."""
    found = [_begins(text, form) for form in forms]
    return True if True in found else None if None in found else False


def _begins(text: str, form: Form) -> bool | None:
    at = 0
    for step in form:
        while at < len(text) and text[at].isspace():
            at += 1
        whole = next((wanted for wanted in step if text.startswith(wanted, at)), None)
        if whole is None:
            rest = text[at:]
            return None if any(wanted.startswith(rest) for wanted in step) else False
        at += len(whole)
    return True
