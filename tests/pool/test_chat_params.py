"""What only conversations have is checked before a worker sees it, and reaches it in one form."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool import BadRequest
from llamaherd.pool.chat_params import chat_options, check_messages, check_tools
from llamaherd.pool.params import chat_request, template_request
from llamaherd.transport.messages import ChatOptions

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
ASSISTANT: dict[str, Any] = {"role": "assistant", "content": "It is"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "strict": True}}


def options(*messages: dict[str, Any], **params: Any) -> ChatOptions:
    return chat_options(messages or (USER,), params)  # type: ignore[arg-type]


def test_a_plain_chat_carries_no_options() -> None:
    assert chat_request(1, [USER], {}).chat is None


def test_a_tool_gets_the_fields_that_templates_read() -> None:
    (tool,) = check_tools([TOOL])
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    assert tool == {"type": "function", "function": {"name": "f", "description": "", "parameters": empty}}


def test_a_schema_is_kept_as_it_is() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, None]}}, "x-made-up": {}}
    (tool,) = check_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    assert tool["function"]["parameters"] == schema


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *tools: object) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", ())),
        ("auto", ("auto", ())),
        ("none", ("none", ())),
        ("required", ("required", ())),
        (named("f"), ("required", ("f",))),
        (allowed("auto", named("g")), ("auto", ("g",))),
        (allowed("required", named("g"), named("f"), named("g")), ("required", ("g", "f"))),
    ],
)
def test_a_choice_of_tools_is_understood(choice: object, expected: tuple[str, tuple[str, ...]]) -> None:
    other = {"type": "function", "function": {"name": "g"}}
    chosen = options(tools=[TOOL, other], tool_choice=choice)
    assert (chosen.tool_choice, chosen.tool_names) == expected
    assert len(chosen.tools) == 2


def test_the_last_message_is_continued_if_it_is_the_assistants() -> None:
    assert options(USER).continuation == ""
    assert options(USER, ASSISTANT).continuation == "prefill"
    assert options(USER, ASSISTANT, continue_final_message=True).continuation == "auto"
    assert options(USER, ASSISTANT, continue_final_message="reasoning_content").continuation == "reasoning"
    assert options(USER, ASSISTANT, continue_final_message=False).continuation == ""


@pytest.mark.parametrize(
    ("messages", "params", "text"),
    [
        ((USER,), {"continue_final_message": True}, "must be the assistant's"),
        ((USER, ASSISTANT), {"continue_final_message": True, "add_generation_prompt": True}, "cannot both be true"),
        ((USER,), {"tools": [TOOL], "tool_choice": "g"}, "tool_choice must be"),
        ((USER,), {"tools": [TOOL], "tool_choice": named("g")}, "no function 'g'"),
        ((USER,), {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "mode of allowed_tools"),
        ((USER,), {"tools": [TOOL], "tool_choice": allowed("none", named("f"))}, "mode of allowed_tools"),
        ((USER,), {"tools": [TOOL], "tool_choice": allowed("auto")}, "at least one function"),
        ((USER,), {"tools": [TOOL], "tool_choice": allowed("auto", named("f"), named("g"))}, "no function 'g'"),
        ((USER,), {"tools": [TOOL], "tool_choice": allowed("auto", "f")}, "tool_choice must be"),
        ((USER,), {"tools": [TOOL, TOOL]}, "same name"),
        ((USER,), {"reasoning_format": "deepseek-legacy"}, "one of auto, none, deepseek"),
    ],
)
def test_what_contradicts_itself_is_refused(
    messages: tuple[dict[str, Any], ...], params: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadRequest, match=text):
        options(*messages, **params)


def test_a_grammar_and_tools_exclude_each_other() -> None:
    with pytest.raises(BadRequest, match="tools and a grammar"):
        chat_request(1, [USER], {"tools": [TOOL], "grammar": 'root ::= "a"'})
    assert chat_request(1, [USER], {"tools": [TOOL], "tool_choice": "none", "grammar": 'root ::= "a"'}).grammar


def test_a_prompt_takes_no_sampling() -> None:
    with pytest.raises(BadRequest, match="unknown parameter 'temperature'"):
        template_request(1, [USER], {"temperature": 1})  # type: ignore[typeddict-unknown-key]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["function", "allowed_tools"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "type",
                    "function",
                    "name",
                    "parameters",
                    "tool_calls",
                    "arguments",
                    "mode",
                    "tools",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON, JSON, JSON)
def test_anything_is_either_understood_or_a_bad_request(messages: Any, tools: Any, choice: Any) -> None:
    for check in (
        lambda: check_messages(messages),
        lambda: check_tools(tools),
        lambda: options(tools=tools, tool_choice=choice),
        lambda: chat_request(1, messages, {"tools": tools, "tool_choice": choice}),
    ):
        try:
            check()
        except BadRequest as error:
            assert str(error)
