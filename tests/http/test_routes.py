"""Every route, asked well and asked badly, over real sockets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from live_front import LiveFront, fake, say, sse_data

MODELS = (fake("echo", aliases=("mirror",), tags=("test",)), fake("other"))


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    with LiveFront(*MODELS) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def error_of(response: httpx2.Response, status: int, kind: str) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert error["code"] == status
    assert error["type"] == kind
    return error


# --- health and the unknown ---


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_health_is_ok(client: httpx2.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.json() == {"status": "ok"}
    assert response.headers["server"] == "llamaherd"


def test_health_waits_for_the_model_that_the_server_is_there_for(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with (
        LiveFront(fake("slow", load_gate=str(gate)), default_model="slow", health_waits=True) as front,
        front.client() as client,
    ):
        client.post("/models/load", json={"model": "slow"})
        error = error_of(client.get("/health"), 503, "unavailable_error")
        assert error["message"] == "Loading model"
        gate.touch()
        front.wait_for_state("slow", "loaded")
        assert client.get("/health").status_code == 200
        client.post("/models/unload", json={"model": "slow"})
        front.wait_for_state("slow", "unloaded")
        assert client.get("/health").status_code == 200


def test_health_says_that_the_model_could_not_be_loaded() -> None:
    broken = fake("broken", load="fail")
    with LiveFront(broken, default_model="broken", health_waits=True) as front, front.client() as client:
        client.post("/models/load", json={"model": "broken"})
        front.wait_until(lambda pool: pool.status("broken").failed)
        error = error_of(client.get("/health"), 503, "unavailable_error")
    assert error["message"] == "The model could not be loaded"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat", "/v1/models/", "/models/load/", "/..%2fetc"])
def test_an_unknown_path_is_404(client: httpx2.Client, path: str) -> None:
    error_of(client.get(path), 404, "not_found_error")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", "GET"),
        ("DELETE", "/v1/models", "GET"),
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("GET", "/models/load", "POST"),
        ("POST", "/models/sse", "GET"),
    ],
)
def test_a_wrong_method_is_405_and_says_which_is_right(
    client: httpx2.Client, method: str, path: str, allowed: str
) -> None:
    response = client.request(method, path)
    error_of(response, 405, "invalid_request_error")
    assert allowed in response.headers["allow"]


# --- the list of models ---


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_the_list_names_unloaded_models_too(path: str) -> None:
    with LiveFront(*MODELS) as front, front.client() as client:
        listed = client.get(path).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["echo", "other"]
    model = listed["data"][0]
    assert isinstance(model.pop("created"), int)
    assert model == {
        "id": "echo",
        "aliases": ["mirror"],
        "tags": ["test"],
        "object": "model",
        "owned_by": "llamacpp",
        "status": {"value": "unloaded", "args": []},
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "source": "preset",
        "can_remove": False,
    }


def test_the_list_has_the_facts_of_a_loaded_model(client: httpx2.Client) -> None:
    assert client.post("/v1/chat/completions", json=say("hi", model="echo")).status_code == 200
    model = client.get("/v1/models").json()["data"][0]
    assert model["status"]["value"] == "loaded"
    assert "llamaherd.pool.child" in model["status"]["args"]
    assert model["meta"]["n_vocab"] == 256
    assert model["id"] == "echo"


def test_listing_wakes_nothing() -> None:
    with LiveFront(*MODELS) as front, front.client() as client:
        client.get("/v1/models?model=echo")
        client.get("/health")
        assert front.ask(lambda pool: [status.pid for status in pool.models()]) == [None, None]


# --- chat ---


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_a_chat_is_answered(client: httpx2.Client, path: str) -> None:
    response = client.post(path, json=say("one two three", model="echo"))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "echo"
    assert answer["system_fingerprint"].startswith("llamaherd-")
    assert answer["choices"] == [
        {"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "one two three"}}
    ]
    assert answer["usage"] == {
        "completion_tokens": 3,
        "prompt_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert set(answer["timings"]) == {
        "cache_n",
        "prompt_n",
        "prompt_ms",
        "prompt_per_token_ms",
        "prompt_per_second",
        "predicted_n",
        "predicted_ms",
        "predicted_per_token_ms",
        "predicted_per_second",
    }


def test_an_alias_is_answered_under_the_models_own_name(client: httpx2.Client) -> None:
    assert client.post("/v1/chat/completions", json=say("hi", model="mirror")).json()["model"] == "echo"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_a_chat_ends_at_its_most_tokens(client: httpx2.Client, limit: str) -> None:
    answer = client.post("/v1/chat/completions", json=say("one two three", model="echo", **{limit: 2})).json()
    assert answer["choices"][0]["message"]["content"] == "one two"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_no_tokens_at_all_is_an_empty_answer(client: httpx2.Client) -> None:
    body = say("one two", model="echo", max_tokens=0)
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == ""
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        chunks = sse_data(response.iter_lines())
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def stream(client: httpx2.Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        return sse_data(response.iter_lines())


def test_a_streamed_chat_has_openais_chunks(client: httpx2.Client) -> None:
    *chunks, done = stream(client, "/v1/chat/completions", say("one two", model="echo"))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": None},
        {"content": "one"},
        {"content": " two"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["timings"]["predicted_n"] == 2


def test_a_streamed_chat_ends_with_its_usage_if_asked(client: httpx2.Client) -> None:
    body = say("one two", model="echo", stream_options={"include_usage": True})
    *chunks, last, done = stream(client, "/v1/chat/completions", body)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 4
    assert last["timings"]["predicted_n"] == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


# --- completions ---


@pytest.mark.parametrize("prompt", ["one two", ["one two"], list(b"one two"), [list(b"one two")]])
def test_a_prompt_is_continued(client: httpx2.Client, prompt: Any) -> None:
    answer = client.post("/v1/completions", json={"model": "echo", "prompt": prompt}).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"text": "one two", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["timings"]["predicted_n"] == 2


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_completion_counts_once(client: httpx2.Client, include_usage: bool) -> None:
    body = {"model": "echo", "prompt": "one two", "stream_options": {"include_usage": include_usage}}
    *chunks, done = stream(client, "/v1/completions", body)
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["text"] for choice in choices] == ["one", " two", ""]
    assert choices[-1]["finish_reason"] == "stop"
    assert [chunk["usage"]["total_tokens"] for chunk in chunks if "usage" in chunk] == [4]
    assert (chunks[-1]["choices"] == []) is include_usage


# --- which model ---


@pytest.mark.parametrize("model", [None, ""])
def test_a_request_must_name_a_model(client: httpx2.Client, model: str | None) -> None:
    response = client.post("/v1/chat/completions", json=say("hi", model=model))
    assert error_of(response, 400, "invalid_request_error")["message"] == "model name is missing from the request"


def test_a_default_model_serves_requests_that_name_none() -> None:
    with LiveFront(fake("echo"), default_model="echo") as front, front.client() as client:
        assert client.post("/v1/chat/completions", json=say("hi")).json()["model"] == "echo"
        error_of(client.post("/v1/chat/completions", json=say("hi", model="else")), 400, "invalid_request_error")


def test_a_server_of_one_model_serves_whatever_model_is_named_but_unloads_only_what_is() -> None:
    models = (fake("echo"), fake("other"))
    with LiveFront(*models, default_model="echo", any_name=True) as front, front.client() as client:
        answer = client.post("/v1/chat/completions", json=say("hi", model="gpt-4o")).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("echo", "hi")
        assert client.post("/v1/chat/completions", json=say("hi", model="other")).json()["model"] == "other"
        for path in ("/models/load", "/models/unload"):
            assert client.post(path, json={"model": "gpt-4o"}).is_error
        assert client.get("/props?model=echo").json()["status"] == "loaded"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_unknown_model_is_400_whether_streamed_or_not(client: httpx2.Client, path: str, streamed: bool) -> None:
    body = say("hi", model="nobody", prompt="hi", stream=streamed)
    error = error_of(client.post(path, json=body), 400, "invalid_request_error")
    assert error["message"] == "model 'nobody' not found"


@pytest.mark.parametrize("autoload", ["false", "0", "no"])
def test_autoload_can_be_refused_for_one_request(autoload: str) -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        path = f"/v1/chat/completions?autoload={autoload}"
        error_of(client.post(path, json=say("hi", model="echo")), 400, "invalid_request_error")
        assert front.ask(lambda pool: pool.status("echo").state) == "unloaded"


@pytest.mark.parametrize("autoload", ["true", "1"])
def test_autoload_can_be_asked_for_where_it_is_off(autoload: str) -> None:
    with LiveFront(fake("echo"), autoload=False) as front, front.client() as client:
        error_of(client.post("/v1/chat/completions", json=say("hi", model="echo")), 400, "invalid_request_error")
        path = f"/v1/chat/completions?autoload={autoload}"
        assert client.post(path, json=say("hi", model="echo")).status_code == 200


# --- loading and unloading ---


def test_a_model_is_loaded_and_unloaded_on_demand() -> None:
    with LiveFront(fake("echo", aliases=("mirror",))) as front, front.client() as client:
        assert client.post("/models/load", json={"model": "mirror"}).json() == {"success": True}
        front.wait_for_state("echo", "loaded")
        error_of(client.post("/models/load", json={"model": "echo"}), 400, "invalid_request_error")
        assert client.post("/models/unload", json={"model": "echo"}).json() == {"success": True}
        front.wait_for_state("echo", "unloaded")
        error_of(client.post("/models/unload", json={"model": "echo"}), 400, "invalid_request_error")


def test_loading_an_unknown_model_is_404_and_unloading_it_400_as_in_the_reference(client: httpx2.Client) -> None:
    error_of(client.post("/models/load", json={"model": "nobody"}), 404, "not_found_error")
    error_of(client.post("/models/unload", json={"model": "nobody"}), 400, "invalid_request_error")


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
@pytest.mark.parametrize("body", [{}, {"model": 3}, {"model": None}])
def test_loading_and_unloading_need_a_name(client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    error_of(client.post(path, json=body), 400, "invalid_request_error")
