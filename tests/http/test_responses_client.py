"""The official client's ``responses`` work unchanged: whole and streamed, its stream helper, counting, and errors."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import FunctionToolParam

from live_front import LiveFront, fake, sse_data

HELLO = "one two three"

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
TOOLS: list[FunctionToolParam] = [
    {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {}}}, "strict": False}
]


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    with LiveFront(
        fake("echo"), fake("broken", load="fail"), fake("failing", fail_at=2), fake("agent", pieces=AGENT)
    ) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[openai.OpenAI]:
    with front.openai() as api:
        yield api


@pytest.fixture
def http(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as plain:
        yield plain


def test_it_gets_a_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="echo", input=HELLO, temperature=0.5, metadata={"who": "me"})
    assert answer.id.startswith("resp_")
    assert answer.output_text == "one two three"
    assert answer.status == "completed"
    assert answer.metadata == {"who": "me"}
    (item,) = answer.output
    assert item.type == "message"
    assert item.id.startswith("msg_")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.usage.input_tokens_details.cached_tokens == 0


def test_a_response_that_reached_its_limit_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="echo", input=HELLO, max_output_tokens=2)
    assert answer.output_text == "one two"
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_it_streams_events_in_openais_order(client: openai.OpenAI) -> None:
    with client.responses.create(model="echo", input=HELLO, stream=True) as stream:
        events = list(stream)
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "one two three"
    items = {event.item_id for event in events if event.type == "response.output_text.delta"}
    assert items == {last.response.output[0].id}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("limit", "statuses"),
    [
        (2, {"reasoning": "incomplete"}),
        (4, {"reasoning": "completed", "message": "incomplete"}),
        (6, {"reasoning": "completed", "message": "completed", "function_call": "incomplete"}),
        (7, {"reasoning": "completed", "message": "completed", "function_call": "completed"}),
    ],
)
def test_what_the_limit_cut_is_incomplete(
    http: httpx2.Client, streamed: bool, limit: int, statuses: dict[str, str]
) -> None:
    wanted = {"model": "agent", "input": HELLO, "tools": TOOLS, "max_output_tokens": limit}
    if streamed:
        with http.stream("POST", "/v1/responses", json={**wanted, "stream": True}) as response:
            events = sse_data(response.iter_lines())
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert {item["type"]: item["status"] for item in done} == statuses
        assert events[-1]["type"] == "response.incomplete"
        answer = events[-1]["response"]
    else:
        answer = http.post("/v1/responses", json=wanted).json()
    assert answer["status"] == "incomplete"
    assert {item["type"]: item["status"] for item in answer["output"]} == statuses


def test_a_stream_that_reached_its_limit_ends_incomplete(client: openai.OpenAI) -> None:
    with client.responses.create(model="echo", input=HELLO, stream=True, max_output_tokens=1) as stream:
        *_, last = stream
    assert last.type == "response.incomplete"
    assert last.response.output_text == "one"


def test_its_stream_helper_builds_the_whole_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="echo", input=HELLO) as stream:
        answer = stream.get_final_response()
    assert answer.output_text == "one two three"


def test_events_carry_their_names_and_timings(http: httpx2.Client) -> None:
    body = {"model": "echo", "input": HELLO, "stream": True}
    lines = http.post("/v1/responses", json=body).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = sse_data(lines)
    assert names == [one["type"] for one in data]
    assert data[-1]["timings"]["predicted_n"] == 3


def test_a_stream_tells_how_far_the_prompt_is(http: httpx2.Client) -> None:
    body = {"model": "echo", "input": HELLO, "stream": True, "return_progress": True, "instructions": "long " * 100}
    data = sse_data(http.post("/v1/responses", json=body).text.splitlines())
    told = [one for one in data if "prompt_progress" in one]
    assert told
    shown = {"id": data[0]["response"]["id"], "object": "response", "status": "in_progress"}
    assert [one["response"] for one in told] == [shown] * len(told), "not what was asked, all over again"
    assert {one["type"] for one in told} == {"response.in_progress"}
    assert told[-1]["prompt_progress"]["processed"] == told[-1]["prompt_progress"]["total"] == 3


def test_an_empty_answer_has_no_items(client: openai.OpenAI) -> None:
    assert client.responses.create(model="echo", input=HELLO, max_output_tokens=0).output == []


def test_conversations_and_instructions_are_understood(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="echo",
        instructions="be brief",
        input=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": [{"type": "input_text", "text": "one two"}]},
        ],
    )
    assert answer.output_text == "one two"
    assert answer.instructions == "be brief"


def test_it_gets_reasoning_and_calls(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="agent", input=HELLO, tools=TOOLS)
    reasoning, message, call = answer.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "Hm."
    assert message.type == "message"
    assert answer.output_text == "Let me look."
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("look", {"at": "sky"})


def test_its_stream_helper_builds_reasoning_and_calls(client: openai.OpenAI) -> None:
    with client.responses.stream(model="agent", input=HELLO, tools=TOOLS) as stream:
        events = list(stream)
        answer = stream.get_final_response()
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert [event.output_index for event in events if event.type == "response.output_item.added"] == [0, 1, 2]
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1, 2]
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "Hm."
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments) == {"at": "sky"}
    call = answer.output[2]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"at": "sky"}


def test_what_it_got_it_can_send_back_with_the_functions_answer(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="agent", input=HELLO, tools=TOOLS)
    call = answer.output[2]
    assert call.type == "function_call"
    conversation: Any = [
        {"role": "user", "content": HELLO},
        *(item.to_dict() for item in answer.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "it is blue"},
    ]
    assert client.responses.create(model="echo", input=conversation).output_text == "it is blue"


def test_it_counts_tokens(client: openai.OpenAI) -> None:
    few = client.responses.input_tokens.count(model="echo", input="hi")
    many = client.responses.input_tokens.count(model="echo", input="hi", instructions="be brief")
    assert few.object == "response.input_tokens"
    assert 0 < few.input_tokens < many.input_tokens


def test_a_chats_tokens_are_counted(http: httpx2.Client) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"):
        assert http.post(path, json=body).json() == {"object": "response.input_tokens", "input_tokens": 9}


def test_it_sees_an_error_in_the_middle_of_a_stream(client: openai.OpenAI) -> None:
    with (
        client.responses.create(model="failing", input=HELLO, stream=True) as stream,
        pytest.raises(openai.APIError, match="fails"),
    ):
        assert list(stream)


def test_it_sees_a_failed_load_as_a_server_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="broken"):
        client.responses.create(model="broken", input=HELLO)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input": None}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "robot", "content": "hi"}]}, "input[0].role"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": "all"}}, "tool_choice"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"text": {"format": "xml"}}, "text.format"),
    ],
)
def test_bad_bodies_are_refused_by_the_field(http: httpx2.Client, change: dict[str, Any], field: str) -> None:
    response = http.post("/v1/responses", json={"model": "echo", "input": HELLO, **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
