"""Conversations become the prompts that each family's template wants; what a template cannot do gets a substitute."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chat_templates import (
    ALWAYS_THINKS,
    DEEPSEEK,
    GEMMA_PLAIN,
    HARMONY,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NEW,
    QWEN3,
    TEMPLATES,
)
from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.chat import Chats, Turn
from llamaherd.pool.child.dialect import dialect_of
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.template import ChatTemplate
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import ChatOptions, EngineOptions
from tiny_gguf import tiny_model

Message = dict[str, Any]

WEATHER: Message = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOLS = ChatOptions(tools=(WEATHER,))
USER: Message = {"role": "user", "content": "Weather in Paris?"}


def a_call(arguments: object = '{"city": "Paris"}', ident: str = "abcdefghi") -> Message:
    return {"id": ident, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


CALLED: Message = {"role": "assistant", "content": None, "tool_calls": [a_call()]}
RESULT: Message = {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"}


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    llama_backend.init_backend()
    model = Model(str(tiny_model("random")), EngineOptions(), lambda _: True)
    yield model.vocab
    model.free()


def turn(vocab: Vocab, source: str, *messages: Message, options: ChatOptions | None = None, **variables: Any) -> Turn:
    return Chats(source, "", vocab).turn(messages, variables, options)


def prompt(vocab: Vocab, source: str, *messages: Message, options: ChatOptions | None = None, **variables: Any) -> str:
    return turn(vocab, source, *messages, options=options, **variables).prompt


@pytest.mark.parametrize(("name", "source"), TEMPLATES)
def test_a_template_gives_its_family_away(name: str, source: str) -> None:
    template = ChatTemplate(source)
    assert template.traits.takes_tools is (name != "generic")
    assert dialect_of(source, takes_tools=template.traits.takes_tools).name == name


@pytest.mark.parametrize(("name", "source"), TEMPLATES)
def test_every_template_tells_of_tools_and_of_earlier_calls(vocab: Vocab, name: str, source: str) -> None:
    text = prompt(vocab, source, USER, CALLED, RESULT, options=TOOLS)
    for word in ("get_weather", "The weather of a city." if name != "gemma4" else "city", "Paris", "sunny"):
        assert word in text
    assert "None" not in text


# --- messages ---------------------------------------------------------------------------------------------------------


def test_arguments_become_objects_where_the_template_writes_them_itself(vocab: Vocab) -> None:
    assert '"arguments": {"city": "Paris"}}' in prompt(vocab, HERMES, USER, CALLED, RESULT)
    given = {**CALLED, "tool_calls": [a_call({"city": "Paris"})]}
    assert '"arguments": {"city": "Paris"}}' in prompt(vocab, HERMES, USER, given, RESULT)


def test_arguments_stay_texts_where_the_template_wants_them_so(vocab: Vocab) -> None:
    for given in ('{"city": "Paris"}', {"city": "Paris"}):
        called = {**CALLED, "tool_calls": [a_call(given)]}
        assert '<｜tool▁sep｜>{"city": "Paris"}<' in prompt(vocab, DEEPSEEK, USER, called, RESULT)


@pytest.mark.parametrize(("name", "source"), TEMPLATES)
def test_a_conversation_goes_on_after_a_call_that_was_cut_off(vocab: Vocab, name: str, source: str) -> None:
    for arguments, shown in (('{"city": "Par', "Par"), ("Par", "Par"), ("", "get_weather"), (None, "get_weather")):
        called = {**CALLED, "tool_calls": [a_call(arguments)]}
        text = prompt(vocab, source, USER, called, RESULT, options=TOOLS)
        assert shown in text and "None" not in text


def test_content_is_never_null(vocab: Vocab) -> None:
    assert "None" not in prompt(vocab, HERMES, USER, {"role": "assistant", "content": None}, USER)


def test_a_developer_is_a_system_unless_the_template_knows_it(vocab: Vocab) -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert "<|im_start|>system\nBe brief." in prompt(vocab, "", developer, USER)
    knows = "{# <|channel|> #}{% for m in messages %}{{ m.role }}{% endfor %}"
    assert prompt(vocab, knows, developer, USER) == "developeruser"


def test_a_system_message_that_is_refused_moves_into_the_next(vocab: Vocab) -> None:
    text = prompt(vocab, GEMMA_PLAIN, {"role": "system", "content": "Be brief."}, USER)
    assert "<start_of_turn>user\nBe brief.\nWeather in Paris?<end_of_turn>" in text


def test_text_becomes_parts_where_nothing_else_is_read(vocab: Vocab) -> None:
    source = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert prompt(vocab, source, USER) == "Weather in Paris?"


def test_the_templates_complaint_about_an_id_is_the_callers_answer(vocab: Vocab) -> None:
    result = {**RESULT, "tool_call_id": "call_1"}
    with pytest.raises(RequestError, match="nine characters"):
        prompt(vocab, MISTRAL, USER, CALLED, result, options=TOOLS)


# --- tools ------------------------------------------------------------------------------------------------------------


def test_the_template_for_tools_is_used_with_tools_and_no_other(vocab: Vocab) -> None:
    chats = Chats("plain{{ messages[0].content }}", "tools{{ tools | tojson }}", vocab)
    assert chats.turn([USER], {}, None).prompt == "plainWeather in Paris?"
    assert chats.turn([USER], {}, TOOLS).prompt.startswith('tools[{"type": "function"')


def test_the_template_for_tools_serves_alone_where_it_is_the_only_one(vocab: Vocab) -> None:
    assert Chats("", "only{{ messages[0].content }}", vocab).turn([USER], {}, None).prompt == "onlyWeather in Paris?"


def test_a_model_without_tools_is_told_of_them_in_a_system_message(vocab: Vocab) -> None:
    text = prompt(vocab, "", {"role": "system", "content": "Be brief."}, USER, options=TOOLS)
    system = text.split("<|im_end|>")[0]
    assert "Be brief." in system
    assert '"name": "get_weather"' in system
    assert '{"tool_call": {"name":' in system
    assert "tool_calls" in system
    single = ChatOptions(tools=(WEATHER,), parallel_tool_calls=False, tool_choice="required")
    assert "tool_calls" not in prompt(vocab, "", USER, options=single)
    assert "must call" in prompt(vocab, "", USER, options=single)


def test_a_template_without_calls_is_told_of_them_as_text_and_its_roles_alternate(vocab: Vocab) -> None:
    again = {"role": "user", "content": "And in Rome?"}
    text = prompt(vocab, GEMMA_PLAIN, USER, CALLED, RESULT, RESULT, again, options=TOOLS)
    assert '{"tool_call": {"name": "get_weather", "arguments": {"city": "Paris"}}}' in text
    assert text.count('{"tool_response": {"tool_call_id": "abcdefghi", "content": "sunny"}}') == 2
    assert text.endswith("And in Rome?<end_of_turn>\n<start_of_turn>model\n")


def test_without_leave_to_call_nothing_is_read_as_a_call(vocab: Vocab) -> None:
    none = ChatOptions(tools=(WEATHER,), tool_choice="none")
    assert turn(vocab, HERMES, USER, options=none).reply is None
    assert "get_weather" in prompt(vocab, HERMES, USER, options=none)
    assert "get_weather" not in prompt(vocab, "", USER, options=none)


def test_a_plain_chat_is_read_as_it_is(vocab: Vocab) -> None:
    assert turn(vocab, "", USER).reply is None
    assert turn(vocab, HERMES, USER) == Turn(prompt(vocab, HERMES, USER))


def test_what_ends_an_opened_reasoning_is_known(vocab: Vocab) -> None:
    opening = "{{ messages[0].content }}<think>\n{# </think> #}"
    assert turn(vocab, opening, USER).closing == "</think>"
    split = ChatOptions(reasoning_format="none")
    assert turn(vocab, opening, USER, options=split).closing == "</think>"


def test_calls_of_the_new_mistral_form_are_rendered(vocab: Vocab) -> None:
    assert '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}' in prompt(vocab, MISTRAL_NEW, USER, CALLED, RESULT)


def test_several_calls_are_allowed_where_the_template_shows_several(vocab: Vocab) -> None:
    call = '{"name": "get_weather", "parameters": {}}'
    for source, full in ((LLAMA3, True), (HERMES, False)):
        reply = turn(vocab, source, USER, options=TOOLS).reply
        assert reply is not None
        reply.feed(f"<tool_call>{call}</tool_call>" if source == HERMES else call + ";")
        assert reply.called
        assert reply.full is full


# --- reasoning --------------------------------------------------------------------------------------------------------


def said(read: Turn, text: str) -> tuple[str, str]:
    assert read.reply is not None
    parts = [read.reply.feed(text), read.reply.finish()]
    return "".join(part.text for part in parts), "".join(part.reasoning for part in parts)


def test_reasoning_is_found_by_the_templates_tags(vocab: Vocab) -> None:
    assert said(turn(vocab, QWEN3, USER), "<think>\nHm.\n</think>\n\nYes.") == ("Yes.", "Hm.")


def test_a_tag_that_the_template_opens_is_open(vocab: Vocab) -> None:
    assert prompt(vocab, ALWAYS_THINKS, USER).endswith("<think>\n")
    assert said(turn(vocab, ALWAYS_THINKS, USER), "Hm.\n</think>\n\nYes.") == ("Yes.", "Hm.")


def test_thinking_can_be_switched_off(vocab: Vocab) -> None:
    off = turn(vocab, QWEN3, USER, enable_thinking=False)
    assert off.prompt.endswith("<think>\n\n</think>\n\n")
    assert said(off, "Yes.") == ("Yes.", "")


def test_the_format_none_leaves_reasoning_where_it_is(vocab: Vocab) -> None:
    assert turn(vocab, QWEN3, USER, options=ChatOptions(reasoning_format="none")).reply is None


def test_preserve_reasoning_is_said_in_the_templates_words(vocab: Vocab) -> None:
    source = "{{ clear_thinking }}{{ preserve_thinking }}"
    assert prompt(vocab, source, USER, preserve_reasoning=True) == "FalseTrue"


def test_gpt_oss_gets_reasoning_in_its_own_words(vocab: Vocab) -> None:
    called = {**CALLED, "reasoning_content": "Hm."}
    text = prompt(vocab, HARMONY, USER, called, RESULT, options=TOOLS)
    assert "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.get_weather" in text
    read = turn(vocab, HARMONY, USER)
    assert said(read, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.") == (
        "Yes.",
        "Hm.",
    )


def test_gpt_oss_goes_on_in_the_right_channel(vocab: Vocab) -> None:
    content = continued(vocab, HARMONY, {**BEGUN, "reasoning_content": "Hm."})
    assert content.prompt.endswith("analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It is")
    assert said(content, " noon.") == (" noon.", "")
    thought = continued(vocab, HARMONY, {"role": "assistant", "content": "", "reasoning_content": "Let me"})
    assert thought.prompt.endswith("<|start|>assistant<|channel|>analysis<|message|>Let me")
    assert said(thought, " see.") == ("", " see.")


# --- what is continued ------------------------------------------------------------------------------------------------

BEGUN: Message = {"role": "assistant", "content": "It is"}


def continued(vocab: Vocab, source: str, last: Message, part: Any = "auto", **variables: Any) -> Turn:
    return turn(vocab, source, USER, last, options=ChatOptions(continuation=part), **variables)


def test_the_last_message_is_continued_where_it_ends(vocab: Vocab) -> None:
    assert continued(vocab, "", BEGUN).prompt.endswith("Paris?<|im_end|>\n<|im_start|>assistant\nIt is")


def test_content_is_continued_behind_its_reasoning(vocab: Vocab) -> None:
    for source in (QWEN3, ALWAYS_THINKS):
        read = continued(vocab, source, BEGUN)
        assert read.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nIt is")
        assert read.reply is None, "what follows is content"
    thought = {**BEGUN, "reasoning_content": "Hm."}
    assert continued(vocab, QWEN3, thought).prompt.endswith("<think>\nHm.\n</think>\n\nIt is")


def test_content_is_continued_with_thinking_off(vocab: Vocab) -> None:
    off = continued(vocab, QWEN3, BEGUN, enable_thinking=False)
    assert off.prompt.endswith("assistant\n<think>\n\n</think>\n\nIt is")


def test_reasoning_alone_is_continued_as_reasoning(vocab: Vocab) -> None:
    read = continued(vocab, QWEN3, {"role": "assistant", "content": "", "reasoning_content": "Let me"})
    assert read.prompt.endswith("<|im_start|>assistant\n<think>\nLet me")
    assert said(read, " see.\n</think>\n\nYes.") == ("Yes.", " see.")


def test_the_part_to_continue_can_be_said(vocab: Vocab) -> None:
    both = {**BEGUN, "reasoning_content": "Let me"}
    assert continued(vocab, QWEN3, both, "reasoning").prompt.endswith("<think>\nLet me")
    alone = {"role": "assistant", "content": "", "reasoning_content": "Let me"}
    assert continued(vocab, QWEN3, alone, "content").prompt.endswith("Let me\n</think>\n\n")


def test_what_cannot_be_continued_is_refused(vocab: Vocab) -> None:
    with pytest.raises(RequestError, match="two or more assistant messages"):
        turn(vocab, "", USER, BEGUN, BEGUN, options=ChatOptions(continuation="prefill"))
    with pytest.raises(RequestError, match="contains tool calls"):
        continued(vocab, "", CALLED, "prefill")


def test_the_models_options_hold_where_a_request_does_not_say(vocab: Vocab) -> None:
    settings = EngineOptions(
        template_kwargs={"enable_thinking": False}, reasoning_format="none", prefill_assistant=False
    )
    chats = Chats(QWEN3, "", vocab, settings)
    read = chats.turn([USER], {}, None)
    assert read.prompt.endswith("</think>\n\n")
    assert read.reply is None
    prefill = ChatOptions(continuation="prefill")
    assert "It is<|im_end|>" in chats.turn([USER, BEGUN], {}, prefill).prompt
    assert chats.turn([USER], {"enable_thinking": True}, ChatOptions(reasoning_format="auto")).reply is not None


def test_reasoning_cannot_be_continued_where_there_is_none(vocab: Vocab) -> None:
    with pytest.raises(RequestError, match="no reasoning to continue"):
        continued(vocab, "", {"role": "assistant", "content": "", "reasoning_content": "x"})


def test_the_arguments_of_a_broken_off_call_are_not_invented(vocab: Vocab) -> None:
    reply = turn(vocab, HERMES, USER, options=TOOLS).reply
    assert reply is not None
    (call,) = reply.feed('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa').calls
    assert reply.finish().calls == ()
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(call.arguments)
