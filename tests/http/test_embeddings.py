"""Embeddings, scores and infills over real sockets: the openai client, and the shapes of llama-server, Jina and TEI."""

import json
import math
import socket
from base64 import b64decode
from collections.abc import Iterator
from struct import unpack
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec
import pytest
from openai import APIStatusError, BadRequestError, OpenAI

from live_front import DEADLINE, LiveFront, fake
from llamaherd.http.parts import PART_BYTES
from llamaherd.http.problems import Problem
from llamaherd.http.prompts import prompts_of
from llamaherd.pool import EngineOptions, ModelSpec
from tiny_gguf import tiny_model

SHORT: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "flash_attn": "off"}
CAT = {"model": "bert", "input": "cat"}


def tiny(name: str, model: str = "", **options: Any) -> ModelSpec:
    return ModelSpec(name=name, path=tiny_model(model or name), options=EngineOptions(**{**SHORT, **options}))


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    models = (
        tiny("bert"),
        tiny("rank"),
        tiny("random"),
        tiny("mean", "random-mean"),
        tiny("only", "random-last", embedding=True, embd_normalize=-1),
        tiny("infill", "random-infill"),
        fake("fake"),
    )
    with LiveFront(*models, models_max=len(models)) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


@pytest.fixture
def openai(front: LiveFront) -> Iterator[OpenAI]:
    with OpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def refused(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == status
    return error


# --- OpenAI's shape ---


def test_the_openai_client_gets_unit_vectors_which_it_asks_for_in_base64(openai: OpenAI) -> None:
    result = openai.embeddings.create(model="bert", input=["hello world", "cat", "hello world"])
    assert [item.index for item in result.data] == [0, 1, 2]
    assert math.dist(result.data[0].embedding, result.data[2].embedding) < 1e-5
    assert math.dist(result.data[0].embedding, result.data[1].embedding) > 0.1
    assert math.hypot(*result.data[0].embedding) == pytest.approx(1.0, abs=1e-5)
    assert result.usage.prompt_tokens == result.usage.total_tokens > 0
    floats = openai.embeddings.create(model="bert", input="cat", encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(result.data[1].embedding, abs=1e-5)
    cut = openai.embeddings.create(model="bert", input="cat", dimensions=8)
    assert math.hypot(*cut.data[0].embedding) == pytest.approx(1.0, abs=1e-5)
    assert len(cut.data[0].embedding) == 8


def test_the_answer_is_llama_servers_field_for_field(client: httpx2.Client) -> None:
    answer = client.post("/v1/embeddings", json=CAT).json()
    vector = answer["data"][0].pop("embedding")
    assert len(vector) == 64
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    assert answer == {
        "model": "bert",
        "object": "list",
        "usage": usage,
        "data": [{"index": 0, "object": "embedding"}],
    }
    (item,) = client.post("/v1/embeddings", json={**CAT, "encoding_format": "base64"}).json()["data"]
    assert list(unpack("<64f", b64decode(item.pop("embedding")))) == vector
    assert item == {"index": 0, "object": "embedding", "encoding_format": "base64"}


def test_a_generative_model_embeds_too_and_an_embedding_model_need_not_generate(
    client: httpx2.Client, openai: OpenAI
) -> None:
    assert len(openai.embeddings.create(model="mean", input="cat").data[0].embedding) == 64
    assert client.post("/completion", json={"model": "mean", "prompt": "a", "n_predict": 2}).status_code == 200
    assert math.hypot(*openai.embeddings.create(model="only", input="cat").data[0].embedding) > 1.5
    error = refused(client.post("/completion", json={"model": "only", "prompt": "a"}), 501)
    assert error["type"] == "not_supported_error" and "--embedding" in error["message"]
    error = refused(
        client.post("/v1/chat/completions", json={"model": "bert", "messages": [{"role": "user", "content": "x"}]}), 501
    )
    assert "cannot generate" in error["message"]


def test_a_model_without_pooling_gives_token_vectors_in_llama_servers_shape_only(client: httpx2.Client) -> None:
    error = refused(client.post("/v1/embeddings", json={"model": "random", "input": "cat"}))
    assert error["type"] == "invalid_request_error" and "--pooling" in error["message"]
    (item,) = client.post("/embeddings", json={"model": "random", "input": "cat"}).json()
    assert item["index"] == 0
    assert [len(row) for row in item["embedding"]] == [64, 64, 64]


@pytest.mark.parametrize("path", ["/embedding", "/embeddings", "/v1/embeddings"])
def test_llama_servers_own_shape(client: httpx2.Client, path: str) -> None:
    answer = client.post(path, json={"model": "bert", "content": ["cat", "dog"]}).json()
    assert [item["index"] for item in answer] == [0, 1]
    assert [[len(row) for row in item["embedding"]] for item in answer] == [[64], [64]]
    plain = client.post(path, json={"model": "bert", "content": "cat", "embd_normalize": -1}).json()
    assert math.hypot(*plain[0]["embedding"][0]) > 1.5


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("", 1),
        ("cat", 1),
        ([12, 34, 56], 1),
        ([12, 34, "cat", 56], 1),
        (["cat", "dog"], 2),
        (["cat", [12, 34, 56]], 2),
        ([[12, 34, 56], [12, "cat", 34]], 2),
        ({"prompt_string": "cat"}, 1),
        ({"content": [{"type": "text", "text": "cat"}]}, 1),
        (["cat", {"prompt_string": "dog"}, {"content": [{"type": "text", "text": "king"}]}], 3),
    ],
)
def test_inputs_come_in_all_of_llama_servers_shapes(client: httpx2.Client, value: Any, count: int) -> None:
    answer = client.post("/v1/embeddings", json={"model": "bert", "input": value}).json()
    assert [len(item["embedding"]) for item in answer["data"]] == [64] * count


