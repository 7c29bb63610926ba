"""What a schema allows is valid JSON of that schema, and what is valid is allowed: held to the jsonschema package."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_driver import GREEDY, ask, loaded, smollm2_path
from llamaherd.pool.child import llama_backend, llama_model
from llamaherd.pool.child.constraint import ConstraintError
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.grammars import Grammars
from llamaherd.pool.child.json_grammar import JsonConstraint, JsonGrammars
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.tool_grammar import ToolGrammar
from llamaherd.pool.child.vocab import Vocab
from llamaherd.pool.json_schema import FORMATS, SchemaError, check_schema
from llamaherd.transport.messages import Generate, GrammarTrigger, Sampling
from tiny_gguf import tiny_model


class Schemas:
    """Follows schemas on a vocabulary, without a model's weights."""

    def __init__(self) -> None:
        llama_backend.init_backend()
        path = str(tiny_model("random")).encode()
        model = llama_model.load(path, n_gpu_layers=0, use_mmap=True, progress=lambda _: True)
        assert model is not None
        self.handle = model
        self.vocab = Vocab(model)
        self._grammars = JsonGrammars(self.vocab)

    def constraint(self, schema: Any) -> JsonConstraint:
        return self._grammars.make(check_schema(schema))

    def takes(self, schema: Any, text: str) -> bool:
        constraint = self.constraint(schema)
        for token in self.vocab.tokenize(text, add_special=False):
            if not constraint.allows(token):
                return False
            constraint.accept(token)
        return constraint.allows(self.vocab.eos)

    def say(self, schema: Any, random: Random, limit: int = 400) -> str | None:
        """Say something that is allowed, at random and soon; None if it was not to be ended within the limit."""
        constraint, said = self.constraint(schema), b""
        for step in range(limit):
            if constraint.complete or (constraint.allows(self.vocab.eos) and random.random() < 0.5):
                return said.decode()
            tokens = [token for token in constraint.candidates().tolist() if not self.vocab.ends(token)]
            pieces = {token: self.vocab.piece(token) for token in tokens}
            if step > 20:  # whatever closes something
                tokens = [token for token in tokens if pieces[token][:1] in b'"}]1e'] or tokens
            token = random.choice(tokens)
            assert constraint.allows(token)
            constraint.accept(token)
            said += pieces[token]
        return None

    def close(self) -> None:
        llama_model.free(self.handle)


@pytest.fixture(scope="module")
def schemas() -> Iterator[Schemas]:
    opened = Schemas()
    yield opened
    opened.close()


PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 2},
        "friend": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE: Any = {
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    },
    "$ref": "#/$defs/node",
}

#: A schema, texts that fit it, and texts that do not.
CASES: list[tuple[Any, list[str], list[str]]] = [
    (PERSON, ['{"name":"x","age":150}', '{ "name": "é", "age": 0, "tags": ["a","b"], "friend": null}'], ["{}", "[]"]),
    (PERSON, ['{"name":"x","age":1,"friend":{"name":"y","age":2}}'], ['{"name":"x","age":151}', '{"name":"","age":1}']),
    (PERSON, [], ['{"name":"x","age":1,"more":1}', '{"name":"x","age":1,"tags":[]}', '{"name":"x","age":1.5}']),
    (TREE, ["{}", '{"next":{"next":{}}}'], ['{"next":1}', '{"other":{}}']),
    ({"type": "object"}, ["{}", '{"a": [1, {"b": null}]}'], ["1", "[]", "null", ""]),
    ({}, ["1", '"x"', "[]", "{}", "null", "true", "-1.5e3"], ["nul", "01", "'x'", "[1,]"]),
    ({"enum": ["a", 1, None, {"x": [True]}]}, ['"a"', "1", "null", '{"x":[true]}'], ['"b"', "2", "false"]),
    ({"const": {"a": "b"}}, ['{"a":"b"}'], ['{"a":"c"}', "{}"]),
    ({"type": ["string", "null"]}, ['"x"', "null"], ["1"]),
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, ["-3", "0", "11"], ["-4", "12", "1.5"]),
    ({"type": "number", "minimum": 0.5, "maximum": 2}, ["0.5", "2", "1.25"], ["0.4", "2.1", "-1"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"abé"'], ['"a"', '"abcd"', '""']),
    ({"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"}, ['"ab-12"'], ['"ab-"', '"xx-1"', '"ab-1x"']),
    ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"ac"', '""']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-13-01"', '"x"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123"']),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}, ["[true]", "[true,false]"], ["[]"]),
    ({"type": "array", "items": {"type": "boolean"}, "maxItems": 0}, ["[]"], ["[true]"]),
    (
        {"prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False, "type": "array"},
        ["[1,null]"],
        ["[1,2]"],
    ),
    ({"prefixItems": [{"type": "integer"}], "items": False, "minItems": 1, "type": "array"}, ["[1]"], ["[]", "[1,2]"]),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#"}}]}, ["1", "[[1],[]]"], ['"x"', "[null]"]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"x"'], ["null"]),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, ["3", "5"], ["2", "6"]),
    (
        {
            "allOf": [
                {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"type": "object", "required": ["b"]},
            ]
        },
        ['{"a":1,"b":2}'],
        ['{"a":1}', '{"a":"x","b":1}'],
    ),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
        ["{}", '{"a":1,"x":true}', '{"x":false}'],
        ['{"x":1}', '{"a":true}'],
    ),
]


