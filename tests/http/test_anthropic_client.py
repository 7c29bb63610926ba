"""Anthropic's official client works unchanged: whole and streamed answers, its stream helper, counting, and errors."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import MessageParam, ToolParam

from live_front import DEADLINE, LiveFront, fake, sse_data

HELLO: list[MessageParam] = [{"role": "user", "content": "one two three"}]

#: A model that thinks, speaks and calls, with everything cut in unhandy places.
AGENT = (
    "<think>",
    "Hm",
    ".</think>",
    "Let me look.",
    "<tool_call>",
    '{"name": "look", "arguments": {"at"',
    ': "sky"}}',
    "</tool_call>",
)
TOOLS: list[ToolParam] = [
    {"name": "look", "description": "look at it", "input_schema": {"type": "object", "properties": {"at": {}}}}
]


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    models = (
        fake("echo"),
        fake("broken", load="fail"),
        fake("failing", fail_at=2),
        fake("agent", pieces=AGENT),
        fake("talker", pieces=("word ",), repeat=1_000_000, step_seconds=0.001),
    )
    with LiveFront(*models) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=front.url, api_key="none", max_retries=0, timeout=DEADLINE) as api:
        yield api


@pytest.fixture
def http(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as plain:
        yield plain


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_it_gets_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model="echo", max_tokens=100, messages=HELLO, system="be brief", extra_body={"temperature": 0.5, "top_k": 1}
    )
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "echo")
    assert text_of(message) == "one two three"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 3)
    assert message.usage.cache_read_input_tokens == 0


def test_it_is_told_of_the_limit(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="echo", max_tokens=2, messages=HELLO)
    assert text_of(message) == "one two"
    assert message.stop_reason == "max_tokens"


def test_an_answer_without_text_has_no_blocks(client: anthropic.Anthropic) -> None:
    assert client.messages.create(model="echo", max_tokens=0, messages=HELLO).content == []
    with client.messages.stream(model="echo", max_tokens=0, messages=HELLO) as stream:
        assert stream.get_final_message().content == []


def test_it_streams_events_in_anthropics_order(client: anthropic.Anthropic) -> None:
    with client.messages.create(model="echo", max_tokens=100, messages=HELLO, stream=True) as stream:
        events = list(stream)
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].type == "message_start"
    assert (events[0].message.usage.input_tokens, events[0].message.usage.output_tokens) == (3, 0)


def test_its_stream_helper_builds_the_whole_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="echo", max_tokens=100, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == "one two three"
        message = stream.get_final_message()
    assert text_of(message) == "one two three"
    assert message.stop_reason == "end_turn"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 3)


def test_it_gets_thoughts_and_calls(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="agent", max_tokens=100, messages=HELLO, tools=TOOLS)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    thinking, text, use = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking == "Hm."
    assert text.type == "text"
    assert text.text == "Let me look."
    assert use.type == "tool_use"
    assert (use.name, use.input) == ("look", {"at": "sky"})
    assert message.stop_reason == "tool_use"


def test_its_stream_helper_builds_thoughts_and_calls(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="agent", max_tokens=100, messages=HELLO, tools=TOOLS) as stream:
        events = list(stream)
        message = stream.get_final_message()
    starts = [event for event in events if event.type == "content_block_start"]
    stops = [event for event in events if event.type == "content_block_stop"]
    assert [event.index for event in starts] == [event.index for event in stops] == [0, 1, 2]
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[0].to_dict() == {"type": "thinking", "thinking": "Hm.", "signature": ""}
    use = message.content[2]
    assert use.type == "tool_use"
    assert use.input == {"at": "sky"}
    assert message.stop_reason == "tool_use"


def test_what_it_got_it_can_send_back_with_the_tools_answer(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="agent", max_tokens=100, messages=HELLO, tools=TOOLS)
    use = message.content[2]
    assert use.type == "tool_use"
    answer: list[MessageParam] = [
        *HELLO,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "it is blue"}]},
    ]
    assert text_of(client.messages.create(model="echo", max_tokens=100, messages=answer)) == "it is blue"


def test_a_call_that_broke_off_has_no_input(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="agent", max_tokens=6, messages=HELLO, tools=TOOLS)
    assert message.stop_reason == "max_tokens"
    assert [block.input for block in message.content if block.type == "tool_use"] in ([], [{}])


def test_events_carry_their_names(http: httpx2.Client) -> None:
    body = {"model": "echo", "max_tokens": 9, "messages": HELLO, "stream": True}
    lines = http.post("/v1/messages", json=body).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names == [data["type"] for data in sse_data(lines)]


def test_it_counts_tokens(client: anthropic.Anthropic) -> None:
    few = client.messages.count_tokens(model="echo", messages=HELLO)
    many = client.messages.count_tokens(model="echo", messages=HELLO, system="be brief")
    assert 0 < few.input_tokens < many.input_tokens


def test_it_sees_an_unknown_model_as_a_bad_request(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="model 'nobody' not found") as caught:
        client.messages.create(model="nobody", max_tokens=9, messages=HELLO)
    assert caught.value.body == {
        "type": "error",
        "error": {"code": 400, "message": "model 'nobody' not found", "type": "invalid_request_error"},
    }


def test_it_sees_a_failed_load_as_a_server_error(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.InternalServerError, match="broken"):
        client.messages.create(model="broken", max_tokens=9, messages=HELLO)


def test_it_sees_an_error_in_the_middle_of_a_stream(client: anthropic.Anthropic) -> None:
    with (
        client.messages.create(model="failing", max_tokens=9, messages=HELLO, stream=True) as stream,
        pytest.raises(anthropic.APIStatusError, match="fails"),
    ):
        assert list(stream)


def test_it_needs_the_key() -> None:
    from llamaherd.http.security import ApiKeys, Security

    with LiveFront(fake("echo"), security=Security(keys=ApiKeys(["secret"]))) as front:
        with anthropic.Anthropic(base_url=front.url, api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                stranger.messages.create(model="echo", max_tokens=9, messages=HELLO)
            body: Any = caught.value.body
            assert body["type"] == "error"
        with anthropic.Anthropic(base_url=front.url, api_key="secret", max_retries=0) as friend:
            assert text_of(friend.messages.create(model="echo", max_tokens=9, messages=HELLO)) == "one two three"


def test_closing_its_stream_stops_the_work(front: LiveFront, client: anthropic.Anthropic) -> None:
    stream = client.messages.create(model="talker", max_tokens=1_000_000, messages=HELLO, stream=True)
    assert next(iter(stream)).type == "message_start"
    assert front.held_by("talker") == 1
    stream.close()
    front.wait_for_requests("talker", 0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop_sequences": "end"}, "stop_sequences"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config"),
    ],
)
def test_bad_bodies_are_told_in_anthropics_shape(http: httpx2.Client, change: dict[str, object], field: str) -> None:
    body = {"model": "echo", "max_tokens": 9, "messages": HELLO, **change}
    response = http.post("/v1/messages", json=body)
    assert response.status_code == 400
    answer = response.json()
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"].get("param") == field
