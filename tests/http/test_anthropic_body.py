"""What Anthropic's requests mean as chats."""

from typing import Any

import msgspec
import pytest

from llamaherd.http.anthropic import MessageAnswer
from llamaherd.http.anthropic_body import DEFAULT_MAX_TOKENS, MessagesBody, to_chat
from llamaherd.http.problems import Problem
from llamaherd.pool import Completion, Timings, ToolCall, Usage

PIXEL = {"type": "base64", "media_type": "image/png", "data": "AAAA"}


def chat(**body: Any) -> dict[str, Any]:
    return to_chat(msgspec.convert({"messages": [], **body}, MessagesBody))


def turns(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = chat(messages=list(messages))["messages"]
    return said


def test_the_system_prompt_is_the_first_message() -> None:
    assert chat(system="be brief")["messages"] == [{"role": "system", "content": "be brief"}]
    blocks: list[Any] = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief", "cache_control": {}}]
    assert chat(system=blocks)["messages"] == [{"role": "system", "content": "be brief"}]


def test_the_stamp_of_claude_code_does_not_spoil_the_prefix() -> None:
    head = "x-anthropic-billing-header: cc_version=2.1; cch={};You are helpful."
    first, second = (chat(system=head.format(stamp))["messages"] for stamp in ("a5145", "b6256"))
    assert first == second
    assert chat(system="cch=a5145;")["messages"][0]["content"] == "cch=a5145;"
    assert chat(system=head.format("a5"))["messages"][0]["content"] == head.format("a5")


def test_one_text_is_a_text_and_several_are_parts() -> None:
    assert turns({"role": "user", "content": [{"type": "text", "text": "hi"}]}) == [{"role": "user", "content": "hi"}]
    several = [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]
    assert turns({"role": "user", "content": several}) == [{"role": "user", "content": several}]


def test_images_are_data_urls_or_urls() -> None:
    (turn,) = turns(
        {
            "role": "user",
            "content": [
                {"type": "image", "source": PIXEL},
                {"type": "image", "source": {"type": "url", "url": "http://a/b.png"}},
            ],
        }
    )
    assert [part["image_url"]["url"] for part in turn["content"]] == ["data:image/png;base64,AAAA", "http://a/b.png"]


def test_calls_and_thoughts_belong_to_the_assistants_turn() -> None:
    (turn,) = turns(
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "let me look"},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "sky"}},
            ],
        }
    )
    assert turn == {
        "role": "assistant",
        "content": "let me look",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"at":"sky"}'}}],
    }


def test_results_of_tools_are_messages_of_their_own_before_what_the_user_says() -> None:
    said = turns(
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "blue"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "red"}]},
                {"type": "tool_result", "tool_use_id": "t3", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t4", "content": [{"type": "image", "source": PIXEL}]},
                {"type": "text", "text": "and now?"},
            ],
        }
    )
    assert [message["role"] for message in said] == ["tool", "tool", "tool", "tool", "user"]
    assert [message["content"] for message in said[:3]] == ["blue", "red", ""]
    assert said[3]["content"][0]["type"] == "image_url"


def test_tools_are_functions() -> None:
    schema = {"type": "object", "properties": {"at": {"type": "string"}}}
    asked = chat(tools=[{"name": "look", "description": "look at it", "input_schema": schema}])
    assert asked["tools"] == [
        {"type": "function", "function": {"name": "look", "description": "look at it", "parameters": schema}}
    ]


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}}),
    ],
)
def test_the_choice_of_a_tool(choice: dict[str, Any], meaning: Any) -> None:
    assert chat(tool_choice=choice)["tool_choice"] == meaning
    assert chat(tool_choice={**choice, "disable_parallel_tool_use": True})["parallel_tool_calls"] is False


def test_a_tool_that_must_be_called_has_a_name() -> None:
    with pytest.raises(Problem, match="name of the tool"):
        chat(tool_choice={"type": "tool"})


def test_thinking_can_be_switched_off_and_bounded() -> None:
    assert chat(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat(thinking={"type": "enabled", "budget_tokens": 2048})["thinking_budget_tokens"] == 2048
    assert "thinking_budget_tokens" not in chat(thinking={"type": "adaptive"})


def test_limits_and_stops_have_openais_names() -> None:
    assert chat()["max_tokens"] == DEFAULT_MAX_TOKENS
    asked = chat(max_tokens=7, stop_sequences=["end"], temperature=0.5, top_k=3, top_p=0.9, stream=True)
    assert asked == {
        "messages": [],
        "max_tokens": 7,
        "stop": ["end"],
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "stream": True,
        "return_progress": True,
    }


def test_structured_output_is_a_response_format() -> None:
    schema = {"type": "object"}
    asked = chat(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert chat(output_config={"effort": "low"})["reasoning_effort"] == "low"
    assert asked["response_format"] == {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}


@pytest.mark.parametrize("arguments", ['{"at": [', '{"at": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_arguments_that_broke_off_or_nest_without_end_are_none(arguments: str) -> None:
    call = ToolCall(id="t1", name="look", arguments=arguments)
    completion = Completion(
        text="", tokens=(), finish_reason="length", usage=Usage(), timings=Timings(), tool_calls=(call,)
    )
    (block,) = MessageAnswer("m").whole([completion])["content"]
    assert (block["name"], block["input"]) == ("look", {})
