"""The official client works unchanged, blocking and async, streamed and not, and sees errors as what they are."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from live_front import DEADLINE, LiveFront, fake

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    models = (fake("echo"), fake("broken", load="fail"), fake("failing", fail_at=2), fake("dying", crash_at=1))
    with LiveFront(*models, fake("some/one:Q4_0")) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[openai.OpenAI]:
    with front.openai() as api:
        yield api


def test_it_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=HELLO, temperature=0, seed=1, top_p=0.5)
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_it_retrieves_a_model_by_its_name(client: openai.OpenAI) -> None:
    for name in ("echo", "some/one:Q4_0"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="model is not found"):
        client.models.retrieve("nobody")


def test_it_chats_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    with stream:
        chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == "one two three"
    assert choices[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_its_stream_helper_builds_the_whole_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="echo", messages=HELLO) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "one two three"


def test_it_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="one two three", max_tokens=2)
    assert answer.choices[0].text == "one two"
    assert answer.choices[0].finish_reason == "length"


def test_it_completes_in_a_stream(client: openai.OpenAI) -> None:
    with client.completions.create(model="echo", prompt="one two three", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "one two three"


def test_it_completes_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=["one two", "three"], n=2)
    assert [choice.text for choice in answer.choices] == ["one two", "one two", "three", "three"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.total_tokens == 3 + 6


def test_it_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()][0] == "echo"


def test_it_sees_an_unknown_model_as_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="model 'nobody' not found"):
        client.chat.completions.create(model="nobody", messages=HELLO)


def test_it_sees_an_unsupported_field_as_a_bad_request_that_names_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=HELLO, functions=[{"name": "f"}])
    assert caught.value.param == "functions"
    assert caught.value.type == "not_supported_error"


def test_it_sees_a_failed_load_as_a_server_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="broken"):
        client.chat.completions.create(model="broken", messages=HELLO)


def test_it_sees_an_error_in_the_middle_of_a_stream(client: openai.OpenAI) -> None:
    texts: list[str] = []
    with (
        client.chat.completions.create(model="failing", messages=HELLO, stream=True) as stream,
        pytest.raises(openai.APIError, match="fails"),
    ):
        texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)


def test_closing_its_stream_stops_the_work(front: LiveFront) -> None:
    talker = fake("talker", pieces=("word ",), repeat=1_000_000, step_seconds=0.001)
    with LiveFront(talker) as other, other.openai() as client:
        stream = client.chat.completions.create(model="talker", messages=HELLO, stream=True)
        next(iter(stream))
        assert other.held_by("talker") == 1
        stream.close()
        other.wait_for_requests("talker", 0)


def test_the_async_client_makes_many_requests_at_once(front: LiveFront) -> None:
    async def one(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": text}], stream=True
        )
        async with stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE)
        async with client:
            return await asyncio.gather(*(one(client, f"request number {number}") for number in range(16)))

    assert asyncio.run(main()) == [f"request number {number}" for number in range(16)]
