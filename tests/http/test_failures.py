"""What goes wrong behind the front end becomes a clear error for whoever asked, and everybody else is served on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from live_front import LiveFront, fake, say, sse_data
from llamaherd.http.sse import COMMENT
from llamaherd.pool import EngineOptions, ModelSpec
from tiny_gguf import tiny_model

CHAT = "/v1/chat/completions"
STREAMED = pytest.mark.parametrize("streamed", [False, True])


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def front(gate: Path) -> Iterator[LiveFront]:
    models = (
        fake("echo"),
        fake("broken", load="fail"),
        fake("crashing", load="crash"),
        fake("dying", crash_at=2),
        fake("failing", fail_at=2),
        fake("refusing", fail_at=0),
        fake("slow to load", load_gate=str(gate)),
        fake("slow to fail", load_gate=str(gate), load="fail"),
        fake("pausing", step_gate=str(gate), gate_at=1),
    )
    with LiveFront(*models, models_max=8, stream_ping=0.01) as live:
        yield live
        gate.touch()


def assert_still_serving(front: LiveFront) -> None:
    with front.client() as client:
        answer = client.post(CHAT, json=say("all is well", model="echo")).json()
    assert answer["choices"][0]["message"]["content"] == "all is well"


def error_of(response: httpx2.Response, status: int, kind: str) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (status, status, kind)
    return error


def events_of(front: LiveFront, body: dict[str, Any]) -> list[Any]:
    with front.client() as client, client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return sse_data(response.iter_lines())


@pytest.mark.parametrize("model", ["broken", "crashing"])
def test_a_model_that_cannot_be_loaded_is_a_clear_500(front: LiveFront, model: str) -> None:
    with front.client() as client:
        error = error_of(client.post(CHAT, json=say("hi", model=model)), 500, "server_error")
        listed = {entry["id"]: entry["status"] for entry in client.get("/models").json()["data"]}
    assert model in error["message"]
    assert listed[model]["value"] == "unloaded"
    assert listed[model]["failed"] is True
    assert listed[model]["exit_code"] != 0
    assert_still_serving(front)


def test_a_fast_failure_before_the_first_piece_is_a_status_even_for_a_stream(gate: Path) -> None:
    with LiveFront(fake("broken", load="fail"), stream_ping=30.0) as front, front.client() as client:
        response = client.post(CHAT, json=say("hi", model="broken", stream=True))
    error_of(response, 500, "server_error")


def test_a_load_that_fails_after_the_stream_began_is_an_error_event(front: LiveFront, gate: Path) -> None:
    with front.raw(CHAT, say("hi", model="slow to fail", stream=True)) as request:
        assert b"200 OK" in request.read_until(COMMENT)
        gate.touch()
        answer = request.read_until(b'"error"')
    assert b"choices" not in answer


def test_a_client_that_waits_for_a_load_is_kept_with_comments(front: LiveFront, gate: Path) -> None:
    with front.raw(CHAT, say("at last", model="slow to load", stream=True)) as request:
        request.read_until(COMMENT)
        gate.touch()
        answer = request.read_until(b"[DONE]")
    assert b'"at"' in answer


def test_a_client_can_do_without_comments(front: LiveFront, gate: Path) -> None:
    body = say("one two", model="pausing", stream=True, sse_ping_interval=-1)
    with front.raw(CHAT, body) as silent, front.raw(CHAT, say("x", model="slow to load", stream=True)) as other:
        silent.read_until(b'"one"')
        other.read_until(COMMENT)
        gate.touch()
        assert COMMENT not in silent.read_until(b"[DONE]")


def test_a_worker_that_dies_is_a_clear_500_for_a_whole_answer(front: LiveFront) -> None:
    with front.client() as client:
        error_of(client.post(CHAT, json=say("a b c", model="dying")), 500, "server_error")
    assert_still_serving(front)


def test_a_worker_that_dies_in_the_middle_is_an_error_event_and_no_done(front: LiveFront) -> None:
    *chunks, last = events_of(front, say("a b c", model="dying"))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks][-1] == " b"
    assert last["error"]["code"] == 500
    assert last["error"]["type"] == "server_error"
    assert_still_serving(front)


def test_a_request_that_fails_in_the_middle_is_an_error_event_and_the_worker_lives(front: LiveFront) -> None:
    *chunks, last = events_of(front, say("a b c", model="failing"))
    assert len(chunks) >= 2
    assert "fails" in last["error"]["message"]
    assert front.ask(lambda pool: pool.status("failing").state) == "loaded"


def test_a_request_that_fails_at_once_is_a_status(front: LiveFront) -> None:
    with front.client() as client:
        error = error_of(client.post(CHAT, json=say("a b c", model="refusing")), 500, "server_error")
    assert "fails" in error["message"]


@STREAMED
def test_an_unload_ends_what_the_model_was_doing_with_an_error(streamed: bool) -> None:
    talker = fake("talker", pieces=("word ",), repeat=1_000_000, step_seconds=0.001)
    with LiveFront(talker) as front, front.client() as client:
        with front.raw(CHAT, say("hi", model="talker", stream=streamed)) as request:
            front.wait_for_state("talker", "loaded")
            if streamed:
                request.read_until(b"word")
            assert client.post("/models/unload", json={"model": "talker"}).status_code == 200
            answer = request.read_until(b"unloaded")
        assert b'"error"' in answer
        assert b"[DONE]" not in answer
        front.wait_for_state("talker", "unloaded")


def test_a_prompt_that_is_too_long_is_told_with_its_figures() -> None:
    model = ModelSpec(name="tiny", path=tiny_model("scripted"), options=EngineOptions(n_ctx=256, n_parallel=1))
    with LiveFront(model) as front, front.client() as client:
        response = client.post("/v1/completions", json={"model": "tiny", "prompt": [2] * 300})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (300, 256)
