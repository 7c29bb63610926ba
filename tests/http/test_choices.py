"""Several answers to one request: side by side, whole and streamed, and all or none."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from live_front import LiveFront, fake, say, sse_data
from llamaherd.http.choices import start_all
from llamaherd.http.schema import MAX_CHOICES, ChatBody, parse
from llamaherd.pool import BadRequest, Generation

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    endless = fake("endless", pieces=("x ",), repeat=100_000)
    with LiveFront(fake("echo"), endless, fake("failing", fail_at=1)) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def stream(client: httpx2.Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return sse_data(response.iter_lines())


def texts_of(chunks: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


@pytest.mark.parametrize("name", ["n", "n_cmpl"])
def test_a_chat_has_as_many_answers_as_were_asked_for(client: httpx2.Client, name: str) -> None:
    answer = client.post(CHAT, json=say("one two", model="echo", **{name: 3})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"one two"}
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["total_tokens"] == 8
    assert "timings" not in answer


def test_a_prompt_is_continued_in_several_ways(client: httpx2.Client) -> None:
    answer = client.post(TEXT, json={"model": "echo", "prompt": "one two", "n": 2}).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "one two"), (1, "one two")]


def test_a_streamed_chat_names_the_answer_of_every_chunk(client: httpx2.Client) -> None:
    body = say("one two", model="echo", n=3, stream_options={"include_usage": True})
    *chunks, usage, done = stream(client, CHAT, body)
    assert done == "[DONE]"
    assert texts_of(chunks) == {0: "one two", 1: "one two", 2: "one two"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(end["index"] for end in ends) == [0, 1, 2]
    openings = [chunk["choices"][0] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    assert sorted(opening["index"] for opening in openings) == [0, 1, 2]
    assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1


def test_a_streamed_completion_counts_all_its_answers_once(client: httpx2.Client) -> None:
    *chunks, done = stream(client, TEXT, {"model": "echo", "prompt": "one two", "n": 2})
    assert done == "[DONE]"
    assert texts_of(chunks) == {0: "one two", 1: "one two"}
    assert [chunk["usage"]["total_tokens"] for chunk in chunks if "usage" in chunk] == [6]
    assert "usage" in chunks[-1]


def test_every_answer_has_a_seed_of_its_own_that_is_known_beforehand() -> None:
    body = parse(say("x", seed=7), ChatBody)
    assert [body.to_params(index).get("seed") for index in range(3)] == [7, 8, 9]
    last = parse(say("x", seed=2**32 - 2), ChatBody)
    assert [last.to_params(index).get("seed") for index in range(2)] == [2**32 - 2, 0]
    drawn = parse(say("x", seed=-1), ChatBody)
    assert [drawn.to_params(index).get("seed") for index in range(2)] == [-1, -1]


@pytest.mark.parametrize(
    ("seed", "taken"), [(2**32, 0), (2**40 + 7, 7), (2**33 - 1, 0), (-2, 2**32 - 2), (-(2**32), 0)]
)
def test_a_seed_of_64_bits_is_folded_and_never_becomes_a_random_one(seed: int, taken: int) -> None:
    assert parse(say("x", seed=seed), ChatBody).to_params().get("seed") == taken


@pytest.mark.parametrize("count", [0, -1, MAX_CHOICES + 1, "2", 1.5])
@pytest.mark.parametrize("path", [CHAT, TEXT, "/completion"])
def test_how_many_is_bounded(client: httpx2.Client, path: str, count: Any) -> None:
    response = client.post(path, json=say("x", model="echo", prompt="x", n=count))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"


def test_the_native_api_gives_a_list(client: httpx2.Client) -> None:
    answers = client.post("/completion", json={"model": "echo", "prompt": "x y", "n_cmpl": 2}).json()
    assert [(answer["index"], answer["content"], answer["prompt"]) for answer in answers] == [
        (0, "x y", "x y"),
        (1, "x y", "x y"),
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_one_that_fails_ends_all(front: LiveFront, client: httpx2.Client, streamed: bool) -> None:
    response = client.post(CHAT, json=say("one two", model="failing", n=3, stream=streamed))
    assert "the script says that this request fails" in response.text
    front.wait_for_requests("failing", 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_frees_all_their_slots(front: LiveFront, streamed: bool) -> None:
    with front.raw(CHAT, say("x", model="endless", n=3, stream=streamed)):
        front.wait_for_requests("endless", 3)
    front.wait_for_requests("endless", 0)


def test_none_is_left_if_one_cannot_start() -> None:
    cancelled: list[int] = []

    async def main() -> None:
        def begin(index: int) -> Generation:
            if index == 2:
                raise BadRequest("no more")
            return Generation("m", lambda: cancelled.append(index))

        with pytest.raises(BadRequest):
            start_all(3, begin)

    asyncio.run(main())
    assert cancelled == [0, 1]
