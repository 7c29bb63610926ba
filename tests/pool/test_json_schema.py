"""The check in front of the schemas' converter: what is supported, and where something is not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.json_schema import KEYWORDS, SchemaError, check_schema

_deep: Any = {}
for _ in range(70):
    _deep = {"items": _deep}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": "x",
            "title": "t",
            "default": 1,
            "examples": [],
        },
        {"$defs": {"a/b~c": {"type": "string"}}, "$ref": "#/$defs/a~1b~0c"},
        {"properties": {"next": {"$ref": "#"}, "uniqueItems": {"type": "boolean"}}},
        {"prefixItems": [{"type": "integer"}, True], "items": {"$ref": "#/prefixItems/0"}},
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]},
    ],
)
def test_supported_schemas_pass(schema: Any) -> None:
    assert check_schema(schema)


REFUSED: list[tuple[Any, str]] = [
    ({"uniqueItems": True}, "#/uniqueItems: this keyword is not supported"),
    ({"properties": {"a/b": {"not": {}}}}, "#/properties/a~1b/not: this keyword is not supported"),
    ({"anyOf": [{}, {"if": {}}]}, "#/anyOf/1/if: this keyword is not supported"),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance: this keyword is not supported"),
    ({"properties": {"a": {"$id": "y"}}}, "#/properties/a/$id: is supported at the root only"),
    ({"$ref": "https://example.com/x"}, "#/$ref: 'https://example.com/x' does not begin with '#/'"),
    ({"$ref": "#/$defs/x"}, "#/$ref: '#/$defs/x' names nothing in this schema"),
    ({"$ref": "#/title", "title": "t"}, "#/title: must be an object or a boolean"),
    ({"$ref": 1}, "#/$ref: must be a text"),
    ({"$ref": "#"}, "#: refers to itself"),
    ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "refers to itself"),
    ({"type": "text"}, "#/type: must be one of array"),
    ({"type": []}, "#/type: must be one of array"),
    ({"type": [1]}, "#/type: must be a text or a list of texts"),
    ({"enum": []}, "#/enum: must be a non-empty list"),
    ({"items": [{}]}, "#/items: must be one schema; a list of them is called prefixItems"),
    ({"items": 1}, "#/items: must be an object or a boolean"),
    ({"properties": []}, "#/properties: must be an object of schemas"),
    ({"anyOf": []}, "#/anyOf: must be a non-empty list of schemas"),
    ({"minLength": -1}, "#/minLength: must be an integer from 0 to 10000"),
    ({"maxItems": 1.5}, "#/maxItems: must be an integer from 0 to 10000"),
    ({"maxItems": 10**9}, "#/maxItems: must be an integer from 0 to 10000"),
    ({"minimum": "1"}, "#/minimum: must be a number"),
    ({"minimum": 1e300}, "#/minimum: must be a number"),
    ({"pattern": 1}, "#/pattern: must be a text"),
    ({"format": "phone"}, "#/format: is not supported; the formats are date, date-time"),
    ({"required": "a"}, "#/required: must be a list of texts"),
    ("text", "it must be an object"),
    (True, "it must be an object"),
    ({"items": "x"}, "#/items: must be an object or a boolean"),
    (float("nan"), "it cannot be written as JSON"),
    ({"title": object()}, "it cannot be written as JSON"),
    ({"title": "x" * 300_000}, "at most 262144 are allowed"),
    ({"enum": [], "anyOf": [{}] * 10_001}, "#/enum"),
    ({"anyOf": [{}] * 10_001}, "more than 10000 schemas within"),
    ({"allOf": [{"pattern": f"{n}"} for n in range(9)]}, "more than 8 different patterns, and combines schemas"),
    (_deep, "nested more than 64 deep"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_supported_is_named_with_its_place(schema: Any, reason: str) -> None:
    with pytest.raises(SchemaError) as caught:
        check_schema(schema)
    assert reason in str(caught.value)


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just("#"), st.just("object")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(sorted(KEYWORDS)), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(_JSON)
def test_any_json_passes_or_is_refused(value: Any) -> None:
    try:
        assert check_schema(value)
    except SchemaError as error:
        assert str(error)