@pytest.mark.parametrize(("schema", "fitting", "unfit"), CASES, ids=range(len(CASES)))
def test_what_fits_is_taken_and_nothing_else(
    schemas: Schemas, schema: Any, fitting: list[str], unfit: list[str]
) -> None:
    for text in fitting:
        jsonschema.validate(json.loads(text), schema)
        assert schemas.takes(schema, text), text
    for text in unfit:
        assert not schemas.takes(schema, text), text


@pytest.mark.parametrize("schema", [case[0] for case in CASES], ids=range(len(CASES)))
def test_whatever_is_said_is_valid(schemas: Schemas, schema: Any) -> None:
    for seed in range(15):
        said = schemas.say(schema, Random(seed))
        if said is not None:
            jsonschema.validate(json.loads(said), schema)


def _number(low: int, more: int) -> Any:
    return {"type": "integer", "minimum": low, "maximum": low + more}


def _text(low: int, more: int) -> Any:
    return {"type": "string", "minLength": low, "maxLength": low + more}


_SIMPLE: list[Any] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "number"},
    {"const": "k"},
    {"enum": [1, "two", None]},
]
_PATTERNS: list[Any] = [{"type": "string", "pattern": p} for p in ("^a+$", "^(x|yz)?[0-9]{1,3}$", "q", "^\\d\\w$")]
_FORMATS: list[Any] = [{"type": "string", "format": name} for name in sorted(FORMATS)]
_LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.builds(_number, st.integers(-99, 99), st.integers(0, 99)),
    st.builds(_text, st.integers(0, 4), st.integers(0, 4)),
    st.sampled_from(_SIMPLE + _PATTERNS + _FORMATS),
)


def _object(properties: dict[str, Any], needed: set[str], more: Any) -> Any:
    required = sorted(needed & set(properties))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


def _array(items: Any, low: int, more: int) -> Any:
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}


def _tuple(first: list[Any], items: Any) -> Any:
    return {"type": "array", "prefixItems": first, "items": items, "minItems": len(first)}


def _any_of(some: list[Any]) -> Any:
    return {"anyOf": some}


def _referring(one: Any) -> Any:
    return {"$defs": {"x": one}, "type": "array", "items": {"$ref": "#/$defs/x"}}


def _all_of(one: Any) -> Any:
    anything: Any = {}
    return {"allOf": [one, anything]}


def _composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "c d"])
    return st.one_of(
        st.builds(_object, st.dictionaries(names, inner, max_size=3), st.sets(names), st.one_of(st.booleans(), inner)),
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(_tuple, st.lists(inner, min_size=1, max_size=2), st.one_of(st.just(False), inner)),
        st.builds(_any_of, st.lists(inner, min_size=1, max_size=3)),
        st.builds(_referring, inner),
        st.builds(_all_of, inner),
    )


