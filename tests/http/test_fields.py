"""What is wrong with a request is told by the names that its client has for it."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from live_front import LiveFront, fake, say
from llamaherd.http.fields import as_sent
from llamaherd.pool import BadRequest

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HI = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "nonsense"}
#: A route, a body, and the field that is wrong in it.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {**HI, "top_p": 2}, "top_p"),
    (CHAT, {**HI, "n_predict": -7}, "n_predict"),
    (CHAT, {**HI, "max_completion_tokens": -7}, "max_completion_tokens"),
    (CHAT, {**HI, "max_tokens": -7}, "max_tokens"),
    (CHAT, {**HI, "max_tokens": -7, "n_predict": None}, "max_tokens"),
    (CHAT, {**HI, "thinking_budget_tokens": -7}, "thinking_budget_tokens"),
    (CHAT, {**HI, "n_cmpl": 0}, "n_cmpl"),
    (CHAT, {**HI, "stop": ["x" * 2000]}, "stop"),
    (CHAT, {**HI, "logit_bias": [[1, "x"]]}, "logit_bias"),
    (CHAT, {**HI, "samplers": ["nonsense"]}, "samplers"),
    (CHAT, {**HI, "lora": [{}]}, "lora"),
    (CHAT, {**HI, "grammar": "root ::= ("}, "grammar"),
    (CHAT, {**HI, "json_schema": SCHEMA}, "json_schema"),
    (CHAT, {**HI, "response_format": {"type": "x"}}, "response_format"),
    (
        CHAT,
        {**HI, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        "response_format",
    ),
    (CHAT, {**HI, "chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs"),
    (CHAT, {**HI, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {**HI, "tools": [{}]}, "tools[0]"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}, "messages[1]"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {**HI, "queue_timeout": -1}, "queue_timeout"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": "x", "top_k": 2**40}, "top_k"),
    ("/completion", {"prompt": "x", "n_indent": -1}, "n_indent"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    (RESPONSES, {"input": []}, "input"),
    (RESPONSES, {"input": "x", "max_output_tokens": -7}, "max_output_tokens"),
    (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "text"),
    (MESSAGES, {**HI, "stop_sequences": ["x" * 2000]}, "stop_sequences"),
    (MESSAGES, {**HI, "thinking": {"type": "enabled", "budget_tokens": -7}}, "thinking"),
    (MESSAGES, {**HI, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "output_config"),
    ("/v1/embeddings", {"input": "x", "embd_normalize": -7}, "embd_normalize"),
    ("/v1/embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with LiveFront(fake("echo"), default_model="echo") as live, live.client() as http:
        yield http


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_a_value_out_of_range_is_400_by_the_name_it_was_sent_under(
    client: httpx2.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error.get("param")) == (400, param)
    assert error["message"].startswith(param)


def test_of_two_fields_that_do_not_go_together_none_is_the_wrong_one(client: httpx2.Client) -> None:
    response = client.post(CHAT, json=say("hi", grammar='root ::= "x"', json_schema={}))
    assert (response.status_code, "param" in response.json()["error"]) == (400, False)


def test_a_request_of_very_many_fields_is_answered_without_a_name(client: httpx2.Client) -> None:
    response = client.post(CHAT, json=say("hi", top_p=2, **{f"odd{number}": 0 for number in range(300)}))
    assert (response.status_code, "param" in response.json()["error"]) == (400, False)


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("temperature must be a number", "temperature"),
        ("messages[3].content.text must be a text", "messages[3].content.text"),
        ("lora: there is no adapter 3", "lora"),
        ("logit_bias of 5 must be a finite number, or false", "logit_bias"),
        ("dimensions is 9; this model's embeddings have 4", "dimensions"),
        ("grammar and json_schema cannot both be given", ""),
        ("the prompt is empty", ""),
        ("model 'x': n_parallel must be 1 or more", ""),
        ("", ""),
    ],
)
def test_the_text_of_an_error_names_the_parameter(text: str, param: str) -> None:
    assert BadRequest(text).param == param


@given(st.text(max_size=30), st.sets(st.sampled_from(["max_tokens", "n_predict", "input", "seed"])))
def test_whatever_an_error_says_it_is_told(text: str, sent: set[str]) -> None:
    told, param = as_sent(BadRequest(text), sent)
    assert told == text or (param is not None and told.startswith(param))
