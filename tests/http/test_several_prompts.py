"""Several prompts in one request: an answer to each, in their order, whole and streamed, by both APIs."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from live_front import LiveFront, fake, sse_data
from llamaherd.http.schema import MAX_ANSWERS
from llamaherd.pool import EngineOptions, ModelSpec
from tiny_gguf import tiny_model

TEXT, NATIVE = "/v1/completions", "/completion"
REAL: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    options = EngineOptions(n_ctx=1024, n_threads=1, flash_attn="off", n_parallel=4)
    tiny = ModelSpec(name="tiny", path=tiny_model("random"), options=options)
    endless = fake("endless", pieces=("x ",), repeat=100_000)
    with LiveFront(fake("echo"), fake("failing", fail_at=1), endless, tiny) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def stream(client: httpx2.Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return sse_data(response.iter_lines())


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["one two", "three"], ["one two", "three"]),
        ([list(b"one two"), list(b"three")], ["one two", "three"]),
        (["one two", list(b"three")], ["one two", "three"]),
        ([[*b"one ", "two"], "three", {"prompt_string": "four"}], ["one two", "three", "four"]),
        # One prompt: a list with a number in it, a list of one, and an object.
        ([*b"one ", "two"], ["one two"]),
        (["one two"], ["one two"]),
        ({"prompt_string": "one two"}, ["one two"]),
    ],
)
def test_every_shape_of_prompts_is_understood(client: httpx2.Client, prompt: Any, texts: list[str]) -> None:
    choices = client.post(TEXT, json={"model": "echo", "prompt": prompt}).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == list(enumerate(texts))
    answer = client.post(NATIVE, json={"model": "echo", "prompt": prompt}).json()
    answers = answer if len(texts) > 1 else [answer]
    assert [(one["index"], one["content"]) for one in answers] == list(enumerate(texts))


def test_the_answers_to_one_prompt_follow_each_other(client: httpx2.Client) -> None:
    body = {"model": "echo", "prompt": ["one", "two two"], "n": 2}
    answer = client.post(TEXT, json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two two", "two two"]
    # Each prompt counts once, and every answer.
    assert answer["usage"]["prompt_tokens"] == 1 + 2
    assert answer["usage"]["completion_tokens"] == 2 * (1 + 2)
    assert "timings" not in answer
    natives = client.post(NATIVE, json=body).json()
    assert [(one["index"], one["prompt"], one["stop"]) for one in natives] == [
        (0, "one", True),
        (1, "one", True),
        (2, "two two", True),
        (3, "two two", True),
    ]


def test_a_prompt_of_tokens_is_not_shown_among_those_that_are(client: httpx2.Client) -> None:
    answers = client.post(NATIVE, json={"model": "echo", "prompt": ["one", list(b"two")]}).json()
    assert [one.get("prompt") for one in answers] == ["one", None]


def test_a_streamed_completion_names_the_answer_of_every_chunk(client: httpx2.Client) -> None:
    body = {"model": "echo", "prompt": ["one", "two two"], "stream_options": {"include_usage": True}}
    *chunks, usage, done = stream(client, TEXT, body)
    assert done == "[DONE]"
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "one", 1: "two two"}
    assert usage["usage"]["prompt_tokens"] == usage["usage"]["completion_tokens"] == 3


def test_a_native_stream_ends_each_answer_with_its_own_figures(client: httpx2.Client) -> None:
    parts = stream(client, NATIVE, {"model": "echo", "prompt": ["one", "two two"]})
    ends = {part["index"]: part for part in parts if part["stop"]}
    assert [(ends[at]["prompt"], ends[at]["tokens_predicted"]) for at in (0, 1)] == [("one", 1), ("two two", 2)]
    counts = [part["tokens_predicted"] for part in parts if part["index"] == 1 and not part["stop"]]
    assert counts == [1, 2]


@pytest.mark.parametrize("path", [TEXT, NATIVE])
def test_each_answer_is_that_of_its_prompt_alone(client: httpx2.Client, path: str) -> None:
    prompts = ["the cat", "a dog and", [270, 271, 272], "the cat sat"]
    key = "choices" if path == TEXT else None
    alone: list[Any] = []
    for prompt in prompts:
        answer = client.post(path, json={**REAL, "prompt": prompt, "cache_prompt": False}).json()
        alone.append(answer[key][0]["text"] if key else answer["content"])
    together = client.post(path, json={**REAL, "prompt": prompts}).json()
    assert ([one["text"] for one in together[key]] if key else [one["content"] for one in together]) == alone


@pytest.mark.parametrize("path", [TEXT, NATIVE])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", None]}, "prompt"),
        ({"prompt": ["a"] * (MAX_ANSWERS + 1)}, "prompt"),
        ({"prompt": ["a"] * (MAX_ANSWERS // 2 + 1), "n": 2}, "prompt"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(
    client: httpx2.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(path, json={"model": "echo", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", [TEXT, NATIVE])
def test_one_wrong_prompt_starts_none(front: LiveFront, client: httpx2.Client, path: str) -> None:
    response = client.post(path, json={"model": "endless", "prompt": ["a", [-1], "b"]})
    assert response.status_code == 400
    front.wait_for_requests("endless", 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_one_that_fails_ends_all(front: LiveFront, client: httpx2.Client, streamed: bool) -> None:
    response = client.post(NATIVE, json={"model": "failing", "prompt": ["a b", "c d"], "stream": streamed})
    assert "the script says that this request fails" in response.text
    front.wait_for_requests("failing", 0)
