"""Sounds become texts: OpenAI's client, streams, and what is refused."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from live_front import LiveFront, fake, sse_data
from llamaherd.pool import EngineOptions, ModelSpec
from pictures import RED, wave
from tiny_gguf import tiny_model

PATH = "/v1/audio/transcriptions"
OPTIONS = EngineOptions(n_ctx=1024, n_threads=1, n_parallel=2, flash_attn="off")
HIGH, LOW = wave(8000, tone=2000), wave(8000, tone=100)
#: The tiny model says nothing that has a meaning, and stops when it likes.
SHORT: dict[str, Any] = {"max_tokens": "8", "temperature": "0"}


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    hearing = ModelSpec(name="hearing", path=tiny_model("random"), mmproj=tiny_model("ear"), options=OPTIONS)
    deaf = ModelSpec(name="deaf", path=tiny_model("random"), mmproj=tiny_model("mmproj"), options=OPTIONS)
    with LiveFront(hearing, deaf, fake("echo")) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def send(client: httpx2.Client, sound: bytes = HIGH, path: str = PATH, **fields: Any) -> httpx2.Response:
    return client.post(path, data={"model": "hearing", **SHORT, **fields}, files={"file": ("a.wav", sound)})


def test_the_official_client_has_a_sound_written_down(front: LiveFront) -> None:
    with front.openai() as api:

        def write_down(sound: bytes) -> Any:
            return api.audio.transcriptions.create(
                model="hearing", file=("a.wav", io.BytesIO(sound)), temperature=0, extra_body={"max_tokens": 8}
            )

        high, low, again = write_down(HIGH), write_down(LOW), write_down(HIGH)
        stream = api.audio.transcriptions.create(
            model="hearing", file=("a.wav", io.BytesIO(HIGH)), temperature=0, extra_body={"max_tokens": 8}, stream=True
        )
        events = list(stream)
    assert high.text == again.text != low.text
    assert high.usage.input_tokens > 75
    assert {event.type for event in events[:-1]} == {"transcript.text.delta"}
    assert "".join(event.delta for event in events[:-1] if event.type == "transcript.text.delta") == high.text
    last = events[-1]
    assert last.type == "transcript.text.done"
    assert last.text == high.text


def test_it_is_the_answer_of_a_chat_with_that_sound(client: httpx2.Client) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(HIGH).decode()}}
    text = {"type": "text", "text": "Say what you hear (language: fr)"}
    body = {
        "model": "hearing",
        "messages": [{"role": "user", "content": [text, sound]}],
        "max_tokens": 8,
        "temperature": 0,
    }
    expected = client.post("/v1/chat/completions", json=body).json()
    answer = send(client, prompt="Say what you hear", language="fr").json()
    assert answer["text"] == expected["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == expected["usage"]["completion_tokens"]
    assert send(client, path="/audio/transcriptions").status_code == 200


def test_a_stream_ends_as_others_do(client: httpx2.Client) -> None:
    response = send(client, stream="true")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert sse_data(response.text.splitlines())[-1] == "[DONE]"


def test_a_model_that_takes_no_sounds_says_so_and_is_not_loaded(front: LiveFront, client: httpx2.Client) -> None:
    response = send(client, model="deaf")
    assert (response.status_code, response.json()["error"]["type"]) == (501, "not_supported_error")
    assert "'deaf' does not take in sounds" in response.json()["error"]["message"]
    assert front.ask(lambda pool: pool.status("deaf").state) == "unloaded"


@pytest.mark.parametrize(
    ("fields", "sound", "param", "said"),
    [
        ({}, b"", "file", '"file" is required'),
        ({}, RED, None, "in no format"),
        ({}, HIGH[:30], None, "does not say"),
        ({"response_format": "srt"}, HIGH, "response_format", "only 'json'"),
        ({"max_tokens": "many"}, HIGH, "max_tokens", "max_tokens: "),
        ({"temperature": "1e999"}, HIGH, "temperature", "temperature"),
        ({"model": "nobody"}, HIGH, None, "nobody"),
        ({"language": b"\xff"}, HIGH, "language", "not valid UTF-8"),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx2.Client, fields: dict[str, Any], sound: bytes, param: str | None, said: str
) -> None:
    response = send(client, sound, **fields)
    error = response.json()["error"]
    assert (response.status_code, error.get("param")) == (400, param)
    assert said in error["message"]


def test_a_body_that_is_no_form_is_told_so(client: httpx2.Client) -> None:
    response = client.post(PATH, json={"model": "hearing"})
    assert response.status_code == 400
    assert "multipart/form-data" in response.json()["error"]["message"]


def test_the_official_client_raises_its_own_errors(front: LiveFront) -> None:
    with front.openai() as api, pytest.raises(openai.BadRequestError, match="in no format"):
        api.audio.transcriptions.create(model="hearing", file=("a.wav", RED))
