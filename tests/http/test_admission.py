"""Who goes first, who waits how long, and how long a model stays: what requests may say of it, on every route."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import msgspec
import pytest

from live_front import LiveFront, fake, say
from llamaherd.http.grants import Grant
from llamaherd.http.security import ApiKeys, Security

CHAT = "/v1/chat/completions"
ROUTES = [
    (CHAT, say("hi")),
    ("/v1/completions", {"prompt": "hi"}),
    ("/completion", {"prompt": "hi"}),
    ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", say("hi")),
    ("/v1/embeddings", {"input": "hi"}),
    ("/embedding", {"content": "hi"}),
    ("/rerank", {"query": "hi", "documents": ["hi"]}),
]
KEYS = {"all": Grant(), "limited": Grant(models=frozenset({"endless"}))}


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    endless = msgspec.structs.replace(fake("endless", pieces=("x ",), repeat=10**6, step_seconds=0.01), priority=5)
    with LiveFront(fake("echo"), endless, max_inputs=3) as live:
        yield live


def wait_for_running(front: LiveFront, count: int) -> None:
    front.wait_until(lambda pool: pool.status("endless").in_flight == count)


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_every_route_takes_them(client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    wishes = {"priority": 3, "keep_alive": "5m", "queue_timeout": "30s"}
    assert client.post(path, json={**body, **wishes, "model": "echo"}).status_code == 200


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    "wish",
    [
        {"priority": "high"},
        {"priority": 1.5},
        {"priority": 10**12},
        {"keep_alive": "for ever"},
        {"keep_alive": []},
        {"queue_timeout": -1},
        {"queue_timeout": "1y"},
    ],
)
def test_what_means_nothing_is_refused_by_name(
    client: httpx2.Client, path: str, body: dict[str, Any], wish: dict[str, Any]
) -> None:
    response = client.post(path, json={**body, **wish, "model": "echo"})
    assert response.status_code == 400
    assert next(iter(wish)) in response.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_model_that_is_not_kept_alive_goes(
    front: LiveFront, client: httpx2.Client, path: str, body: dict[str, Any]
) -> None:
    assert client.post(path, json={**body, "model": "echo", "keep_alive": 0}).status_code == 200
    front.wait_for_state("echo", "unloaded")


def test_the_higher_priority_stands_first_in_the_queue(front: LiveFront) -> None:
    with ExitStack() as requests:
        for number in range(4):
            requests.enter_context(front.raw(CHAT, say("x", model="endless", stream=True)))
            wait_for_running(front, number + 1)
        for number, priority in enumerate((1, 9, None)):
            body = say("x", model="endless", stream=True, priority=priority)
            requests.enter_context(front.raw(CHAT, body))
            front.wait_for_requests("endless", 5 + number)
        waiting = front.ask(lambda pool: [request.priority for request in pool.status("endless").waiting])
        assert waiting == [9, 5, 1]
    front.wait_for_requests("endless", 0)


def test_a_request_waits_as_long_as_it_says(front: LiveFront, client: httpx2.Client) -> None:
    with ExitStack() as requests:
        for number in range(4):
            requests.enter_context(front.raw(CHAT, say("x", model="endless", stream=True)))
            wait_for_running(front, number + 1)
        response = client.post(CHAT, json=say("x", model="endless", queue_timeout="50ms"))
        assert response.status_code == 503
        assert response.headers["retry-after"]
    front.wait_for_requests("endless", 0)


def test_a_limited_key_passes_nobody() -> None:
    endless = msgspec.structs.replace(fake("endless", pieces=("x ",), repeat=10**6, step_seconds=0.01), priority=5)
    options = msgspec.structs.replace(endless.options, n_parallel=1)
    endless = msgspec.structs.replace(endless, options=options)
    with LiveFront(endless, specs=(endless,), security=Security(keys=ApiKeys(KEYS))) as live, ExitStack() as requests:
        for number, priority in enumerate((0, 9, 2)):
            body = say("x", model="endless", stream=True, priority=priority)
            requests.enter_context(live.raw(CHAT, body, headers={"X-Api-Key": "limited"}))
            live.wait_for_requests("endless", number + 1)
            wait_for_running(live, 1)
        waiting = live.ask(lambda pool: [request.priority for request in pool.status("endless").waiting])
        assert waiting == [5, 2]


def test_who_may_not_unload_may_not_say_how_long_a_model_stays() -> None:
    with LiveFront(fake("echo"), manage=False) as live, live.client() as http:
        response = http.post(CHAT, json=say("x", model="echo", keep_alive=0))
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "feature_disabled"
        assert http.post(CHAT, json=say("x", model="echo", priority=1, queue_timeout=9)).status_code == 200


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/embeddings", "input", {}),
        ("/embedding", "content", {}),
        ("/rerank", "documents", {"query": "x"}),
        ("/rerank", "texts", {"query": "x"}),
    ],
)
def test_inputs_of_one_request_are_bounded(client: httpx2.Client, path: str, field: str, body: dict[str, Any]) -> None:
    assert client.post(path, json={**body, "model": "echo", field: ["x"] * 3}).status_code == 200
    response = client.post(path, json={**body, "model": "echo", field: ["x"] * 4})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert "--max-inputs" in response.json()["error"]["message"]


def test_no_text_is_tokenized_without_end(client: httpx2.Client) -> None:
    response = client.post("/tokenize", json={"model": "echo", "content": "x" * (4 * 1024 * 1024 + 1)})
    assert response.status_code == 400
    assert "4194304" in response.json()["error"]["message"]
    response = client.post("/detokenize", json={"model": "echo", "tokens": [1] * (4 * 1024 * 1024 + 1)})
    assert response.status_code == 400
    assert "4194304" in response.json()["error"]["message"]
