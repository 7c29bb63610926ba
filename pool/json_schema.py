"""JSON Schemas that answers can be held to: what is supported, and what is refused with the place where it stands.

The worker's converter (llguidance) reads the schema itself; this check stands in front of it. It knows every keyword
that the converter gets right, as the tests prove, so that a schema is never followed in part without a word. It
resolves references within the schema and fetches nothing.

Pure; used by the manager, to refuse early, and by the worker, for tools.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, cast

__all__ = ["ANY_OBJECT", "FORMATS", "KEYWORDS", "SchemaError", "check_schema"]

#: The schema that every JSON object fits.
ANY_OBJECT: Final[Mapping[str, Any]] = MappingProxyType({"type": "object"})

_MAX_BYTES: Final = 256 * 1024
_MAX_NODES: Final = 10_000
_MAX_DEPTH: Final = 64
_MAX_PATTERN: Final = 2000
#: Most characters or elements that a schema may count to.
_MAX_COUNT: Final = 10_000

_TYPES: Final = ("array", "boolean", "integer", "null", "number", "object", "string")
#: The formats that are enforced.
FORMATS: Final = frozenset({"date", "date-time", "email", "hostname", "ipv4", "ipv6", "time", "uuid"})

#: Say nothing about what is valid.
_ANNOTATIONS: Final = frozenset(
    {"$comment", "$schema", "default", "deprecated", "description", "examples", "readOnly", "title", "writeOnly"}
)


class SchemaError(ValueError):
    """A schema cannot be used; the text says where and why."""


_Path = tuple[str | int, ...]
_Children = Iterator[tuple[tuple[str | int, ...], object]]


def _alone(value: object) -> _Children:
    yield (), value


def _by_name(value: object) -> _Children:
    if not isinstance(value, dict):
        raise SchemaError("must be an object of schemas")
    for name, schema in cast("dict[str, object]", value).items():
        yield (name,), schema


def _listed(value: object) -> _Children:
    if not isinstance(value, list) or not value:
        raise SchemaError("must be a non-empty list of schemas")
    for index, schema in enumerate(cast("list[object]", value)):
        yield (index,), schema


def _items(value: object) -> _Children:
    if isinstance(value, list):
        raise SchemaError("must be one schema; a list of them is called prefixItems")
    yield (), value


def _type(value: object) -> None:
    names = cast("list[object]", value) if isinstance(value, list) else [value]
    if not names or not all(name in _TYPES for name in names if isinstance(name, str)):
        raise SchemaError(f"must be one of {', '.join(_TYPES)}, or a list of them")
    if not all(isinstance(name, str) for name in names):
        raise SchemaError("must be a text or a list of texts")


def _enum(value: object) -> None:
    if not isinstance(value, list) or not value:
        raise SchemaError("must be a non-empty list")


def _count(value: object) -> None:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise SchemaError(f"must be an integer from 0 to {_MAX_COUNT}")


def _number(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise SchemaError("must be a number between -1e15 and 1e15")


def _pattern(value: object) -> None:
    if not isinstance(value, str) or len(value) > _MAX_PATTERN:
        raise SchemaError(f"must be a text of at most {_MAX_PATTERN} characters")


def _format(value: object) -> None:
    if value not in FORMATS:
        raise SchemaError(f"is not supported; the formats are {', '.join(sorted(FORMATS))}")


def _required(value: object) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in cast("list[object]", value)):
        raise SchemaError("must be a list of texts")


def _anything(_value: object) -> None:
    pass


#: Keywords that hold schemas, and how.
_HOLDERS: Final[dict[str, Callable[[object], _Children]]] = {
    "$defs": _by_name,
    "definitions": _by_name,
    "properties": _by_name,
    "additionalProperties": _alone,
    "items": _items,
    "prefixItems": _listed,
    "anyOf": _listed,
    "oneOf": _listed,
    "allOf": _listed,
}
_CHECKS: Final[dict[str, Callable[[object], None]]] = {
    "type": _type,
    "enum": _enum,
    "const": _anything,
    "minLength": _count,
    "maxLength": _count,
    "pattern": _pattern,
    "format": _format,
    "minimum": _number,
    "maximum": _number,
    "exclusiveMinimum": _number,
    "exclusiveMaximum": _number,
    "minItems": _count,
    "maxItems": _count,
    "required": _required,
    "$ref": _anything,
    "$id": _anything,
}
#: Everything that a schema may say beside its annotations.
KEYWORDS: Final = frozenset(_HOLDERS) | frozenset(_CHECKS)
#: Most different patterns where schemas are combined: the converter would intersect them, and need minutes for many.
_MAX_COMBINED: Final = 8
_SHAPES: Final = frozenset({"pattern", "properties", "additionalProperties", "items", "prefixItems"})

#: What the same text has to fit too.
_SAME_PLACE: Final = ("anyOf", "oneOf", "allOf")


def check_schema(schema: object) -> str:
    """Return a schema as JSON text.

    Raises:
        SchemaError: a keyword is not supported or wrong, with its path; too large, too deep; or a reference leads
            nowhere or round in a circle.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"it cannot be written as JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise SchemaError("it must be an object")
    if len(text) > _MAX_BYTES:
        raise SchemaError(f"it has {len(text)} bytes, and at most {_MAX_BYTES} are allowed")
    _Walk(json.loads(text)).run()
    return text


