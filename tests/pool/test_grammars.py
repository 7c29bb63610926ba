"""Answers under a grammar, through the pool and real workers."""

import asyncio
import json
import re
from typing import Any

import pytest

from herding import run
from llamaherd.pool import BadRequest, EngineOptions, ModelSpec, Pool
from tiny_gguf import SCRIPT_TEXT, tiny_model


def pool() -> Pool:
    options = EngineOptions(n_ctx=512, n_threads=1, flash_attn="off")
    return Pool([ModelSpec(name=name, path=tiny_model(name), options=options) for name in ("scripted", "random")])


async def said(pool: Pool, model: str, **params: Any) -> str:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 60, **params}
    return (await pool.complete(model, "\n", **fields).collect()).text


def test_an_answer_follows_its_grammar() -> None:
    async def main() -> None:
        async with pool() as herd:
            assert await said(herd, "random", grammar='root ::= "yes" | "no"') in ("yes", "no")
            assert await said(herd, "scripted", grammar='root ::= [^!]* "!?"') == SCRIPT_TEXT + "?"
            assert await said(herd, "scripted", grammar="") == SCRIPT_TEXT

    run(main())


@pytest.mark.parametrize("grammar", ["root ::= other", 'root ::= root "a"', "x" * 70_000, 7, "root ::= [" + "a" * 5000])
def test_a_bad_grammar_costs_its_caller_an_error_and_nothing_else(grammar: Any) -> None:
    async def main() -> None:
        async with pool() as herd:
            with pytest.raises(BadRequest) as caught:
                await said(herd, "scripted", grammar=grammar)
            assert "grammar" in str(caught.value)
            assert await said(herd, "scripted") == SCRIPT_TEXT

    run(main())


def test_answers_with_and_without_a_grammar_run_side_by_side() -> None:
    async def main() -> None:
        async with pool() as herd:
            bound = [
                said(herd, "random", temperature=1, seed=n, grammar='root ::= "[" [0-9]{1,5} "]"') for n in range(6)
            ]
            free = said(herd, "random", temperature=1, seed=1, ignore_eos=True)
            *texts, other = await asyncio.gather(*bound, free)
            assert all(re.fullmatch(r"\[[0-9]{1,5}\]", text) for text in texts)
            assert other == await said(herd, "random", temperature=1, seed=1, ignore_eos=True)

    run(main())


#: Each kept llama.cpp's own sampler busy for minutes, or ended its process.
HOSTILE = [
    'root ::= ("a"?){300} "x"',
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1} [x]\n" for i in range(22)) + "r22 ::= [y]",
    'root ::= (([ ]+)*)* "x"',
    "root ::= ws root ws | [x]\nws ::= [ ]*",
    'root ::= "a"{5,2}',
    'root ::= (("x"{2000}){2000}){2000}',
    "root ::= " + "(" * 30_000,
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(2500)) + "r2500 ::= [y]",
    "root ::= <|im_end|> | <s>",
    'root ::= "\\U0010FFFF" .*',
    "root ::= [\\x00] root2\nroot2 ::= .",
    "root ::= !<[5]>*",
]


def test_a_worker_survives_every_grammar() -> None:
    async def main() -> None:
        several: list[dict[str, Any]] = [{}, {"temperature": 1.5, "seed": 3, "top_k": 0}, {"ignore_eos": True}]
        async with pool() as herd:
            for grammar in HOSTILE:
                for params in several:
                    try:
                        await said(herd, "random", grammar=grammar, **{"max_tokens": 20, **params})
                    except BadRequest as error:
                        assert error.code in ("invalid_grammar", "grammar_too_complex", "grammar_dead_end")
                assert await said(herd, "random", grammar='root ::= "fine"') == "fine"
                assert herd.status("random").exit_code is None

    run(main())


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"]}
CLOSED = {**SCHEMA, "additionalProperties": False}


@pytest.mark.parametrize(
    "params",
    [
        {"json_schema": CLOSED},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CLOSED, "strict": True}}},
        {"response_format": {"type": "json_schema", "schema": CLOSED}},
        {"response_format": {"type": "json_object", "schema": CLOSED}},
        {"response_format": {"type": "text"}, "json_schema": CLOSED},
    ],
    ids=range(5),
)
def test_an_answer_follows_its_schema_however_it_is_said(params: dict[str, Any]) -> None:
    async def main() -> None:
        async with pool() as herd:
            said_soon = await said(herd, "random", logit_bias=[["}", 20.0]], **params)
            assert re.fullmatch(r'\{\s*"a"\s*:\s*[0-9]\s*\}', said_soon)
            messages = [{"role": "user", "content": "Hi"}]
            chat = await herd.chat("random", messages, max_tokens=60, logit_bias=[["}", 20.0]], **params).collect()
            assert re.fullmatch(r'\{\s*"a"\s*:\s*[0-9]\s*\}', chat.text)

    run(main())


def test_an_object_is_an_object() -> None:
    async def main() -> None:
        async with pool() as herd:
            format_ = {"type": "json_object"}
            text = await said(herd, "random", logit_bias=[["}", 30.0]], response_format=format_)
            assert isinstance(json.loads(text), dict)
            assert await said(herd, "scripted", response_format={"type": "text"}) == SCRIPT_TEXT

    run(main())


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"json_schema": {"uniqueItems": True}}, "#/uniqueItems: this keyword is not supported"),
        ({"json_schema": []}, "must be an object"),
        ({"json_schema": {}, "grammar": 'root ::= "x"'}, "cannot both be given"),
        ({"json_schema": {}, "response_format": {"type": "json_object"}}, "cannot both be given"),
        ({"response_format": "json"}, "response_format must be an object"),
        ({"response_format": {"type": "xml"}}, "type must be text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema is missing"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "json_schema: "),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "minimum (2) is greater"),
    ],
    ids=range(9),
)
def test_a_bad_schema_costs_its_caller_an_error_and_nothing_else(params: dict[str, Any], reason: str) -> None:
    async def main() -> None:
        async with pool() as herd:
            with pytest.raises(BadRequest) as caught:
                await said(herd, "scripted", **params)
            assert reason in str(caught.value)
            assert await said(herd, "scripted") == SCRIPT_TEXT

    run(main())


HOSTILE_SCHEMAS: list[Any] = [
    {"type": "string", "minLength": 10_000, "maxLength": 10_000},
    {"type": "array", "items": {"type": "string", "minLength": 9_000}, "minItems": 10_000},
    {"type": "string", "pattern": "^(((a{1,1000}){1,1000}){1,1000}){1,1000}$"},
    {"type": "string", "pattern": "^(\\w|\\d|\\s|.)*(.*x.*){200}$"},
    {"enum": [f"value number {n}" for n in range(5000)]},
    {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(1, 9)]},
    {"anyOf": [{"properties": {"a": {"$ref": "#"}, f"b{n}": {"type": "null"}}, "type": "object"} for n in range(60)]},
]


def test_a_worker_survives_every_schema() -> None:
    async def main() -> None:
        several: list[dict[str, Any]] = [{}, {"temperature": 1.5, "seed": 3, "top_k": 0}]
        async with pool() as herd:
            for schema in HOSTILE_SCHEMAS:
                for params in several:
                    try:
                        await said(herd, "random", json_schema=schema, **{"max_tokens": 20, **params})
                    except BadRequest as error:
                        assert error.code in ("invalid_json_schema", "grammar_too_complex", "grammar_dead_end")
                assert await said(herd, "random", json_schema={"const": "fine"}) == '"fine"'
                assert herd.status("random").exit_code is None

    run(main())
