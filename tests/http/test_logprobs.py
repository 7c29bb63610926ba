"""Log probabilities reach clients in their API's shape, from the real engine, whole and streamed."""

import math
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionTokenLogprob, ChatCompletionUserMessageParam

from live_front import LiveFront, sse_data
from llamaherd.http.logprobs import kept_probs, probs_json
from llamaherd.http.problems import Problem
from llamaherd.http.schema import MAX_PROBS, MAX_TOP_LOGPROBS, ChatBody, CompletionBody, NativeBody, parse
from llamaherd.pool import Completion, EngineOptions, ModelSpec, Timings, TokenProb, TokenProbs, Usage
from llamaherd.pool.sampling import LIMITS
from tiny_gguf import SCRIPT, SCRIPT_TEXT, tiny_model

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "hello"}]
PROMPT = "\n"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    options = EngineOptions(n_ctx=512, n_parallel=2, n_threads=1)
    with LiveFront(ModelSpec(name="tiny", path=tiny_model("scripted"), options=options)) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


@pytest.fixture
def official(front: LiveFront) -> Iterator[openai.OpenAI]:
    with front.openai() as api:
        yield api


def spelled(entries: list[ChatCompletionTokenLogprob]) -> str:
    return b"".join(bytes(entry.bytes or []) for entry in entries).decode().removesuffix("</s>")


def checked(entries: list[dict[str, Any]], shown: int) -> list[dict[str, Any]]:
    """Check that entries are what every API has in common, and return them."""
    for entry in entries:
        assert set(entry) == {"id", "token", "bytes", "logprob", "top_logprobs"}
        assert len(entry["top_logprobs"]) == shown
        for top in entry["top_logprobs"]:
            assert set(top) == {"id", "token", "bytes", "logprob"}
            assert bytes(top["bytes"]).decode(errors="ignore") == top["token"].replace("\ufffd", "")
            assert top["logprob"] <= 0
    return entries


# --- chats ---


def test_a_chat_tells_each_tokens_probability(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.message.content == SCRIPT_TEXT
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert spelled(entries) == SCRIPT_TEXT
    assert len(entries) == len(SCRIPT) + 1
    for entry in entries:
        assert [top.token for top in entry.top_logprobs][0] == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_a_streamed_chat_tells_the_same(official: openai.OpenAI) -> None:
    whole = official.chat.completions.create(model="tiny", messages=HELLO, temperature=0, logprobs=True, top_logprobs=1)
    stream = official.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, logprobs=True, top_logprobs=1, stream=True
    )
    entries: list[ChatCompletionTokenLogprob] = []
    with stream:
        for chunk in stream:
            logprobs = chunk.choices[0].logprobs
            entries.extend((logprobs.content or []) if logprobs is not None else [])
    assert whole.choices[0].logprobs is not None
    assert entries == whole.choices[0].logprobs.content


def test_the_clients_stream_helper_gathers_them(official: openai.OpenAI) -> None:
    with official.chat.completions.stream(
        model="tiny", messages=HELLO, temperature=0, logprobs=True, top_logprobs=0
    ) as stream:
        (choice,) = stream.get_final_completion().choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert spelled(entries) == SCRIPT_TEXT
    assert all(entry.top_logprobs == [] for entry in entries)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"logprobs": True}, 20),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": True, "top_logprobs": 3, "n_probs": 5}, 3),
        ({"n_probs": 5}, 5),
    ],
)
def test_a_chat_says_how_many_it_wants(client: httpx2.Client, fields: dict[str, Any], shown: int) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, **fields}
    for choice in client.post("/v1/chat/completions", json={**body, "n": 2}).json()["choices"]:
        assert checked(choice["logprobs"]["content"], shown)


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}, {"n_probs": 0}])
def test_a_chat_that_wants_none_gets_none(client: httpx2.Client, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, **fields}
    assert "logprobs" not in client.post("/v1/chat/completions", json=body).json()["choices"][0]
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        chunks = sse_data(response.iter_lines())
    assert not any("logprobs" in chunk["choices"][0] for chunk in chunks if chunk != "[DONE]")


# --- completions ---