def test_parts_of_text_are_joined(client: httpx2.Client) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]
    answer = client.post("/v1/embeddings", json={"model": "bert", "input": ["hello world", {"content": parts}]}).json()
    assert math.dist(*(item["embedding"] for item in answer["data"])) < 1e-5


WRONG: list[dict[str, Any]] = [
    {"input": []},
    {"input": None},
    {"input": 3},
    {"input": [1.5]},
    {"input": [None]},
    {"input": [True]},
    {"input": [[]]},
    {"input": {"content": "cat"}},
    {"input": {"content": [{"type": "image_url"}]}},
    {"input": {"content": [{"type": "text"}]}},
    {"input": {"prompt_string": "cat", "multimodal_data": ["AAAA"]}},
    {"input": "cat", "encoding_format": "hex"},
    {"input": "cat", "encoding_format": 3},
    {"input": "cat", "dimensions": 0},
    {"input": "cat", "dimensions": 65},
    {"input": "cat", "dimensions": 1.5},
    {"input": "cat", "embd_normalize": -2},
    {"input": "cat " * 600},
    {"input": ["cat", "x" * 1_000_000]},
    {"input": [99_999]},
    {"input": [-1]},
    {"input": [2**40]},
]


@pytest.mark.parametrize("fields", WRONG)
def test_what_makes_no_sense_is_the_clients_error_and_harms_nobody(client: httpx2.Client, fields: Any) -> None:
    refused(client.post("/v1/embeddings", json={"model": "bert", **fields}))
    assert client.post("/v1/embeddings", json=CAT).status_code == 200


def test_the_openai_client_sees_what_was_too_long(openai: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="too large") as caught:
        openai.embeddings.create(model="bert", input=["cat", "cat " * 600])
    assert caught.value.type == "exceed_context_size_error"


def test_thousands_of_inputs_in_one_body(client: httpx2.Client) -> None:
    body = {"model": "fake", "input": [f"text {number}" for number in range(2000)]}
    answer = client.post("/v1/embeddings", json=body).json()
    assert [item["embedding"][0] for item in answer["data"]] == [len(text) for text in body["input"]]
    assert answer["usage"]["prompt_tokens"] == 4000


