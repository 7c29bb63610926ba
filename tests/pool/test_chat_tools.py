"""Tools and reasoning through the pool: pieces tell them apart, and whole answers have them whole."""

from typing import Any

import pytest

from herding import fake, run
from llamaherd.pool import BadRequest, Pool, SyncPool, ToolCall

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "Weather in Paris?"}]
SAID: tuple[str, ...] = (
    *("<think>", "Hm.", "</think>\n\n", "Sure.\n", "<tool_call>", '{"name": "get_weather", "argu', 'ments": {"city": '),
    *('"Paris"}}', "\n</tool_call>"),
)
ARGUMENTS = '{"city": "Paris"}'


def test_pieces_tell_reasoning_text_and_calls_apart() -> None:
    async def scene() -> None:
        async with Pool([fake("m", pieces=SAID)]) as pool:
            pieces = [piece async for piece in pool.chat("m", MESSAGES, tools=[TOOL])]
        assert [piece.reasoning for piece in pieces if piece.reasoning] == ["Hm."]
        assert [piece.text for piece in pieces if piece.text] == ["Sure."]
        deltas = [delta for piece in pieces for delta in piece.calls]
        assert deltas[0].name == "get_weather"
        assert deltas[0].id
        assert len(deltas) > 1, "arguments come as they are written"
        assert "".join(delta.arguments for delta in deltas) == ARGUMENTS
        assert pieces[-1].finish_reason == "tool_calls"

    run(scene())


def test_a_whole_answer_has_its_calls_whole() -> None:
    with SyncPool([fake("m", pieces=SAID)]) as pool:
        answer = pool.chat("m", MESSAGES, tools=[TOOL]).collect()
    (call,) = answer.tool_calls
    assert call == ToolCall(id=call.id, name="get_weather", arguments=ARGUMENTS)
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("Hm.", "Sure.", "tool_calls")


def test_without_tools_a_call_is_text() -> None:
    with SyncPool([fake("m", pieces=SAID[4:])]) as pool:
        answer = pool.chat("m", MESSAGES).collect()
    assert answer.tool_calls == ()
    assert answer.text == "".join(SAID[4:])
    assert answer.finish_reason == "stop"


def test_a_wrong_tool_is_refused_before_anything_starts() -> None:
    with SyncPool([fake("m")]) as pool, pytest.raises(BadRequest, match=r"tools\[0\]"):
        pool.chat("m", MESSAGES, tools=[{"type": "function"}])