def test_a_completion_tells_them_in_llama_servers_shape(client: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "logprobs": 3}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    whole = checked(choice["logprobs"]["content"], 3)
    assert b"".join(bytes(entry["bytes"]) for entry in whole).decode() == choice["text"] + "</s>"
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        choices = [chunk["choices"][0] for chunk in sse_data(response.iter_lines()) if chunk != "[DONE]"]
    assert [entry for one in choices if one["logprobs"] for entry in one["logprobs"]["content"]] == whole
    assert choices[-1]["logprobs"] is None


def test_the_official_client_reads_a_completion_with_them(official: openai.OpenAI) -> None:
    answer = official.completions.create(model="tiny", prompt=PROMPT, temperature=0, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.model_extra is not None
    assert len(logprobs.model_extra["content"]) == len(SCRIPT) + 1


# --- llama-server's own ---


def test_a_native_completion_tells_them(client: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "n_probs": 2, "return_tokens": True}
    answer = client.post("/completion", json=body).json()
    whole = checked(answer["completion_probabilities"], 2)
    assert [entry["id"] for entry in whole] == answer["tokens"]
    assert answer["generation_settings"]["n_probs"] == 2
    with client.stream("POST", "/completion", json={**body, "stream": True}) as response:
        *parts, last = sse_data(response.iter_lines())
    assert [entry for part in parts for entry in part["completion_probabilities"]] == whole
    assert "completion_probabilities" not in last


def test_a_native_completion_that_wants_none_gets_none(client: httpx2.Client) -> None:
    answer = client.post("/completion", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 1}).json()
    assert "completion_probabilities" not in answer


