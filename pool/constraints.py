"""What callers say to restrict an answer's form, checked before a worker sees it."""

from collections.abc import Mapping
from typing import Final, cast

from llamaherd.pool.errors import BadRequest
from llamaherd.pool.gbnf import MAX_SOURCE, GrammarError, parse
from llamaherd.pool.json_schema import ANY_OBJECT, SchemaError, check_schema

__all__ = ["check_constraint"]

#: Longest source that is read here too, for an early answer: some milliseconds. The worker reads all in any case.
_MOST_READ: Final = 4096


def check_constraint(grammar: object, json_schema: object, response_format: object) -> tuple[str, str]:
    """Return a GBNF source and a JSON schema as text, at most one of which is not empty.

    Raises:
        BadRequest: one of them is wrong, or more than one is given.
    """
    source = _checked_grammar(grammar)
    schema: object = json_schema
    if response_format is not None:
        demanded = _schema_of(response_format)
        if demanded is not None and json_schema is not None:
            raise BadRequest("json_schema and response_format cannot both be given", code="invalid_json_schema")
        schema = demanded if demanded is not None else schema
    if schema is None:
        return source, ""
    if source:
        raise BadRequest("grammar and a JSON schema cannot both be given", code="invalid_grammar")
    try:
        return "", check_schema(schema)
    except SchemaError as error:
        raise BadRequest(f"json_schema: {error}", code="invalid_json_schema") from None


def _schema_of(response_format: object) -> object:
    """Return the schema that OpenAI's ``response_format`` demands, None for text."""
    if not isinstance(response_format, Mapping):
        raise BadRequest("response_format must be an object")
    wanted = cast("Mapping[str, object]", response_format)
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        # llama-server's own extension.
        return wanted.get("schema") or dict(ANY_OBJECT)
    if kind != "json_schema":
        raise BadRequest("response_format: type must be text, json_object or json_schema")
    inner = wanted.get("json_schema")
    holder = cast("Mapping[str, object]", inner) if isinstance(inner, Mapping) else wanted
    if holder.get("schema") is None:
        raise BadRequest("response_format: json_schema.schema is missing")
    return holder["schema"]


def _checked_grammar(grammar: object) -> str:
    if grammar is None:
        return ""
    if not isinstance(grammar, str):
        raise BadRequest("grammar must be a text", code="invalid_grammar")
    if len(grammar) > MAX_SOURCE:
        raise BadRequest(f"grammar has {len(grammar)} characters, and at most {MAX_SOURCE} are allowed")
    if grammar and len(grammar) <= _MOST_READ:
        try:
            parse(grammar)
        except GrammarError as error:
            raise BadRequest(f"grammar: {error}", code="invalid_grammar") from None
    return grammar
