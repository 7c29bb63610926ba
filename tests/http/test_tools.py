"""Tool calls and reasoning, the whole way: a real engine says them, and the official client understands."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from chat_templates import (
    ALWAYS_THINKS,
    COMMAND_R,
    DEEPSEEK,
    GEMMA4,
    GEMMA_PLAIN,
    HARMONY,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NEW,
    QWEN3,
    QWEN_CODER,
)
from live_front import DEADLINE, LiveFront, fake, say, sse_data
from llamaherd.pool import EngineOptions, ModelSpec
from tiny_gguf import write_scripted_llama

pytestmark = pytest.mark.timeout(120)

WEATHER: Final[ChatCompletionToolParam] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": "Weather in Paris?"}]


class Family(NamedTuple):
    """A model that says one thing. ``after``: the token that its template ends a prompt with, if not a newline."""

    template: str
    script: tuple[str, ...]
    controls: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    content: str = ""
    reasoning: str = ""


_JSON: Final = ('{"name":', '▁"get_weather",', '▁"arguments":', '▁{"city":', '▁"Paris"}}')
#: Every one of them calls ``get_weather`` for Paris.
FAMILIES: Final = {
    "hermes": Family(HERMES, ("Sure.\n", "<tool_call>", *_JSON, "</tool_call>"), content="Sure."),
    "hermes-control": Family(HERMES, ("<tool_call>", *_JSON, "</tool_call>"), ("<tool_call>", "</tool_call>")),
    "qwen3": Family(
        QWEN3, ("<think>", "Hm.\n", "</think>", "\n\n", "<tool_call>", *_JSON, "</tool_call>"), reasoning="Hm."
    ),
    "qwen-coder": Family(
        QWEN_CODER,
        (
            "<tool_call>",
            "\n<function=get_weather>\n<param",
            "eter=city>\nPar",
            "is\n</parameter>\n</function>\n",
            "</tool_call>",
        ),
    ),
    "llama3": Family(LLAMA3, ('{"name":', '▁"get_weather",', '▁"parameters":', '▁{"city":', '▁"Paris"}}')),
    "llama3-tag": Family(
        LLAMA3,
        ("<|python_tag|>", '{"name":', '▁"get_weather",', '▁"parameters":', '▁{"city":', '▁"Paris"}}'),
        ("<|python_tag|>",),
    ),
    "mistral": Family(
        MISTRAL,
        ("[TOOL_CALLS]", "[", *_JSON[:-1], '▁"Paris"},', '▁"id":▁"abcdefghi"}]'),
        ("[TOOL_CALLS]", "[INST]", "[/INST]"),
        ("[/INST]",),
    ),
    "mistral-new": Family(
        MISTRAL_NEW,
        ("Right.", "[TOOL_CALLS]", "get_weather", "[ARGS]", '{"city":', '▁"Paris"}'),
        ("[TOOL_CALLS]", "[ARGS]", "[INST]", "[/INST]"),
        ("[/INST]",),
        content="Right.",
    ),
    "gemma4": Family(
        GEMMA4,
        ("<|tool_call>", "call:get_weather{city:", '<|"|>', "Paris", '<|"|>}', "<tool_call|>"),
        ("<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    "gemma": Family(GEMMA_PLAIN, ("```json\n", '{"tool_call":▁', *_JSON, "}", "\n```")),
    "command-r": Family(
        COMMAND_R,
        (
            "<|START_THINKING|>",
            "Hm.",
            "<|END_THINKING|>",
            "<|START_ACTION|>",
            '[\n{"tool_call_id":▁"0",▁"tool_name":▁"get_weather",',
            '▁"parameters":▁{"city":▁"Par',
            'is"}}\n]',
            "<|END_ACTION|>",
        ),
        ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>"),
        reasoning="Hm.",
    ),
    "gpt-oss": Family(
        HARMONY,
        ("▁to=functions.get_weather", "<|channel|>", "commentary▁json", "<|message|>", '{"city":', '▁"Paris"}'),
        ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>"),
        ("t",),
    ),
    "deepseek": Family(
        DEEPSEEK,
        (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "get_weather",
            "<｜tool▁sep｜>",
            '{"city":▁"Paris"}',
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
            "</think>",
        ),
        ("</think>",),
    ),
}


def a_model(folder: Path, name: str, family: Family) -> ModelSpec:
    path = folder / f"{name}.gguf"
    write_scripted_llama(
        path, script=family.script, template=family.template, controls=family.controls, after=family.after
    )
    return ModelSpec(name=name, path=path, options=EngineOptions(n_ctx=1024, n_parallel=2, n_threads=1))


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    with tempfile.TemporaryDirectory() as folder:
        models = [a_model(Path(folder), name, family) for name, family in FAMILIES.items()]
        thoughts = ("Hm.", "▁Yes.\n", "</think>", "Paris.")
        models.append(a_model(Path(folder), "thinker", Family(ALWAYS_THINKS, thoughts)))
        person = ('{"name":', '▁"Anna",', '▁"age":', "▁7", "}")
        for name, template in (("person", HERMES), ("person-llama3", LLAMA3), ("person-gemma", GEMMA_PLAIN)):
            models.append(a_model(Path(folder), name, Family(template, person)))
        models.append(a_model(Path(folder), "stopped", Family(ALWAYS_THINKS, thoughts, ("</think>",))))
        models.append(
            fake("fake", pieces=["<think>", "Hm.</think>", '<tool_call>{"name": "get_weather"}', "</tool_call>"])
        )
        with LiveFront(*models, models_max=2) as live:
            yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[openai.OpenAI]:
    with front.openai() as api:
        yield api


@pytest.mark.parametrize("name", FAMILIES)
def test_the_client_understands_every_family(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=QUESTION, tools=[WEATHER], temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert call.id
    assert (choice.message.content or "") == FAMILIES[name].content
    assert (choice.message.model_extra or {}).get("reasoning_content", "") == FAMILIES[name].reasoning


@pytest.mark.parametrize("name", FAMILIES)
def test_the_clients_stream_helper_builds_the_same(client: openai.OpenAI, name: str) -> None:
    with client.chat.completions.stream(model=name, messages=QUESTION, tools=[WEATHER], temperature=0) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert "tool_calls.function.arguments.delta" in kinds
    assert (choice.message.content or "") == FAMILIES[name].content


def test_the_first_delta_of_a_call_has_its_name_and_the_others_arguments_alone(front: LiveFront) -> None:
    body = {"model": "hermes", "messages": QUESTION, "tools": [WEATHER], "temperature": 0, "stream": True}
    with front.client() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        chunks = sse_data(answer.iter_lines())[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert deltas[1] == {"content": "Sure."}
    first, *others = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert first["index"] == 0
    assert first["type"] == "function"
    assert first["function"]["name"] == "get_weather"
    assert all(other.keys() == {"index", "function"} for other in others)
    assert first["function"]["arguments"] + "".join(other["function"]["arguments"] for other in others) == (
        '{"city": "Paris"}'
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_conversation_goes_on_after_a_call(client: openai.OpenAI) -> None:
    for name in ("hermes", "mistral", "gemma"):
        answer = client.chat.completions.create(model=name, messages=QUESTION, tools=[WEATHER], temperature=0)
        message = answer.choices[0].message
        assert message.tool_calls is not None
        history: list[Any] = [
            *QUESTION,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
        ]
        again = client.chat.completions.create(
            model=name, messages=history, tools=[WEATHER], temperature=0, max_tokens=1
        )
        assert again.usage is not None
        assert answer.usage is not None
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_without_leave_to_call_the_text_is_content(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="llama3", messages=QUESTION, tools=[WEATHER], tool_choice="none", temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == '{"name": "get_weather", "parameters": {"city": "Paris"}}'


def test_a_call_that_breaks_off_ends_for_its_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="hermes", messages=QUESTION, tools=[WEATHER], temperature=0, max_tokens=6
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.arguments == '{"city":'


def test_reasoning_that_the_prompt_opens_is_told_apart(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model="thinker", messages=QUESTION, temperature=0).choices[0].message
    assert message.content == "Paris."
    assert (message.model_extra or {})["reasoning_content"] == "Hm. Yes."


def test_reasoning_comes_first_in_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="thinker", messages=QUESTION, temperature=0, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    thoughts = [(delta.model_extra or {}).get("reasoning_content") for delta in deltas]
    assert "".join(filter(None, thoughts)) == "Hm. Yes."
    assert "".join(delta.content or "" for delta in deltas) == "Paris."
    assert [bool(thought) for thought in thoughts].index(True) < [bool(delta.content) for delta in deltas].index(True)


def test_reasoning_can_be_left_in_the_content(client: openai.OpenAI) -> None:
    message = (
        client.chat.completions.create(
            model="thinker", messages=QUESTION, temperature=0, extra_body={"reasoning_format": "none"}
        )
        .choices[0]
        .message
    )
    assert message.content == "Hm. Yes.\n</think>Paris."
    assert message.model_extra == {}


def test_the_scripted_engine_speaks_it_too(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model="fake", messages=QUESTION, tools=[WEATHER]).choices[0].message
    assert message.tool_calls is not None
    call = message.tool_calls[0]
    assert call.type == "function"
    assert call.function.arguments == "{}"
    assert (message.model_extra or {})["reasoning_content"] == "Hm."


# --- tools and a format -----------------------------------------------------------------------------------------------


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


class Person(BaseModel):
    """What an answer shall be."""

    name: str
    age: int


#: Their scripts write calls in another way than a grammar of the whole answer has them.
_OTHERWISE: Final = ("gemma", "gemma4", "llama3-tag")
STRICT: Final = [name for name, family in FAMILIES.items() if not family.content and name not in _OTHERWISE]


@pytest.mark.parametrize("name", STRICT)
def test_beside_a_format_a_model_still_calls(client: openai.OpenAI, name: str) -> None:
    weather = openai.pydantic_function_tool(GetWeather, name="get_weather")
    answer = client.chat.completions.parse(
        model=name, messages=QUESTION, tools=[weather], response_format=Person, temperature=0
    )
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.parsed) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Paris")


@pytest.mark.parametrize("name", ["person", "person-llama3", "person-gemma"])
def test_beside_tools_a_model_still_answers_in_the_format(client: openai.OpenAI, name: str) -> None:
    weather = openai.pydantic_function_tool(GetWeather, name="get_weather")
    parsed = client.chat.completions.parse(
        model=name, messages=QUESTION, tools=[weather], response_format=Person, temperature=0
    ).choices[0]
    assert (parsed.finish_reason, parsed.message.parsed) == ("stop", Person(name="Anna", age=7))
    with client.chat.completions.stream(
        model=name, messages=QUESTION, tools=[weather], response_format=Person, temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Anna", age=7)
    assert kinds.count("content.delta") > 2, "it comes as it is written"
    assert not any(kind.startswith("tool_calls") for kind in kinds)


def test_the_other_routes_know_both_too(front: LiveFront, client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="person",
        input="Who?",
        tools=[openai.pydantic_function_tool(GetWeather, name="get_weather")["function"] | {"type": "function"}],  # type: ignore[list-item]
        text_format=Person,
        temperature=0,
    )
    assert response.output_parsed == Person(name="Anna", age=7)
    body = {
        "model": "person",
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 100,
        "temperature": 0,
        "tools": [{"name": "get_weather", "input_schema": GetWeather.model_json_schema()}],
        "output_config": {"format": {"type": "json_schema", "schema": Person.model_json_schema()}},
    }
    answer = httpx2.post(f"{front.url}/v1/messages", json=body, timeout=DEADLINE).json()
    assert answer["stop_reason"] == "end_turn"
    assert json.loads(answer["content"][0]["text"]) == {"name": "Anna", "age": 7}
    answer = httpx2.post(f"{front.url}/v1/messages", json=body | {"model": "hermes-control"}, timeout=DEADLINE).json()
    assert (answer["stop_reason"], answer["content"][0]["input"]) == ("tool_use", {"city": "Paris"})


# --- bad input --------------------------------------------------------------------------------------------------------

_TOOL: Final[dict[str, Any]] = {"type": "function", "function": {"name": "f"}}
BAD: Final[list[dict[str, Any]]] = [
    {"tools": "all"},
    {"tools": {"type": "function"}},
    {"tools": [1]},
    {"tools": [{"type": "retrieval"}]},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {}}]},
    {"tools": [{"type": "function", "function": {"name": ""}}]},
    {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "description": 1}}]},
    {"tools": [_TOOL, _TOOL]},
    {"tool_choice": "required"},
    {"tools": [_TOOL], "tool_choice": "any"},
    {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    {"tools": [_TOOL], "tool_choice": {}},
    {"tools": [_TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
    {"tools": [_TOOL], "parallel_tool_calls": "yes"},
    {"reasoning_format": "loud"},
    {"chat_template_kwargs": {"enable_thinking": "false"}},
    {"continue_final_message": "all"},
    {"continue_final_message": True},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "assistant"}]},
    {"messages": [{"role": "user", "content": "x", "reasoning_content": 1}]},
    {"messages": [{"role": "assistant", "tool_calls": "f"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}, _TOOL]},
    {"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [{"role": "assistant", "content": "a"}],
        "add_generation_prompt": True,
        "continue_final_message": True,
    },
]


@pytest.mark.parametrize("more", BAD, ids=json.dumps)
def test_nonsense_is_the_callers_error(front: LiveFront, more: dict[str, Any]) -> None:
    answer = httpx2.post(f"{front.url}/v1/chat/completions", json=say("x", model="hermes") | more, timeout=DEADLINE)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_prompt_can_be_seen_with_its_tools(front: LiveFront) -> None:
    body = say("Weather?", model="hermes", tools=[WEATHER])
    prompt = httpx2.post(f"{front.url}/apply-template", params={"autoload": "1"}, json=body, timeout=DEADLINE).json()[
        "prompt"
    ]
    assert '"name": "get_weather"' in prompt


@pytest.mark.parametrize("name", ["reasoning_budget_tokens", "thinking_budget_tokens"])
def test_thinking_has_a_budget(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(
        model="stopped", messages=QUESTION, temperature=0, extra_body={name: 1, "reasoning_budget_message": "."}
    )
    message = answer.choices[0].message
    assert (message.content, message.to_dict()["reasoning_content"]) == ("Paris.", "Hm..")


def test_of_two_names_for_the_budget_the_first_takes_precedence(client: openai.OpenAI) -> None:
    both = {"reasoning_budget_tokens": 0, "thinking_budget_tokens": 1}
    answer = client.chat.completions.create(model="stopped", messages=QUESTION, temperature=0, extra_body=both)
    assert "reasoning_content" not in answer.choices[0].message.to_dict()


def test_effort_none_is_thinking_off(front: LiveFront) -> None:
    body = say("Weather?", model="qwen3", reasoning_effort="none")
    prompt = httpx2.post(f"{front.url}/apply-template", params={"autoload": "1"}, json=body, timeout=DEADLINE).json()[
        "prompt"
    ]
    assert prompt.endswith("<think>\n\n</think>\n\n")
