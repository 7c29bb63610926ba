"""``/lora-adapters`` and the field ``lora`` over real sockets, and the options of the command line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest

from live_front import LiveFront
from llamaherd.http.adapter_options import adapters_of
from llamaherd.pool import Adapter, EngineOptions, ModelSpec, State
from tiny_gguf import tiny_model

LORA = str(tiny_model("lora"))
OPTIONS = EngineOptions(
    n_ctx=512, n_threads=1, n_parallel=2, flash_attn="off", adapters=(Adapter(path=LORA, scale=0.0),)
)
PROMPT: dict[str, Any] = {"prompt": "hello there", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
ON = [{"id": 0, "scale": 1.0}]


@pytest.fixture
def front() -> Iterator[LiveFront]:
    spec = ModelSpec(name="tiny", path=tiny_model("random"), options=OPTIONS)
    with LiveFront(spec, default_model="tiny") as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def content(client: httpx2.Client, **more: Any) -> str:
    response = client.post("/completion", json={**PROMPT, **more})
    assert response.status_code == 200, response.text
    text: str = response.json()["content"]
    return text


def test_adapters_are_listed_in_llama_servers_shape_and_nothing_is_loaded(
    front: LiveFront, client: httpx2.Client
) -> None:
    entry = {"id": 0, "path": LORA, "scale": 0.0, "task_name": "nonsense", "prompt_prefix": ""}
    assert client.get("/lora-adapters").json() == [entry]
    assert client.get("/lora-adapters", params={"model": "tiny"}).json() == [entry]
    assert front.ask(lambda pool: pool.status("tiny").state) is State.UNLOADED
    assert client.get("/lora-adapters", params={"model": "nobody"}).status_code == 400


def test_scales_are_set_for_everyone_and_for_one_request(client: httpx2.Client) -> None:
    off = content(client)
    on = content(client, lora=ON)
    assert on != off
    assert client.post("/lora-adapters", json=ON).json() == {"success": True}
    assert content(client) == on
    assert content(client, lora=[{"id": 0, "scale": 0}]) == off
    assert content(client, lora=[]) == on
    assert client.get("/lora-adapters").json()[0]["scale"] == 1.0
    assert client.post("/lora-adapters", json=[], params={"model": "tiny"}).json() == {"success": True}
    assert content(client) == off


def test_every_way_to_generate_takes_the_field(client: httpx2.Client) -> None:
    for path, body in (
        ("/v1/completions", PROMPT),
        ("/v1/chat/completions", {**PROMPT, "messages": [{"role": "user", "content": "hello there"}]}),
    ):
        wishes: list[list[dict[str, Any]]] = [[], ON]
        answers = [client.post(path, json={**body, "lora": lora}).json() for lora in wishes]
        said = [answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"] for answer in answers]
        assert said[0] != said[1]
    settings = client.post("/completion", json={**PROMPT, "lora": ON}).json()["generation_settings"]
    assert settings["lora"] == ON


@pytest.mark.parametrize("body", [{}, "x", [1], [{"id": 0}], [{"id": 5, "scale": 1}], [{"id": 0, "scale": "x"}]])
def test_bodies_that_cannot_be_had_are_refused(client: httpx2.Client, body: Any) -> None:
    answers = [client.post("/lora-adapters", json=body)]
    if not isinstance(body, dict | str):
        answers.append(client.post("/completion", json={**PROMPT, "lora": body}))
    for answer in answers:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/lora-adapters").json()[0]["scale"] == 0.0


def test_management_that_is_off_leaves_the_list() -> None:
    spec = ModelSpec(name="tiny", path=tiny_model("random"), options=OPTIONS)
    with LiveFront(spec, default_model="tiny", manage=False) as front, front.client() as client:
        assert client.post("/lora-adapters", json=ON).status_code == 403
        assert len(client.get("/lora-adapters").json()) == 1


# --- the command line ---


def test_the_options_name_files_and_scales(tmp_path: Path) -> None:
    odd = tmp_path / "odd, name: x.gguf"
    odd.touch()
    found = adapters_of([f'"{odd}",{LORA}', LORA], [f"{LORA}:0.5", f'"{odd}:-2"'], unapplied=False)
    assert found == (
        Adapter(path=str(odd)),
        Adapter(path=LORA),
        Adapter(path=LORA),
        Adapter(path=LORA, scale=0.5),
        Adapter(path=str(odd), scale=-2.0),
    )
    assert [one.scale for one in adapters_of([LORA], [f"{LORA}:0.5"], unapplied=True)] == [0.0, 0.0]
    assert adapters_of([], [], unapplied=False) == ()


@pytest.mark.parametrize(
    ("plain", "scaled", "reason"),
    [
        (["nowhere.gguf"], [], "no such file"),
        ([], [f"{LORA}"], "is not PATH:SCALE"),
        ([], [f"{LORA}:much"], "is not PATH:SCALE"),
        ([], ["1.5"], "is not PATH:SCALE"),
    ],
)
def test_options_that_name_nothing_are_refused(plain: list[str], scaled: list[str], reason: str) -> None:
    with pytest.raises(click.BadParameter, match=reason):
        adapters_of(plain, scaled, unapplied=False)
