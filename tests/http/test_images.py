"""Images over HTTP: the official client's content parts, what models say of themselves, and the options."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from live_front import LiveFront
from llamaherd.http.cli import cli
from llamaherd.pool import EngineOptions, ModelSpec
from pictures import BLUE, RED, data_url, image_part
from tiny_gguf import tiny_model

OPTIONS = EngineOptions(n_ctx=1024, n_threads=1, n_parallel=2, flash_attn="off")
ASK: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    seeing = ModelSpec(name="seeing", path=tiny_model("random"), mmproj=tiny_model("mmproj"), options=OPTIONS)
    blind = ModelSpec(name="blind", path=tiny_model("random"), options=OPTIONS)
    with LiveFront(seeing, blind) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def question(image: bytes) -> list[ChatCompletionMessageParam]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is this?"},
                {"type": "image_url", "image_url": {"url": data_url(image)}},
            ],
        }
    ]


def test_the_official_client_shows_images(front: LiveFront) -> None:
    with front.openai() as api:

        def ask(image: bytes) -> ChatCompletion:
            return api.chat.completions.create(
                model="seeing", messages=question(image), temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
            )

        red, blue, again = ask(RED), ask(BLUE), ask(RED)
        stream = api.chat.completions.create(
            model="seeing",
            messages=question(RED),
            temperature=0,
            max_tokens=8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert red.choices[0].message.content == again.choices[0].message.content == said
    assert red.choices[0].message.content != blue.choices[0].message.content
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_the_other_apis_show_images_too(client: httpx2.Client) -> None:
    def anthropic(image: bytes) -> str:
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image).decode()}
        content = [{"type": "image", "source": source}, {"type": "text", "text": "what is this?"}]
        body = {
            "model": "seeing",
            "max_tokens": 8,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        answer = client.post("/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["content"][0]["text"]
        return text

    def responses(image: bytes) -> str:
        content = [
            {"type": "input_image", "image_url": data_url(image)},
            {"type": "input_text", "text": "what is this?"},
        ]
        body = {
            "model": "seeing",
            "max_output_tokens": 8,
            "temperature": 0,
            "input": [{"role": "user", "content": content}],
        }
        answer = client.post("/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["output"][-1]["content"][0]["text"]
        return text

    for ask in (anthropic, responses):
        red, blue, again = ask(RED), ask(BLUE), ask(RED)
        assert red == again != blue


def test_models_say_what_they_take_in(client: httpx2.Client) -> None:
    models = {model["id"]: model["architecture"]["input_modalities"] for model in client.get("/models").json()["data"]}
    assert models == {"seeing": ["text", "image"], "blind": ["text"]}
    for name, vision in (("seeing", True), ("blind", False)):
        assert client.get("/props", params={"model": name}).json()["modalities"] == {"vision": vision, "audio": False}


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("seeing", image_part(RED[:60])),
        ("seeing", image_part(b"nothing")),
        ("seeing", {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}),
        ("seeing", {"type": "image_url"}),
        ("seeing", {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}),
        ("blind", image_part(RED)),
    ],
)
def test_what_cannot_be_shown_is_a_bad_request(client: httpx2.Client, model: str, part: dict[str, Any]) -> None:
    body = {**ASK, "model": model, "messages": [{"role": "user", "content": [part]}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] in ("invalid_request_error", "not_supported_error")
    text = {**ASK, "model": model, "messages": [{"role": "user", "content": "hi"}]}
    assert client.post("/v1/chat/completions", json=text).status_code == 200


def test_the_command_line_names_a_projector(tmp_path: Path) -> None:
    model, eye = str(tiny_model("random")), str(tiny_model("mmproj"))
    both = CliRunner().invoke(cli, ["models", "-m", model, "-m", str(tiny_model("scripted")), "--mmproj", eye])
    none = CliRunner().invoke(cli, ["models", "--models-dir", str(tmp_path), "--mmproj", eye])
    for result in (both, none):
        assert "a projector belongs to one model" in str(result.exception)
    assert CliRunner().invoke(cli, ["models", "-m", model, "--mmproj", eye]).exit_code == 0