def test_the_tokens_of_a_stop_text_are_left_out(client: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "n_probs": 1, "stop": " GGUF n"}
    answer = client.post("/completion", json=body).json()
    assert answer["stopping_word"] == " GGUF n"
    entries = answer["completion_probabilities"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == answer["content"]


# --- without an engine ---


def one(piece: bytes, token: int = 0, logprob: float = -0.5) -> TokenProbs:
    return TokenProbs(TokenProb(token, logprob, piece))


def ended(word: str, *pieces: bytes) -> list[bytes]:
    """Return the tokens that are told of an answer of these, which a stop text has ended."""
    completion = Completion(
        text="",
        tokens=(),
        finish_reason="stop",
        usage=Usage(),
        timings=Timings(),
        stopping_word=word,
        probs=tuple(one(piece) for piece in pieces),
    )
    return [kept.chosen.piece for kept in kept_probs(completion)]


def test_what_belongs_to_the_stop_text_alone_is_dropped() -> None:
    assert ended("", b"a", b"b") == [b"a", b"b"]
    assert ended("b", b"a", b"b") == [b"a"]
    assert ended("bc", b"a", b"b", b"c") == [b"a"]
    assert ended("b", b"ab") == [b"ab"]
    assert ended("bc", b"ab", b"cd") == [b"ab"]
    assert ended("a", b"a") == []
    assert ended("ü", b"a", b"\xc3", b"\xbc") == [b"a"]
    assert ended("never said", b"a", b"b") == [b"a", b"b"]


@pytest.mark.parametrize(
    ("piece", "token"),
    [(b"ab", "ab"), (b"", ""), (b"\xf0\x9f", ""), (b"a\xc3", "a"), (b"\x9f\x98", "\ufffd\ufffd")],
)
def test_a_part_of_a_character_is_in_the_bytes_alone(piece: bytes, token: str) -> None:
    (entry,) = probs_json([one(piece, 7, -math.log(2))], 0)
    assert entry == {
        "id": 7,
        "token": token,
        "bytes": list(piece),
        "logprob": pytest.approx(-0.693147, abs=1e-6),
        "top_logprobs": [],
    }


def test_the_most_that_may_be_asked_for_is_what_the_pool_tells() -> None:
    assert LIMITS["n_probs"] == (0, MAX_PROBS)
    assert MAX_TOP_LOGPROBS <= MAX_PROBS


@pytest.mark.parametrize(
    ("fields", "shown", "asked"),
    [
        ({}, None, None),
        ({"logprobs": 0}, None, None),
        ({"logprobs": False}, None, None),
        ({"logprobs": True}, 1, 1),
        ({"logprobs": 5}, 5, 5),
        ({"logprobs": 5, "n_probs": 2}, 2, 2),
        ({"logprobs": 5, "n_probs": 0}, None, None),
    ],
)
def test_a_completion_has_two_names_for_how_many(fields: dict[str, Any], shown: int | None, asked: int | None) -> None:
    body = parse(fields, NativeBody)
    assert (body.shown_probs, body.to_params().get("n_probs")) == (shown, asked)


def test_a_chat_without_alternatives_still_asks_for_the_chosen_token() -> None:
    body = parse({"logprobs": True, "top_logprobs": 0}, ChatBody)
    assert (body.shown_probs, body.to_params().get("n_probs")) == (0, 1)


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (ChatBody, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (ChatBody, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (ChatBody, {"top_logprobs": 2}, "top_logprobs"),
        (ChatBody, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        (ChatBody, {"logprobs": 3}, "logprobs"),
        (CompletionBody, {"logprobs": 101}, "logprobs"),
        (CompletionBody, {"logprobs": -1}, "logprobs"),
        (CompletionBody, {"logprobs": "all"}, "logprobs"),
        (CompletionBody, {"n_probs": 1.5}, "n_probs"),
    ],
)
def test_a_wrong_number_of_them_is_refused_by_name(
    kind: type[ChatBody] | type[CompletionBody], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(Problem) as caught:
        parse(fields, kind).to_params()
    assert caught.value.kind == (400, "invalid_request_error")
    assert caught.value.param == param


# --- what the samplers have left ---

LEFT: dict[str, Any] = {"model": "tiny", "prompt": "ab", "n_probs": 4, "post_sampling_probs": True, "n_predict": 3}


def left(entries: list[dict[str, Any]]) -> None:
    assert len(entries) == 3
    for entry in entries:
        assert set(entry) == {"id", "token", "bytes", "prob", "top_probs"}
        assert 1 <= len(entry["top_probs"]) <= 2
        for top in entry["top_probs"]:
            assert set(top) == {"id", "token", "bytes", "prob"}
        assert sum(top["prob"] for top in entry["top_probs"]) == pytest.approx(1, abs=1e-4)


def test_what_the_samplers_have_left_is_told_as_probabilities(client: httpx2.Client) -> None:
    body = {**LEFT, "top_k": 2, "ignore_eos": True}
    left(client.post("/completion", json=body).json()["completion_probabilities"])
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    left(choice["logprobs"]["content"])
    with client.stream("POST", "/completion", json={**body, "stream": True}) as response:
        parts = sse_data(response.iter_lines())
    left([entry for part in parts for entry in part.get("completion_probabilities", [])])
    chat = {**body, "messages": HELLO, "logprobs": True, "top_logprobs": 4, "n_probs": None}
    left(client.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]["content"])


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_every_chunk_has_timings_if_that_is_asked_for(client: httpx2.Client, path: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "messages": HELLO, "stream": True, "temperature": 0}
    with client.stream("POST", path, json={**body, "timings_per_token": True}) as response:
        timed = [chunk for chunk in sse_data(response.iter_lines()) if chunk != "[DONE]" and "timings" in chunk]
    counts = [chunk["timings"]["predicted_n"] for chunk in timed]
    # The end is a token too, and has a chunk of its own where chunks have tokens.
    assert counts == sorted(counts)
    assert set(counts) == {*range(1, len(SCRIPT) + 2)}
    assert all(chunk["timings"]["prompt_n"] + chunk["timings"]["cache_n"] > 0 for chunk in timed)
    with client.stream("POST", path, json=body) as response:
        chunks = [chunk for chunk in sse_data(response.iter_lines()) if chunk != "[DONE]"]
    assert [chunk for chunk in chunks if "timings" in chunk] == chunks[-1:]


def test_a_line_with_too_few_blanks_ends_an_infill_like_an_answer(client: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "n_indent": 1, "t_max_predict_ms": 0}
    answer = client.post("/completion", json=body).json()
    assert (answer["content"], answer["stop_type"]) == (SCRIPT_TEXT, "eos")
    assert answer["generation_settings"]["n_indent"] == 1