@pytest.mark.parametrize("http", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"model": "mean", "input": ["cat"] * 200}),
        ("/v1/embeddings", {"model": "mean", "input": ["cat"] * 700, "encoding_format": "base64"}),
        ("/embedding", {"model": "mean", "input": ["cat"] * 200}),
        ("/embedding", {"model": "random", "input": ["cat " * 20] * 20}),
    ],
)
def test_a_large_answer_is_what_it_would_be_in_one_piece(
    front: LiveFront, path: str, fields: dict[str, Any], http: str
) -> None:
    content = json.dumps(fields).encode()
    address = urlsplit(front.url)
    with socket.create_connection((str(address.hostname), address.port or 0), DEADLINE) as connection:
        head = f"POST {path} HTTP/{http}\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        with connection.makefile("rb") as reader:
            received, _, answer = reader.read().partition(b"\r\n\r\n")

    assert len(answer) > 2 * PART_BYTES
    assert answer == msgspec.json.encode(json.loads(answer))
    assert f"content-length: {len(answer)}".encode() in received.lower()
    assert b"transfer-encoding" not in received.lower()


def test_computed_tokens_are_counted(front: LiveFront) -> None:
    with LiveFront(fake("echo")) as live, live.client() as client:
        client.post("/v1/embeddings", json={"model": "echo", "input": "one two three"})
        client.post("/rerank", json={"model": "echo", "query": "q", "documents": ["one two"]})
        assert 'llamacpp:prompt_tokens_total{model="echo"} 5.0' in client.get("/metrics").text


# --- scores ---


@pytest.mark.parametrize("path", ["/rerank", "/reranking", "/v1/rerank", "/v1/reranking"])
def test_documents_are_scored_best_first(client: httpx2.Client, path: str) -> None:
    body = {"model": "rank", "query": "cat", "documents": ["dog", "cat", "king dog"]}
    answer = client.post(path, json=body).json()
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert {result["index"] for result in answer["results"]} == {0, 1, 2}
    assert set(answer["results"][0]) == {"index", "relevance_score"}
    assert (answer["model"], answer["object"]) == ("rank", "list")
    assert answer["usage"] == {"prompt_tokens": 19, "total_tokens": 19}


def test_teis_shape_is_a_list(client: httpx2.Client) -> None:
    body: dict[str, Any] = {"model": "rank", "query": "cat", "texts": ["dog", "cat"]}
    answer = client.post("/rerank", json={**body, "return_text": True}).json()
    assert [set(item) for item in answer] == [{"index", "score", "text"}] * 2
    assert all(item["text"] == body["texts"][item["index"]] for item in answer)
    assert [set(item) for item in client.post("/rerank", json=body).json()] == [{"index", "score"}] * 2


@pytest.mark.parametrize(("top_n", "count"), [(None, 3), (0, 0), (2, 2), (99, 3)])
def test_the_best_few_can_be_asked_for(client: httpx2.Client, top_n: int | None, count: int) -> None:
    body = {"model": "fake", "query": "q", "documents": ["a", "bbb", {"text": "cc"}], "top_n": top_n}
    best = [{"index": 1, "relevance_score": 3.0}, {"index": 2, "relevance_score": 2.0}]
    assert client.post("/rerank", json=body).json()["results"][:2] == best[:count]
    assert len(client.post("/rerank", json=body).json()["results"]) == count


