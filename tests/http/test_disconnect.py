"""A client that leaves frees what it held, wherever its request is: queued, loading or generating; streamed or not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from live_front import LiveFront, RawRequest, fake, say

CHAT = "/v1/chat/completions"
STREAMED = pytest.mark.parametrize("streamed", [False, True])


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def front(gate: Path) -> Iterator[LiveFront]:
    models = (
        fake("talker", pieces=("word ",), repeat=1_000_000, step_seconds=0.001),
        fake("slow to load", load_gate=str(gate)),
        fake("other"),
    )
    with LiveFront(*models, models_max=1) as live:
        yield live
        gate.touch()


@STREAMED
def test_leaving_while_the_answer_is_made_stops_it(front: LiveFront, streamed: bool) -> None:
    with front.raw(CHAT, say("hi", model="talker", stream=streamed)) as request:
        if streamed:
            request.read_until(b"word")
        else:
            front.wait_for_state("talker", "loaded")
        assert front.held_by("talker") == 1
        request.leave()
        front.wait_for_requests("talker", 0)


@STREAMED
def test_leaving_while_the_model_loads_gives_the_place_up(front: LiveFront, gate: Path, streamed: bool) -> None:
    with front.raw(CHAT, say("hi", model="slow to load", stream=streamed)) as request:
        front.wait_for_requests("slow to load", 1)
        front.wait_for_state("slow to load", "loading")
        request.leave()
        front.wait_for_requests("slow to load", 0)
    gate.touch()
    with front.client() as client:
        answer = client.post(CHAT, json=say("still here", model="slow to load")).json()
    assert answer["choices"][0]["message"]["content"] == "still here"


@STREAMED
def test_leaving_the_queue_gives_the_place_up(front: LiveFront, streamed: bool) -> None:
    with front.raw(CHAT, say("hi", model="talker", stream=True)) as talking:
        talking.read_until(b"word")
        with front.raw(CHAT, say("hi", model="other", stream=streamed)) as waiting:
            front.wait_for_requests("other", 1)
            waiting.leave()
            front.wait_for_requests("other", 0)
        assert front.held_by("talker") == 1
        assert front.ask(lambda pool: pool.status("other").pid) is None


def test_a_completion_is_stopped_as_a_chat_is(front: LiveFront) -> None:
    with front.raw("/v1/completions", {"model": "talker", "prompt": "hi", "stream": True}) as request:
        request.read_until(b"word")
        request.leave()
        front.wait_for_requests("talker", 0)


def test_leaving_with_a_second_request_behind_the_first_stops_it(front: LiveFront) -> None:
    body = json.dumps(say("hi", model="talker", stream=True)).encode()
    behind = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with RawRequest(front.url, CHAT, body + behind, announced=len(body)) as request:
        request.read_until(b"word")
        request.leave()
        front.wait_for_requests("talker", 0)


def test_a_client_that_sends_requests_without_end_is_cut_off(front: LiveFront) -> None:
    body = json.dumps(say("hi", model="talker", stream=True)).encode()
    behind = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200
    with RawRequest(front.url, CHAT, body + behind, announced=len(body)) as request:
        with pytest.raises((AssertionError, ConnectionResetError)):
            request.read_until(b"no model says this")
        front.wait_for_requests("talker", 0)


@STREAMED
def test_closing_the_sending_side_alone_is_leaving(front: LiveFront, streamed: bool) -> None:
    with front.raw(CHAT, say("hi", model="talker", stream=streamed)) as request:
        front.wait_for_requests("talker", 1)
        request.send_no_more()
        front.wait_for_requests("talker", 0)


def test_what_needs_no_worker_is_answered_all_the_same(front: LiveFront) -> None:
    with front.raw("/lora-adapters?model=nobody", {}) as request:
        request.send_no_more()
        assert request.read_until(b"}").startswith(b"HTTP/1.1 400")


def test_one_client_that_leaves_does_not_disturb_another(front: LiveFront) -> None:
    with (
        front.raw(CHAT, say("hi", model="talker", stream=True)) as staying,
        front.raw(CHAT, say("hi", model="talker", stream=True)) as leaving,
    ):
        staying.read_until(b"word")
        leaving.read_until(b"word")
        leaving.leave()
        front.wait_for_requests("talker", 1)
        before = len(staying.read_until(b"word"))
        assert len(staying.read_more()) > before


def test_many_clients_that_leave_leave_nothing_behind(front: LiveFront) -> None:
    requests = [front.raw(CHAT, say("hi", model="talker", stream=bool(number % 2))) for number in range(40)]
    front.wait_for_requests("talker", 40)
    for request in requests:
        request.leave()
    front.wait_for_requests("talker", 0)
    with front.client() as client:
        assert client.post(CHAT, json=say("hi", model="talker", max_tokens=1)).status_code == 200


def test_a_listener_that_leaves_is_forgotten(front: LiveFront) -> None:
    with front.client() as client, client.stream("GET", "/models/sse") as response:
        lines = response.iter_lines()  # the stream is closed when nobody holds this
        assert next(lines).startswith("id: ")
        front.wait_for_listeners(1)
    front.wait_for_listeners(0)


def test_a_ping_interval_of_any_length_is_one(front: LiveFront) -> None:
    wish = {"sse_ping_interval": 10**400, "stream": True, "max_tokens": 2}
    with front.client() as client:
        assert client.post(CHAT, json=say("hi", model="talker", **wish)).status_code == 200
    front.wait_for_requests("talker", 0)
