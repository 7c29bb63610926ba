"""Tools and a schema in one request: an answer is calls of the tools, or JSON that the schema allows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

from chat_templates import GEMMA_PLAIN, HERMES, LLAMA3, MISTRAL, QWEN3
from llamaherd.pool import BadRequest, Completion, EngineOptions, ModelSpec, SyncPool
from tiny_gguf import write_random_llama, write_scripted_llama

QUESTION: Final = [{"role": "user", "content": "Weather in Paris?"}]
PARAMETERS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Final = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("get_weather", "get_time")
]
#: As like a call as can be: it begins with a name too.
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"name": {"enum": ["get_weather", "nobody"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Final = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
TEMPLATES: Final = {
    "hermes": HERMES,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "generic": GEMMA_PLAIN,
}
OPTIONS: Final = EngineOptions(n_ctx=1024, n_parallel=4, n_threads=1, flash_attn="off")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPool]:
    folder: Path = tmp_path_factory.mktemp("either")
    models: list[ModelSpec] = []
    for name, template in TEMPLATES.items():
        write_random_llama(folder / f"{name}.gguf", template=template, controls=("<think>", "</think>"))
        models.append(ModelSpec(name=name, path=folder / f"{name}.gguf", options=OPTIONS))
    path = folder / "scripted.gguf"
    script = ('{"name":', '▁"nobody",', '▁"age":', "▁7", "}")
    write_scripted_llama(path, script=script, template=HERMES)
    models.append(ModelSpec(name="scripted", path=path, options=OPTIONS))
    with SyncPool(models, models_max=2) as herd:
        yield herd


def ask(pool: SyncPool, name: str, **params: Any) -> Completion:
    given: dict[str, Any] = {"tools": TOOLS, "response_format": FORMAT, "max_tokens": 400, **params}
    return pool.chat(name, QUESTION, **given).collect()


def check(answer: Completion) -> str:
    """Return which of the two an answer is; fails where it is neither, or both."""
    if not answer.tool_calls:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        return "content"
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    for call in answer.tool_calls:
        assert call.name in ("get_weather", "get_time")
        jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    return "calls"


def choosing(name: str, seed: int, **params: Any) -> dict[str, Any]:
    """Return the parameters of an answer that could be anything. One call, or a random model makes them for ever."""
    thinks = {"reasoning_budget_tokens": 2} if name == "qwen3" else {}
    return {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed, "parallel_tool_calls": False} | (
        thinks | params
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_one_or_the_other(pool: SyncPool, name: str) -> None:
    found = {check(ask(pool, name, **choosing(name, seed))) for seed in range(20)}
    assert found == {"content", "calls"}


@pytest.mark.parametrize("name", ["hermes", "llama3", "generic"])
def test_a_stream_tells_the_same(pool: SyncPool, name: str) -> None:
    for seed in range(6):
        params = choosing(name, seed)
        whole = ask(pool, name, **params)
        pieces = list(pool.chat(name, QUESTION, tools=TOOLS, response_format=FORMAT, max_tokens=400, **params))
        assert "".join(piece.text for piece in pieces) == whole.text
        told = "".join(delta.arguments for piece in pieces for delta in piece.calls)
        assert told == "".join(call.arguments for call in whole.tool_calls)
        assert pieces[-1].finish_reason == whole.finish_reason


def test_a_model_that_would_answer_does(pool: SyncPool) -> None:
    pieces = list(pool.chat("scripted", QUESTION, tools=TOOLS, json_schema=SCHEMA, temperature=0))
    texts = [piece.text for piece in pieces if piece.text]
    assert json.loads("".join(texts)) == {"name": "nobody", "age": 7}
    assert len(texts) > 2, "it comes as it is written"
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("name", ["hermes", "llama3"])
def test_the_choice_of_tools_decides_for_one(pool: SyncPool, name: str) -> None:
    one = {"type": "function", "function": {"name": "get_time"}}
    for seed in range(8):
        params = choosing(name, seed)
        assert check(ask(pool, name, tool_choice="none", **params)) == "content"
        assert check(ask(pool, name, tool_choice="required", **params)) == "calls"
        assert [call.name for call in ask(pool, name, tool_choice=one, **params).tool_calls] == ["get_time"]
        for mode in ("auto", "required"):
            some = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [one]}}
            answer = ask(pool, name, tool_choice=some, **params)
            assert {call.name for call in answer.tool_calls} <= {"get_time"}
            assert answer.tool_calls or mode == "auto"


def test_what_is_wrong_with_either_is_said(pool: SyncPool) -> None:
    with pytest.raises(BadRequest, match="uniqueItems"):
        ask(pool, "hermes", response_format=None, json_schema={"uniqueItems": True})
    with pytest.raises(BadRequest, match="tools and a grammar cannot be used together"):
        ask(pool, "hermes", response_format=None, grammar='root ::= "x"')
    with pytest.raises(BadRequest, match="json_schema or tools: "):
        ask(pool, "hermes", response_format=None, json_schema={"type": "string", "pattern": "("})
    many = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(257)]
    with pytest.raises(BadRequest, match="at most 256 tools"):
        ask(pool, "hermes", tools=many)