@settings(deadline=None)
@given(schema=st.recursive(_LEAVES, _composed, max_leaves=5), seed=st.integers(0, 2**32))
def test_whatever_is_said_of_any_schema_is_valid(schemas: Schemas, schema: Any, seed: int) -> None:
    text = json.dumps(schema)
    if text.count("$ref") and not text.startswith('{"$defs"'):
        return  # references count from the root
    try:
        said = schemas.say(schema, Random(seed))
    except SchemaError:
        return
    except RequestError as error:
        assert "Unsatisfiable" in str(error)
        return
    if said is not None:
        jsonschema.validate(json.loads(said), schema, format_checker=None)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "json_schema: "),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "required property 'a' is unsatisfiable"),
    ],
)
def test_what_the_converter_refuses_has_a_reason(schemas: Schemas, schema: Any, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        schemas.constraint(schema)
    assert caught.value.code == "invalid_json_schema"
    assert reason in str(caught.value)


def _nested(depth: int) -> Any:
    if not depth:
        return {"type": "integer"}
    inner = _nested(depth - 1)
    return {"anyOf": [{"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]}


HOSTILE: list[Any] = [
    {"type": "string", "minLength": 10_000, "maxLength": 10_000},
    {"type": "array", "items": {"type": "string", "minLength": 9_000}, "minItems": 10_000},
    {"type": "string", "pattern": "^(((a{1,1000}){1,1000}){1,1000}){1,1000}$"},
    {"type": "string", "pattern": "^(a|aa|aaa|b?)*(a?){500}$"},
    {"type": "string", "pattern": "^(\\w|\\d|\\s|.)*(.*x.*){200}$"},
    {"enum": [f"value number {n}" for n in range(5000)]},
    {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1500)}},
    {"allOf": [{"properties": {f"p{n}": {"pattern": f"{n}"}}} for n in range(300)], "type": "object"},
    {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(1, 60)]},
    {"anyOf": [{"properties": {"a": {"$ref": "#"}, f"b{n}": {"type": "null"}}, "type": "object"} for n in range(60)]},
    _nested(12),
]


@pytest.mark.parametrize("schema", HOSTILE, ids=range(len(HOSTILE)))
def test_no_schema_takes_long(schemas: Schemas, schema: Any) -> None:
    try:
        constraint = schemas.constraint(schema)
        for step in range(60):
            tokens = constraint.candidates().tolist()
            if not tokens or schemas.vocab.ends(tokens[0]):
                break
            constraint.accept(tokens[step % len(tokens)])
    except (ConstraintError, RequestError, SchemaError) as error:
        assert str(error)


# --- on engines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random() -> Iterator[LlamaEngine]:
    with loaded("random", n_ctx=1024) as engine:
        yield engine


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.2, seed=8), Sampling(top_k=0, min_p=0, seed=8)])
def test_an_engine_follows_a_schema(random: LlamaEngine, sampling: Sampling) -> None:
    age: Any = {"type": "integer", "minimum": 0, "maximum": 150}
    properties: Any = {"name": {"type": "string", "maxLength": 5}, "age": age}
    schema = {"type": "object", "properties": properties, "required": ["name"], "additionalProperties": False}
    got = ask(random, "abc", json_schema=check_schema(schema), sampling=sampling, max_tokens=300)
    assert got.reason == "stop"
    jsonschema.validate(json.loads(got.text), schema)


def test_a_schema_may_wait_for_its_word(random: LlamaEngine) -> None:
    schema = check_schema({"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 3})
    got = ask(
        random,
        "abc",
        json_schema=schema,
        trigger=GrammarTrigger(leading=("[",)),
        sampling=Sampling(logit_bias=(("[", 100.0),), seed=1),
    )
    assert isinstance(json.loads(got.text.strip()), list)


def test_a_grammar_and_a_schema_do_not_go_together(random: LlamaEngine) -> None:
    with pytest.raises(RequestError, match="cannot both be given"):
        ask(random, "abc", grammar='root ::= "x"', json_schema="{}")


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=2)])
def test_a_real_model_follows_a_real_schema(sampling: Sampling) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "address": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 30},
                    "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                },
                "required": ["city", "zip"],
                "additionalProperties": False,
            },
            "hobbies": {"type": "array", "items": {"enum": ["chess", "hiking", "music"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "address", "hobbies"],
        "additionalProperties": False,
    }
    prompt = "<|im_start|>user\nInvent a person and answer in JSON.<|im_end|>\n<|im_start|>assistant\n"
    with loaded(smollm2_path(), n_ctx=1024) as engine:
        got = ask(engine, prompt, json_schema=check_schema(schema), sampling=sampling, max_tokens=400)
    assert got.reason == "stop"
    jsonschema.validate(json.loads(got.text), schema)


# --- what the library does not survive ---


class _Breaking(Vocab):
    """A vocabulary that fails while llguidance asks it for tokens, which makes it panic."""

    def tokenize(self, *_arguments: Any, **_options: Any) -> list[int]:
        raise ValueError("no tokens")


def test_a_panic_of_the_library_fails_one_request_and_not_the_worker(schemas: Schemas) -> None:
    grammars = Grammars(_Breaking(schemas.handle))
    request = Generate(request=1, prompt="x", json_schema='{"type": "object"}')
    constraint = grammars.make(request)
    assert constraint is not None
    with pytest.raises(ConstraintError, match="broke.*no tokens"):
        constraint.feed(b'{"a": 1')
    lark = ToolGrammar('start: "abc"', words=("a",))
    with pytest.raises(ConstraintError, match="no tokens"):
        grammars.make_calls(lark).feed(b"abc")