class _Walk:
    """Looks at every schema within a schema once, and at what references name."""

    def __init__(self, root: object) -> None:
        self._root: Final = root
        #: By path: the schemas that have to fit the same text.
        self._same: Final[dict[_Path, list[_Path]]] = {}
        self._todo: Final[list[tuple[_Path, object]]] = [((), root)]
        self._patterns: Final[set[str]] = set()
        self._combines = False

    def run(self) -> None:
        while self._todo:
            path, schema = self._todo.pop()
            if path in self._same:
                continue
            self._same[path] = []
            if len(self._same) > _MAX_NODES:
                raise SchemaError(f"it has more than {_MAX_NODES} schemas within")
            if len(path) > _MAX_DEPTH:
                raise SchemaError(f"{_shown(path[:8])}...: nested more than {_MAX_DEPTH} deep")
            if isinstance(schema, dict):
                self._note(cast("dict[str, object]", schema))
                for name, value in cast("dict[str, object]", schema).items():
                    try:
                        self._keyword(path, name, value)
                    except SchemaError as error:
                        raise SchemaError(f"{_shown((*path, name))}: {error}") from None
            elif not isinstance(schema, bool):
                raise SchemaError(f"{_shown(path)}: must be an object or a boolean")
        if self._combines and len(self._patterns) > _MAX_COMBINED:
            raise SchemaError(f"it has more than {_MAX_COMBINED} different patterns, and combines schemas")
        self._refuse_circles()

    def _note(self, schema: dict[str, object]) -> None:
        every = schema.get("allOf")
        parts = len(cast("list[object]", every)) if isinstance(every, list) else 0
        parts += sum(name in schema for name in ("$ref", "anyOf", "oneOf")) + (not _SHAPES.isdisjoint(schema))
        self._combines |= parts > 1
        if isinstance(pattern := schema.get("pattern"), str):
            self._patterns.add(pattern)

    def _keyword(self, path: _Path, name: str, value: object) -> None:
        if name in _HOLDERS:
            for step, schema in _HOLDERS[name](value):
                below = (*path, name, *step)
                self._todo.append((below, schema))
                if name in _SAME_PLACE:
                    self._same[path].append(below)
        elif name == "$ref":
            target, schema = self._resolve(value)
            self._todo.append((target, schema))
            self._same[path].append(target)
        elif name == "$id":
            if path:
                raise SchemaError("is supported at the root only")
        elif name in _CHECKS:
            _CHECKS[name](value)
        elif name not in _ANNOTATIONS:
            raise SchemaError("this keyword is not supported")

    def _resolve(self, reference: object) -> tuple[_Path, object]:
        if not isinstance(reference, str):
            raise SchemaError("must be a text")
        if reference != "#" and not reference.startswith("#/"):
            raise SchemaError(f"{reference[:100]!r} does not begin with '#/': only this schema itself is looked at")
        place = self._root
        path: _Path = ()
        steps = reference[2:].split("/") if reference != "#" else []
        for step in steps:
            if "%" in step:
                raise SchemaError(f"{reference[:100]!r} has escapes that are not supported")
            step = step.replace("~1", "/").replace("~0", "~")
            key: str | int = step
            if isinstance(place, list) and step.isdecimal() and len(step) < 6:
                key = int(step)
            try:
                place = cast(Any, place)[key]
            except (KeyError, IndexError, TypeError):
                raise SchemaError(f"{reference[:100]!r} names nothing in this schema") from None
            path = (*path, key)
        return path, place

    def _refuse_circles(self) -> None:
        """Refuse a schema that refers to itself with no object or array between: nothing could ever fit it."""
        state: dict[_Path, bool] = {}
        for start in self._same:
            work = [(start, iter(self._same[start]))] if start not in state else []
            state.setdefault(start, False)
            while work:
                path, following = work[-1]
                target = next(following, None)
                if target is None:
                    state[path] = True
                    work.pop()
                elif target not in state:
                    state[target] = False
                    work.append((target, iter(self._same[target])))
                elif not state[target]:
                    raise SchemaError(f"{_shown(target)}: refers to itself without an object or array between")


def _shown(path: _Path) -> str:
    """Return a path as a JSON pointer."""
    return "#" + "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
