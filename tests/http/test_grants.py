"""Keys that open less than everything: some models, or reading alone."""

import json
from collections.abc import Iterator

import httpx2
import pytest

from live_front import LiveFront, fake, say
from llamaherd.http.grants import Grant
from llamaherd.http.security import ApiKeys, Security

KEYS = {
    "all": Grant(),
    "one": Grant(models=frozenset({"one"})),
    "by alias": Grant(models=frozenset({"mirror"})),
    "reader": Grant(read_only=True),
}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    models = (fake("one", aliases=("mirror",)), fake("two"))
    with LiveFront(*models, security=Security(keys=ApiKeys(KEYS))) as live:
        yield live


def client_of(front: LiveFront, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=front.url, headers={"X-Api-Key": key}, timeout=30)


def refused(response: httpx2.Response) -> bool:
    return response.status_code == 403 and response.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize("key", ["one", "by alias"])
def test_a_key_opens_its_models_by_every_name_and_no_others(front: LiveFront, key: str) -> None:
    with client_of(front, key) as client:
        for name in ("one", "mirror"):
            assert client.post(CHAT, json=say("hi", model=name)).status_code == 200
            assert client.get(f"/props?model={name}").status_code == 200
            assert client.get(f"/v1/models/{name}").json()["id"] == "one"
        for name in ("two", "nobody"):
            for path in (CHAT, "/v1/completions", "/v1/messages", "/tokenize", "/models/load", "/models/unload"):
                assert refused(client.post(path, json=say("hi", model=name, prompt="hi", content="hi"))), path
            assert refused(client.get(f"/props?model={name}"))
            assert refused(client.get(f"/v1/models/{name}"))


def test_a_key_sees_its_models_alone(front: LiveFront) -> None:
    with client_of(front, "one") as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["one"]
        assert refused(client.get("/metrics"))
        assert refused(client.post("/models", json={"model": "some/where"}))
        assert refused(client.delete("/models?model=one"))
        assert client.get("/models/logs?model=mirror").status_code == 200
        assert refused(client.get("/models/logs?model=two"))
        assert refused(client.get("/models/logs?model=two&follow=1"))
        with client.stream("GET", "/models/sse") as response:
            data = next(line for line in response.iter_lines() if line.startswith("data: "))
        snapshot = json.loads(data.removeprefix("data: "))
    assert [model["name"] for model in snapshot["data"]["models"]] == ["one"]


def test_a_reader_reads_and_changes_nothing(front: LiveFront) -> None:
    with client_of(front, "reader") as client:
        assert len(client.get("/v1/models").json()["data"]) == 2
        assert client.get("/metrics").status_code == 200
        for path in (CHAT, "/models/load", "/tokenize", "/v1/messages/count_tokens"):
            assert refused(client.post(path, json=say("hi", model="one"))), path
        assert refused(client.delete("/models?model=one"))
        assert refused(client.get("/models/logs?model=two"))


def test_a_whole_key_opens_everything(front: LiveFront) -> None:
    with client_of(front, "all") as client:
        assert client.post(CHAT, json=say("hi", model="two")).status_code == 200
        assert client.get("/metrics").status_code == 200


def test_the_default_model_needs_to_be_opened_too() -> None:
    policy = Security(keys=ApiKeys({"two": Grant(models=frozenset({"two"}))}))
    with LiveFront(fake("one"), default_model="one", security=policy) as live, client_of(live, "two") as client:
        assert refused(client.post(CHAT, json=say("hi")))


def test_a_key_that_does_not_open_the_only_model_opens_it_by_no_other_name() -> None:
    policy = Security(keys=ApiKeys({"two": Grant(models=frozenset({"two", "gpt-4o"}))}))
    with (
        LiveFront(fake("one"), default_model="one", any_name=True, security=policy) as live,
        client_of(live, "two") as client,
    ):
        assert refused(client.post(CHAT, json=say("hi", model="gpt-4o")))
