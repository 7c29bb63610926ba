"""What requests for a response mean as chats."""

from typing import Any

import msgspec
import pytest

from llamaherd.http.problems import Problem
from llamaherd.http.responses_body import ResponsesBody, to_chat
from llamaherd.http.schema import parse


def chat(**raw: Any) -> dict[str, Any]:
    raw.setdefault("input", "hi")
    return to_chat(msgspec.convert(raw, ResponsesBody), raw)


def turns(*items: dict[str, Any]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = chat(input=list(items))["messages"]
    return said


def test_a_text_is_what_the_user_says() -> None:
    assert chat(input="hi")["messages"] == [{"role": "user", "content": "hi"}]
    assert chat(input="hi", instructions="be brief")["messages"][0] == {"role": "system", "content": "be brief"}


def test_all_that_the_assistant_did_in_a_turn_is_one_message() -> None:
    said = turns(
        {"role": "user", "content": "how is the sky?"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg",
            "status": "completed",
            "content": [{"type": "output_text", "text": "let me look", "annotations": []}],
        },
        {"type": "function_call", "id": "fc", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "smell", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "blue"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "fresh"}]},
        {"role": "user", "content": "thanks"},
    )
    assert said == [
        {"role": "user", "content": "how is the sky?"},
        {
            "role": "assistant",
            "content": "let me look",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}},
                {"id": "c2", "type": "function", "function": {"name": "smell", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "blue"},
        {"role": "tool", "tool_call_id": "c2", "content": "fresh"},
        {"role": "user", "content": "thanks"},
    ]


def test_two_messages_of_the_assistant_are_one() -> None:
    (turn,) = turns({"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"})
    assert turn["content"] == [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def test_thoughts_that_only_openai_can_read_are_left_out() -> None:
    assert turns({"type": "reasoning", "summary": [], "encrypted_content": "x"}) == []


def test_images_are_parts() -> None:
    (turn,) = turns({"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]})
    assert turn["content"] == [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


def test_functions_are_tools_and_others_are_left_out() -> None:
    asked = chat(tools=[{"type": "function", "name": "look", "parameters": {}}, {"type": "web_search"}])
    assert asked["tools"] == [
        {"type": "function", "function": {"strict": True, "name": "look", "parameters": {}}},
    ]
    assert "tools" not in chat(tools=[{"type": "web_search"}])
    assert chat(tool_choice="required")["tool_choice"] == "required"
    look = {"type": "function", "function": {"name": "look"}}
    assert chat(tool_choice={"type": "function", "name": "look"})["tool_choice"] == look
    some = [{"type": "function", "name": "look"}, {"type": "web_search"}]
    assert chat(tool_choice={"type": "allowed_tools", "mode": "auto", "tools": some})["tool_choice"] == {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [look]},
    }


def test_what_the_text_shall_be_is_a_response_format() -> None:
    wanted = {"type": "json_schema", "name": "sky", "schema": {"type": "object"}, "strict": True}
    assert chat(text={"format": wanted})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "sky", "schema": {"type": "object"}, "strict": True},
    }
    assert chat(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert "response_format" not in chat(text={})


def test_limits_have_a_chats_names_and_the_rest_goes_on_as_it_is() -> None:
    asked = chat(
        model="m",
        max_output_tokens=7,
        reasoning={"effort": "low"},
        top_k=3,
        stream=True,
        store=True,
        n=3,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    del asked["messages"]
    assert asked == {
        "model": "m",
        "max_tokens": 7,
        "reasoning_effort": "low",
        "top_k": 3,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 2,
    }


@pytest.mark.parametrize("name", ["previous_response_id", "conversation"])
def test_nothing_is_kept_between_requests(name: str) -> None:
    with pytest.raises(Problem, match=name):
        chat(**{name: "x"})


@pytest.mark.parametrize("top", [-1, 21])
def test_top_logprobs_are_checked_whether_they_are_shown_or_not(top: int) -> None:
    raw = {"model": "m", "input": "hi", "top_logprobs": top}
    with pytest.raises(Problem, match="top_logprobs must be an integer from 0 to 20") as caught:
        to_chat(parse(raw, ResponsesBody), raw)
    assert caught.value.param == "top_logprobs"
