"""Tool calls that models write in forms of their own, told as the JSON that clients expect.

Three forms: ``<parameter=key>`` tags (Qwen3-Coder and its heirs), ``<arg_key>`` tags (GLM), and Gemma's objects with
bare keys. A value in a tag is text by itself; the tool's schema says where it is something else.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from llamaherd.pool.child.calls import NAME, Calls, read_arguments
from llamaherd.pool.child.scan import Reading, Scan, overlap

__all__ = ["Kinds", "kinds_of", "listed_texts", "read_bare", "read_function", "read_keyed"]

#: For each function, the parameters that are texts and those that are not; what is missing is not known.
Kinds = Mapping[str, Mapping[str, bool]]

_KEY_END: Final = re.compile(r"[^:,{}\[\]\s]")
_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS: Final = frozenset({"true", "false", "null"})
_BARE: Final = re.compile(r"[^,{}\[\]]")
_MOST_DEPTH: Final = 32


def kinds_of(tools: tuple[dict[str, Any], ...]) -> Kinds:
    """Return which parameters of the tools are texts."""
    kinds: dict[str, dict[str, bool]] = {}
    for tool in tools:
        function = cast("dict[str, Any]", tool["function"])
        parameters = function.get("parameters")
        properties = cast("dict[str, Any]", parameters).get("properties") if isinstance(parameters, dict) else None
        found = kinds.setdefault(cast(str, function["name"]), {})
        if isinstance(properties, dict):
            for name, schema in cast("dict[str, Any]", properties).items():
                fields = cast("dict[str, Any]", schema) if isinstance(schema, dict) else {}
                if fields.get("type") is not None:
                    found[name] = fields["type"] == "string"
                elif listed_texts(fields):
                    found[name] = True
    return kinds


def listed_texts(schema: Mapping[str, Any]) -> list[str]:
    """Return the only texts that a value may be; none if it may be another one, an empty one, or no text."""
    listed: object = [schema["const"]] if "const" in schema else schema.get("enum")
    if schema.get("type", "string") != "string" or not isinstance(listed, list):
        return []
    values = cast("list[object]", listed)
    texts = [value for value in values if isinstance(value, str) and value]
    return texts if len(texts) == len(values) else []


def _told(text: str, is_text: bool | None) -> str:
    """Return a value in a tag as JSON: a text, unless it may be something else and reads as that."""
    if is_text is not True:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            if is_text is False or not isinstance(value, str):
                return text.strip()
    return json.dumps(text, ensure_ascii=False)


def read_function(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    """Read ``<function=name>`` with ``<parameter=key>`` tags or one JSON object inside, and its end tag."""
    if not (yield from scan.literal("<function=")):
        return
    name = yield from scan.word(NAME)
    if not calls.knows(name) or not (yield from scan.literal(">")):
        return
    yield from scan.blank()
    if (yield from scan.peek()) == "{":
        calls.begin(name)
        scan.settle()
        if not (yield from read_arguments(scan, calls)):
            return
    elif not (yield from _tags(scan, calls, name, kinds.get(name, {}), _PARAMETERS)):
        return
    yield from scan.blank()
    if (yield from scan.literal("</function>")) or scan.torn("</function>"):
        scan.settle()
    calls.end()


def read_keyed(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    """Read ``name`` and its ``<arg_key>`` and ``<arg_value>`` tags; the end tag of the call must follow."""
    name = yield from scan.word(NAME)
    # A name that the text ends with may have been the beginning of another.
    if not calls.knows(name) or not (yield from scan.has()):
        return
    yield from scan.blank()
    if (yield from _tags(scan, calls, name, kinds.get(name, {}), _KEYED)):
        calls.end()


class _Form(NamedTuple):
    """How a family writes one argument.

    Attributes:
        key: What is before its key.
        key_end: What is behind that.
        value: What comes next, before the value; empty for nothing.
        value_end: What is behind the value.
        lines: Whether the value stands on lines of its own.
        end: What comes behind the last argument.
    """

    key: str
    key_end: str
    value: str
    value_end: str
    lines: bool
    end: str


_PARAMETERS: Final = _Form("<parameter=", ">", "", "</parameter>", True, "</function>")
_KEYED: Final = _Form("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", False, "</tool_call>")


def _tags(scan: Scan, calls: Calls, name: str, kinds: Mapping[str, bool], form: _Form) -> Reading[bool]:
    """Read tags up to the form's end, which stays unread; whether the call is whole.

    It has begun with the head of its first tag, with the end, or where the text ends before either: what was said of a
    call that is cut off is told as a call, as in llama-server, and what ends within a mark has none of it.
    """
    count = 0
    while True:
        yield from scan.blank()
        if (yield from _comes(scan, form.end)):
            break
        key = None if scan.torn(form.end) else (yield from _head(scan, form))
        if key is None:
            broken = scan.ended and not scan.rest
            if broken and not count:
                calls.begin(name)
                calls.add("{")
            if broken:
                scan.settle()
            elif count:
                calls.add("}")
            return bool(count) and not broken
        if not count:
            calls.begin(name)
        calls.add(("{" if not count else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        scan.settle()
        if not (yield from _value(scan, calls, kinds.get(key), form)):
            return False
        count += 1
    if not count:
        calls.begin(name)
    calls.add("}" if count else "{}")
    scan.settle()
    return True


def _comes(scan: Scan, text: str) -> Reading[bool]:
    """Whether ``text`` comes next; it stays unread."""
    comes = yield from scan.literal(text)
    if comes:
        scan.skip(-len(text))
    return comes


def _head(scan: Scan, form: _Form) -> Reading[str | None]:
    """Read an argument up to its value and return its key; None if there is none, or if the text ends within."""
    if not (yield from scan.literal(form.key)):
        scan.torn(form.key)
        return None
    key = yield from scan.until(form.key_end)
    if key is None:
        return None
    if form.value:
        yield from scan.blank()
        if not (yield from scan.literal(form.value)):
            scan.torn(form.value)
            return None
    return key.strip()


def _value(scan: Scan, calls: Calls, is_text: bool | None, form: _Form) -> Reading[bool]:
    """Read a value and its end; whether there is one. A text is told as it comes, anything else when it is whole."""
    if is_text is not True:
        value = yield from scan.until(form.value_end)
        if value is not None:
            if form.lines:
                value = value.removeprefix("\n").removesuffix("\n")
            calls.add(_told(value, is_text))
            scan.settle()
        elif scan.ended:
            begun = scan.tried[: len(scan.tried) - overlap(scan.tried, form.value_end, 0)].strip()
            if is_text is False and begun.startswith(("[", "{")):
                calls.add(begun)
            scan.settle()
        return value is not None
    calls.add('"')
    if form.lines:
        yield from scan.literal("\n")
    scan.settle()
    held = ""

    def tell(text: str) -> None:
        nonlocal held
        text = held + text
        held = "\n" if form.lines and text.endswith("\n") else ""
        calls.add(json.dumps(text.removesuffix(held), ensure_ascii=False)[1:-1])

    ends = yield from scan.until(form.value_end, tell, torn=True)
    if ends is not None:
        calls.add('"')
        scan.settle()
    return ends is not None


# --- Gemma ------------------------------------------------------------------------------------------------------------


def read_bare(scan: Scan, calls: Calls, quote: str) -> Reading[None]:
    """Read ``call:name{key:value,...}``, where texts stand between two ``quote``."""
    if not (yield from scan.literal("call:")):
        return
    name = yield from scan.word(NAME)
    if not calls.knows(name) or (yield from scan.peek()) != "{":
        return
    calls.begin(name)
    scan.settle()
    if (yield from _bare_value(scan, calls, quote, 0)):
        calls.end()


def _bare_value(scan: Scan, calls: Calls, quote: str, depth: int) -> Reading[bool]:
    yield from scan.blank()
    first = yield from scan.peek()
    if not first or depth > _MOST_DEPTH:
        return False
    if first in "{[":
        return (yield from _bare_items(scan, calls, quote, depth))
    if (yield from scan.literal(quote)):
        return (yield from _bare_text(scan, calls, quote))
    if first == '"':
        return (yield from scan.value(calls.add))
    word = (yield from scan.word(_BARE)).strip()
    whole = bool(scan.rest)
    if word in _WORDS or _NUMBER.fullmatch(word):
        calls.add(word)
    elif whole:  # or it is the beginning of something, nobody knows of what
        calls.add(json.dumps(word, ensure_ascii=False))
    scan.settle()
    return whole


def _bare_text(scan: Scan, calls: Calls, quote: str) -> Reading[bool]:
    calls.add('"')
    scan.settle()
    ends = yield from scan.until(quote, lambda text: calls.add(json.dumps(text, ensure_ascii=False)[1:-1]), torn=True)
    if ends is not None:
        calls.add('"')
    return ends is not None


def _bare_items(scan: Scan, calls: Calls, quote: str, depth: int) -> Reading[bool]:
    opening = yield from scan.peek()
    closing = "}" if opening == "{" else "]"
    scan.skip(1)
    calls.add(opening)
    scan.settle()
    first = True
    while True:
        yield from scan.blank()
        if (yield from scan.literal(closing)):
            calls.add(closing)
            scan.settle()
            return True
        if not first:
            if not (yield from scan.literal(",")):
                return False
            calls.add(", ")
            yield from scan.blank()
        first = False
        if opening == "{" and not (yield from _bare_key(scan, calls, quote)):
            return False
        scan.settle()
        if not (yield from _bare_value(scan, calls, quote, depth + 1)):
            return False


def _bare_key(scan: Scan, calls: Calls, quote: str) -> Reading[bool]:
    quoted = yield from scan.literal(quote)
    if quoted:
        key = yield from scan.until(quote)
    elif (yield from scan.peek()) == '"':
        key = yield from scan.string()
    else:
        key = yield from scan.word(_KEY_END)
    yield from scan.blank()
    if not key or not (yield from scan.literal(":")):
        return False
    calls.add(json.dumps(key, ensure_ascii=False) + ": ")
    scan.settle()
    return True
