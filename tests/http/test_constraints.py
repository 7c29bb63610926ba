"""Grammars and schemas over HTTP, with OpenAI's client and with plain requests."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx2
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam
from pydantic import BaseModel, Field

from engine_driver import smollm2_path
from live_front import LiveFront, sse_data
from llamaherd.pool import EngineOptions, ModelSpec

ASK: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["child", "adult"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}

pytestmark = pytest.mark.timeout(180)


class Person(BaseModel):
    """What the client makes a schema of, and reads the answer as."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    pets: list[Literal["cat", "dog"]] = Field(max_length=2)


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    options = EngineOptions(n_ctx=1024, n_parallel=2, n_threads=1)
    with LiveFront(ModelSpec(name="smollm2", path=smollm2_path(), options=options)) as live:
        yield live


@pytest.fixture(scope="module")
def api(front: LiveFront) -> Iterator[openai.OpenAI]:
    with front.openai() as client:
        yield client.with_options(timeout=150)


@pytest.fixture(scope="module")
def plain(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as client:
        client.timeout = httpx2.Timeout(150)
        yield client


def test_the_client_gets_what_its_schema_says(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="smollm2",
        messages=ASK,
        temperature=0,
        max_tokens=120,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


def test_the_client_reads_the_answer_as_its_own_class(api: openai.OpenAI) -> None:
    answer = api.chat.completions.parse(
        model="smollm2", messages=ASK, temperature=0, max_tokens=80, response_format=Person
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_stream_adds_up_to_valid_json(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="smollm2",
        messages=ASK,
        seed=5,
        max_tokens=120,
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    with stream:
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    jsonschema.validate(json.loads(said), SCHEMA)


def test_several_answers_each_follow_it(plain: httpx2.Client) -> None:
    body = {"model": "smollm2", "messages": ASK, "n": 2, "seed": 1, "json_schema": SCHEMA, "max_tokens": 120}
    choices = plain.post("/v1/chat/completions", json=body).json()["choices"]
    assert len(choices) == 2
    for choice in choices:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize(
    ("begun", "json_begun"),
    [
        ("{", "{"),
        ('{"name": "Ann", "a', '{"name": "Ann", "a'),
        ('  {"na', '{"na'),
        ("Here it is:\n```json\n{", "{"),
        ("Here it is (with [no] comments):", ""),
        ('{"name": "Ann", "age": 5, "kind": "child"}', '{"name": "Ann", "age": 5, "kind": "child"}'),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_message_that_is_continued_follows_it_as_a_whole(
    plain: httpx2.Client, begun: str, json_begun: str, streamed: bool
) -> None:
    messages = [*ASK, {"role": "assistant", "content": begun}]
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    body = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 120, "response_format": form}
    if streamed:
        with plain.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            chunks = [chunk for chunk in sse_data(response.iter_lines()) if chunk != "[DONE]"]
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    else:
        said = plain.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    jsonschema.validate(json.loads(json_begun + said), SCHEMA)


@pytest.mark.parametrize("begun", ['{"nickname', "[1", '"Ann"'])
def test_a_message_that_cannot_be_continued_to_it_is_400(plain: httpx2.Client, begun: str) -> None:
    messages = [*ASK, {"role": "assistant", "content": begun}]
    response = plain.post(
        "/v1/chat/completions", json={"model": "smollm2", "messages": messages, "json_schema": SCHEMA}
    )
    assert response.status_code == 400
    assert "does not begin as the schema demands" in response.json()["error"]["message"]


def test_a_grammar_is_of_what_follows_a_message_that_is_continued(plain: httpx2.Client) -> None:
    messages = [*ASK, {"role": "assistant", "content": "yes"}]
    body = {"model": "smollm2", "messages": messages, "grammar": 'root ::= "yes" | "no"', "temperature": 0}
    answer = plain.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_a_completion_follows_a_grammar(plain: httpx2.Client, path: str) -> None:
    body = {"model": "smollm2", "prompt": "The answer is", "grammar": 'root ::= " yes" | " no"', "temperature": 0}
    answer = plain.post(path, json=body).json()
    text = answer["content"] if path == "/completion" else answer["choices"][0]["text"]
    assert re.fullmatch(" yes| no", text)


def test_a_json_object_is_one(plain: httpx2.Client) -> None:
    wanted = {"type": "json_object", "schema": {"type": "object", "maxProperties": 1}}
    body = {"model": "smollm2", "messages": ASK, "response_format": wanted}
    refused = plain.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "#/maxProperties: this keyword is not supported" in refused.json()["error"]["message"]
    body["response_format"] = {"type": "json_object"}
    answer = plain.post("/v1/chat/completions", json={**body, "temperature": 0, "max_tokens": 40}).json()
    (choice,) = answer["choices"]
    text = choice["message"]["content"]
    # The model may have more to say than it is given room for.
    assert re.match(r'\{\s*("|\})', text)
    assert choice["finish_reason"] == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"grammar": "root ::= [a"}, "line 1, column 10: this class of characters has no closing bracket"),
        ({"grammar": 'root ::= "x"', "json_schema": {}}, "cannot both be given"),
        ({"json_schema": {"type": "string", "contains": {}}}, "#/contains: this keyword is not supported"),
        ({"json_schema": {"$ref": "https://example.com/"}}, "only this schema itself is looked at"),
        ({"response_format": {"type": "yaml"}}, "type must be text, json_object or json_schema"),
        ({"response_format": "json"}, "response_format"),
        ({"grammar": 3}, "grammar"),
    ],
    ids=range(7),
)
def test_what_is_wrong_is_400_with_the_reason(plain: httpx2.Client, fields: dict[str, Any], reason: str) -> None:
    for path in ("/v1/chat/completions", "/completion"):
        answer = plain.post(path, json={"model": "smollm2", "messages": ASK, "prompt": "x", **fields})
        assert answer.status_code == 400
        assert reason in answer.json()["error"]["message"]