def test_jinas_clients_can_have_the_documents_back(client: httpx2.Client) -> None:
    body = {"model": "fake", "query": "q", "documents": ["a", "bb"], "return_documents": True}
    results = client.post("/rerank", json=body).json()["results"]
    assert [result["document"] for result in results] == [{"text": "bb"}, {"text": "a"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"documents": ["a"]},
        {"query": 3, "documents": ["a"]},
        {"query": "q"},
        {"query": "q", "documents": []},
        {"query": "q", "documents": None},
        {"query": "q", "documents": 123},
        {"query": "q", "documents": [1, 2]},
        {"query": "q", "documents": ["a"], "top_n": -1},
        {"query": "q", "documents": ["a"], "top_n": "x"},
        {"query": "cat " * 600, "documents": ["a"]},
    ],
)
def test_bad_documents_are_the_clients_error(client: httpx2.Client, fields: dict[str, Any]) -> None:
    refused(client.post("/rerank", json={"model": "rank", **fields}))


def test_models_do_what_they_are_made_for(client: httpx2.Client, openai: OpenAI) -> None:
    error = refused(client.post("/rerank", json={"model": "bert", "query": "q", "documents": ["a"]}), 501)
    assert "--pooling" in error["message"]
    with pytest.raises(APIStatusError, match="rerank") as caught:
        openai.embeddings.create(model="rank", input="cat")
    assert caught.value.status_code == 501
    assert caught.value.response.headers["x-should-retry"] == "false"


# --- infills ---


def test_a_gap_is_filled(client: httpx2.Client) -> None:
    body = {"model": "infill", "input_prefix": "int main() {\n", "input_suffix": "}\n", "prompt": "  int n", "seed": 1}
    answer = client.post("/infill", json={**body, "n_predict": 4, "ignore_eos": True}).json()
    assert (answer["tokens_predicted"], answer["stop_type"]) == (4, "limit")
    extra = [{"text": "int n();", "filename": "n.h"}, {"text": "void f();"}]
    more = client.post("/infill", json={**body, "input_extra": extra, "n_predict": 4, "ignore_eos": True}).json()
    assert more["tokens_evaluated"] > answer["tokens_evaluated"]
    with client.stream("POST", "/infill", json={**body, "n_predict": 4, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "".join(response.iter_text()).count("data: ") > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"input_suffix": "b"},
        {"input_prefix": "a"},
        {"input_prefix": "a", "input_suffix": 3},
        {"input_prefix": "a", "input_suffix": "b", "prompt": ["c"]},
        {"input_prefix": "a", "input_suffix": "b", "input_extra": {}},
        {"input_prefix": "a", "input_suffix": "b", "input_extra": ["x"]},
        {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "ok"}]},
        {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": 3, "text": "abc"}]},
        {"input_prefix": "a", "input_suffix": "b", "n_cmpl": 0},
    ],
)
def test_bad_gaps_are_the_clients_error(client: httpx2.Client, fields: dict[str, Any]) -> None:
    refused(client.post("/infill", json={"model": "infill", **fields}))


def test_a_model_without_infilling_says_so(client: httpx2.Client) -> None:
    body = {"model": "random", "input_prefix": "a", "input_suffix": "b"}
    error = refused(client.post("/infill", json=body), 501)
    assert error["type"] == "not_supported_error"
    assert error["message"].startswith("Infill is not supported by this model: prefix token is missing.")


# --- tokens ---


def test_tokens_and_texts_can_be_mixed_when_tokenising(client: httpx2.Client) -> None:
    body: dict[str, Any] = {"model": "fake", "content": ["ab", 7, "c"]}
    assert client.post("/tokenize", json=body).json() == {"tokens": [97, 98, 7, 99]}
    body = {"model": "infill", "content": ["ab", 7], "add_special": True, "with_pieces": True}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert [token["piece"] for token in tokens] == ["<s>", "a", "b", "\x04"]


# --- shapes ---


def test_a_list_is_one_prompt_only_with_a_number_in_it() -> None:
    assert prompts_of([1, "a"], "prompt") == [[1, "a"]]
    assert prompts_of(["a", "b"], "prompt") == ["a", "b"]
    assert prompts_of([["a"], [1]], "prompt") == [["a"], [1]]
    wrongs: list[Any] = [[], None, 1.5, [{}], [[None]], {"content": None}]
    for wrong in wrongs:
        with pytest.raises(Problem):
            prompts_of(wrong, "prompt")
