"""llama-server's own API over real sockets: completion, tokens, templates and properties."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from live_front import LiveFront, fake, sse_data
from llamaherd.http.native import DEFAULT_SETTINGS
from llamaherd.pool import EngineOptions, ModelSpec
from tiny_gguf import write_scripted_llama

PROMPT = {"model": "echo", "prompt": "one two three"}


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    lines = fake("lines", pieces=("a", "\n", "b"))
    endless = fake("endless", pieces=("x ",), repeat=10_000)
    with LiveFront(fake("echo", aliases=("mirror",)), lines, endless) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def refused(response: httpx2.Response, kind: str = "invalid_request_error") -> str:
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, kind)
    message: str = error["message"]
    return message


# --- completion ---


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_a_prompt_is_continued_in_llama_servers_words(client: httpx2.Client, path: str) -> None:
    answer = client.post(path, json={**PROMPT, "seed": 7, "temperature": 0}).json()
    assert set(answer.pop("timings")) > {"cache_n", "prompt_n", "predicted_n"}
    assert answer == {
        "index": 0,
        "content": "one two three",
        "tokens": [],
        "stop": True,
        "model": "echo",
        "id_slot": 0,
        "tokens_predicted": 3,
        "tokens_evaluated": 3,
        "generation_settings": {**DEFAULT_SETTINGS, "seed": 7, "temperature": 0.0},
        "has_new_line": False,
        "truncated": False,
        "stop_type": "eos",
        "stopping_word": "",
        "tokens_cached": 0,
        "prompt": "one two three",
    }


def test_the_settings_are_those_that_were_asked_for(client: httpx2.Client) -> None:
    body = {
        **PROMPT,
        "n_predict": 2,
        "stop": "two",
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": -1,
        "ignore_eos": True,
    }
    settings = client.post("/completion", json=body).json()["generation_settings"]
    expected = {"n_predict": 2, "max_tokens": 2, "stop": ["two"], "top_k": 3, "top_p": 0.5, "min_p": 0.1}
    assert settings == {**DEFAULT_SETTINGS, **expected, "seed": 4294967295, "ignore_eos": True}


def test_the_tokens_come_if_asked_for(client: httpx2.Client) -> None:
    answer = client.post("/completion", json={**PROMPT, "return_tokens": True}).json()
    assert answer["tokens"] == [0, 1, 2]


def test_a_limit_is_told_from_the_end(client: httpx2.Client) -> None:
    answer = client.post("/completion", json={**PROMPT, "n_predict": 2}).json()
    assert (answer["content"], answer["stop_type"], answer["truncated"]) == ("one two", "limit", False)


def test_new_lines_are_noticed_whole_and_streamed(client: httpx2.Client) -> None:
    body = {"model": "lines", "prompt": "x"}
    assert client.post("/completion", json=body).json()["has_new_line"] is True
    assert streamed(client, body)[-1]["has_new_line"] is True


def test_a_prompt_of_tokens_is_not_shown_as_text(client: httpx2.Client) -> None:
    answer = client.post("/completion", json={"model": "echo", "prompt": list(b"one two")}).json()
    assert answer["content"] == "one two"
    assert "prompt" not in answer


def test_the_fields_of_an_answer_can_be_chosen(client: httpx2.Client) -> None:
    fields = ["content", "generation_settings/n_predict", "absent", "content/absent", "timings"]
    answer = client.post("/completion", json={**PROMPT, "n_predict": 2, "response_fields": fields}).json()
    assert set(answer) == {"content", "generation_settings/n_predict", "timings"}
    assert (answer["content"], answer["generation_settings/n_predict"]) == ("one two", 2)


def streamed(client: httpx2.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", "/completion", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        return sse_data(response.iter_lines())


def test_a_stream_has_parts_and_a_last_chunk_with_everything_else(client: httpx2.Client) -> None:
    *parts, last = streamed(client, PROMPT)
    assert parts == [
        {"index": 0, "content": "one", "tokens": [0], "stop": False, "tokens_predicted": 1},
        {"index": 0, "content": " two", "tokens": [1], "stop": False, "tokens_predicted": 2},
        {"index": 0, "content": " three", "tokens": [2], "stop": False, "tokens_predicted": 3},
    ]
    assert (last["content"], last["tokens"], last["stop"], last["stop_type"]) == ("", [], True, "eos")
    assert last["generation_settings"]["stream"] is True
    assert last["timings"]["predicted_n"] == 3


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"prompt": None}, "invalid_request_error"),
        ({"prompt": ["a", 1.5]}, "invalid_request_error"),
        ({"prompt": {"prompt_string": "x", "multimodal_data": ["AAAA"]}}, "invalid_request_error"),
        ({"n_probs": 101}, "invalid_request_error"),
        ({"post_sampling_probs": 1}, "invalid_request_error"),
        ({"echo": True}, "not_supported_error"),
        ({"grammar": "root ::= x"}, "invalid_request_error"),
        ({"samplers": ["no_such"]}, "invalid_request_error"),
        ({"response_fields": "content"}, "invalid_request_error"),
        ({"response_fields": ["content"] * 257}, "invalid_request_error"),
        ({"response_fields": ["a/" * 129]}, "invalid_request_error"),
        ({"model": "nobody"}, "invalid_request_error"),
        ({"model": ""}, "invalid_request_error"),
    ],
)
def test_what_cannot_be_served_is_refused(client: httpx2.Client, more: dict[str, Any], kind: str) -> None:
    refused(client.post("/completion", json={**PROMPT, **more}), kind)


def test_a_client_that_leaves_a_completion_frees_its_slot(front: LiveFront) -> None:
    with front.raw("/completion", {"model": "endless", "prompt": "x", "stream": True}) as request:
        request.read_until(b'"content":"x "')
    front.wait_for_requests("endless", 0)


# --- tokens ---


def test_a_text_becomes_tokens_and_back(client: httpx2.Client) -> None:
    body = {"model": "mirror", "content": "Grüße"}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert tokens == list("Grüße".encode())
    assert client.post("/detokenize", json={"model": "echo", "tokens": tokens}).json() == {"content": "Grüße"}


def test_tokens_can_come_with_their_pieces(client: httpx2.Client) -> None:
    body = {"model": "echo", "content": "aba", "with_pieces": True}
    expected = [{"id": 97, "piece": "a"}, {"id": 98, "piece": "b"}, {"id": 97, "piece": "a"}]
    assert client.post("/tokenize", json=body).json() == {"tokens": expected}


def test_a_piece_that_is_no_whole_character_is_not_made_up(client: httpx2.Client) -> None:
    body = {"model": "echo", "content": "ü", "with_pieces": True}
    expected = [{"id": 195, "piece": [195]}, {"id": 188, "piece": [188]}]
    assert client.post("/tokenize", json=body).json() == {"tokens": expected}


@pytest.mark.parametrize(("path", "answer"), [("/tokenize", {"tokens": []}), ("/detokenize", {"content": ""})])
def test_nothing_becomes_nothing_and_wakes_nothing(path: str, answer: dict[str, Any]) -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        assert client.post(path, json={"model": "echo"}).json() == answer
        assert front.ask(lambda pool: pool.status("echo").state) == "unloaded"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"model": "echo", "content": 3}),
        ("/tokenize", {"model": "nobody", "content": "x"}),
        ("/tokenize", {"content": "x"}),
        ("/detokenize", {"model": "echo", "tokens": [256]}),
        ("/detokenize", {"model": "echo", "tokens": [-1]}),
        ("/detokenize", {"model": "echo", "tokens": "x"}),
        ("/apply-template", {"model": "echo"}),
        ("/apply-template", {"model": "echo", "messages": []}),
        ("/apply-template", {"model": "echo", "messages": [{"role": "user"}], "chat_template_kwargs": {"model": 1}}),
    ],
)
def test_what_makes_no_sense_is_refused(client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    refused(client.post(path, json=body))


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"content": "x"}), ("/detokenize", {"tokens": [1]}), ("/apply-template", {"messages": []})],
)
def test_they_load_no_model_that_may_not_be_loaded(path: str, body: dict[str, Any]) -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        message = refused(client.post(f"{path}?autoload=false", json={"model": "echo", **body}))
        assert message == "model 'echo' is not loaded"


# --- templates ---


def test_a_chat_becomes_a_prompt(client: httpx2.Client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    body = {"model": "echo", "messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    assert client.post("/apply-template", json=body).json() == {"prompt": "<system>Be brief.\n<user>Hi\n"}


def test_tools_are_checked_here_too(client: httpx2.Client) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}
    refused(client.post("/apply-template", json=body), "invalid_request_error")


# --- properties ---


def test_the_servers_properties_are_the_routers(client: httpx2.Client) -> None:
    props = client.get("/props").json()
    assert props["role"] == "router"
    assert props["models_autoload"] is True
    assert props["build_info"].startswith("llamaherd-")
    assert props["default_generation_settings"] == {"params": {}, "n_ctx": 0}


def test_a_models_properties_are_told_without_loading_it() -> None:
    options = EngineOptions(n_parallel=3, n_ctx=512, chat_template="{{ messages }}")
    spec = ModelSpec(name="m", engine="fake", options=options)
    with LiveFront(spec, specs=[spec]) as front, front.client() as client:
        before = client.get("/props?model=m").json()
        assert (before["status"], before["is_sleeping"], before["total_slots"]) == ("unloaded", False, 3)
        assert before["chat_template"] == "{{ messages }}"
        assert before["default_generation_settings"] == {"params": DEFAULT_SETTINGS}
        assert front.ask(lambda pool: pool.status("m").pid) is None
        client.post("/completion", json={"model": "m", "prompt": "x"})
        after = client.get("/props", params={"model": "m", "autoload": "true"}).json()
        assert (after["status"], after["default_generation_settings"]["n_ctx"]) == ("loaded", 512)
        front.ask(lambda pool: pool.start_sleep("m"))
        front.wait_for_state("m", "sleeping")
        assert client.get("/props?model=m").json()["is_sleeping"] is True
        assert front.ask(lambda pool: pool.status("m").state) == "sleeping"


def test_the_only_models_properties_are_the_servers_too() -> None:
    spec = ModelSpec(name="m", engine="fake", options=EngineOptions(n_parallel=3, n_ctx=512))
    with LiveFront(spec, specs=[spec], default_model="m") as front, front.client() as client:
        client.post("/completion", json={"prompt": "x"})
        props = client.get("/props").json()
        assert (props["role"], props["models_autoload"]) == ("router", True)
        assert props == {**props, **client.get("/props?model=m").json()}
        assert (props["model_alias"], props["total_slots"]) == ("m", 3)
        assert props["default_generation_settings"]["n_ctx"] == 512


def test_the_properties_of_an_unknown_model_are_an_error(client: httpx2.Client) -> None:
    assert refused(client.get("/props?model=nobody")) == "model 'nobody' not found"


def test_properties_are_found_by_an_alias_too(client: httpx2.Client) -> None:
    assert client.get("/props?model=mirror").json()["model_alias"] == "echo"


def test_a_models_own_defaults_are_told_and_a_request_overrides_them() -> None:
    spec = msgspec.structs.replace(fake("echo"), defaults={"temperature": 0.25, "max_tokens": 2, "top_k": 7})
    with LiveFront(spec, specs=[spec]) as front, front.client() as client:
        params = client.get("/props", params={"model": "echo"}).json()["default_generation_settings"]["params"]
        assert (params["temperature"], params["n_predict"], params["top_k"]) == (0.25, 2, 7)
        short = client.post("/completion", json=PROMPT).json()
        assert (short["content"], short["stop_type"]) == ("one two", "limit")
        assert short["generation_settings"]["top_k"] == 7
        longer = client.post("/completion", json={**PROMPT, "n_predict": -1, "top_k": 3}).json()
        assert (longer["content"], longer["generation_settings"]["top_k"]) == ("one two three", 3)


def test_what_a_models_file_recommends_is_told_where_nothing_else_was_said(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_scripted_llama(path, recommends={"top_k": 20, "top_p": 0.5, "min_p": 0.25, "sequence": "top-k;temp"})
    options = EngineOptions(n_ctx=256, n_threads=1, n_parallel=1)
    spec = ModelSpec(name="m", path=path, options=options, defaults={"top_p": 0.75})
    with LiveFront(spec, specs=[spec]) as front, front.client() as client:

        def told() -> dict[str, Any]:
            settings: dict[str, Any] = client.get("/props?model=m").json()["default_generation_settings"]["params"]
            return settings

        assert told() == {**DEFAULT_SETTINGS, "top_p": 0.75}, "nobody has looked into the file yet"
        body = {"model": "m", "prompt": "\n", "min_p": 0.05, "n_predict": 2}
        used = client.post("/completion", json=body).json()["generation_settings"]
        samplers = ["top_k", "temperature"]
        assert [used[name] for name in ("top_k", "top_p", "min_p", "samplers")] == [20, 0.75, 0.05, samplers]
        assert told() == {**DEFAULT_SETTINGS, "top_k": 20, "top_p": 0.75, "min_p": 0.25, "samplers": samplers}
        (slot,) = client.get("/slots?model=m").json()
        shown = slot["params"]
        assert [shown[name] for name in ("top_k", "top_p", "min_p", "samplers")] == [20, 0.75, 0.05, samplers]
        (model,) = client.get("/v1/models").json()["data"]
        assert model["meta"]["sampling"] == {"samplers": samplers, "top_k": 20, "top_p": 0.5, "min_p": 0.25}
