"""How tokens are drawn: every parameter reaches the real engine by every route; wrong values are refused by name."""

from collections.abc import Iterator
from typing import Any, Final

import httpx2
import msgspec
import pytest

from live_front import LiveFront, fake, say
from llamaherd.http.native import DEFAULT_SETTINGS, settings_json
from llamaherd.http.schema import UNSUPPORTED, ChatBody, NativeBody, QueuedBody, SamplingBody, parse
from llamaherd.pool import ChatParams, EngineOptions, ModelSpec
from llamaherd.transport.messages import Sampling
from tiny_gguf import tiny_model

pytestmark = pytest.mark.timeout(180)

WORDS: Final = "the same words, the same words, the same"
ROUTES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": say(WORDS),
    "/v1/completions": {"prompt": WORDS},
    "/completion": {"prompt": WORDS},
}
NAMES: Final = set(SamplingBody.__struct_fields__) - set(QueuedBody.__struct_fields__)

EFFECTIVE: Final[list[dict[str, Any]]] = [
    {"repeat_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 2.0},
    {"presence_penalty": 2.0, "repeat_last_n": 3},
    {"dry_multiplier": 5.0, "dry_allowed_length": 1},
    {"top_n_sigma": 0.5},
    {"typical_p": 0.3},
    {"xtc_probability": 1.0, "xtc_threshold": 0.01},
    {"dynatemp_range": 0.7, "dynatemp_exponent": 2},
    {"mirostat": 1, "mirostat_tau": 3.0},
    {"mirostat": 2, "mirostat_eta": 0.5},
    {"logit_bias": {"270": 50}},
    {"logit_bias": [[270, 50.0]]},
    {"samplers": ["temperature"]},
    {"samplers": ["adaptive_p"], "adaptive_target": 0.2, "adaptive_decay": 0.5},
    {"min_keep": 200, "top_k": 1},
]

WRONG: Final[list[dict[str, Any]]] = [
    {"repeat_penalty": 0},
    {"presence_penalty": 1e7},
    {"frequency_penalty": "much"},
    {"repeat_last_n": -2},
    {"dry_multiplier": -1},
    {"dry_base": 0.5},
    {"dry_allowed_length": -1},
    {"dry_penalty_last_n": -2},
    {"dry_sequence_breakers": "\n"},
    {"dry_sequence_breakers": [""]},
    {"dry_sequence_breakers": ["x" * 41]},
    {"dynatemp_range": -0.1},
    {"dynatemp_exponent": -1},
    {"typical_p": 1.1},
    {"xtc_probability": 2},
    {"xtc_threshold": -1},
    {"top_n_sigma": "wide"},
    {"mirostat": 3},
    {"mirostat": True},
    {"mirostat_tau": -1},
    {"mirostat_eta": -1},
    {"adaptive_target": 1.5},
    {"adaptive_decay": 1},
    {"min_keep": -1},
    {"samplers": ["top_kk"]},
    {"samplers": "kqt"},
    {"samplers": ["top_k"] * 33},
    {"logit_bias": "all"},
    {"logit_bias": {"1": "more"}},
    {"logit_bias": {"1": True}},
    {"logit_bias": {"-1": None}},
    {"logit_bias": [[1]]},
    {"logit_bias": [[-1, 2]]},
    {"logit_bias": [1, 2]},
    {"logit_bias": [[index, 1] for index in range(4097)]},
    {"n_probs": 101},
    {"n_probs": -1},
]


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    options = EngineOptions(n_ctx=1024, n_parallel=2, n_threads=1, flash_attn="off")
    spec = ModelSpec(name="tiny", path=tiny_model("random"), options=options)
    with LiveFront(spec, fake("echo")) as live:
        yield live


@pytest.fixture(scope="module")
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


@pytest.fixture(scope="module")
def plain(client: httpx2.Client) -> dict[str, str]:
    """What every route says to a request that asks for nothing special."""
    return {path: drawn(client, path) for path in ROUTES}


def drawn(client: httpx2.Client, path: str, **fields: Any) -> str:
    body = {"model": "tiny", "max_tokens": 40, "temperature": 1.5, "seed": 5, "ignore_eos": True, **ROUTES[path]}
    answer = client.post(path, json={**body, **fields}).json()
    if path == "/completion":
        text: str = answer["content"]
    else:
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("fields", EFFECTIVE, ids=str)
def test_a_parameter_changes_what_is_drawn(
    client: httpx2.Client, plain: dict[str, str], path: str, fields: dict[str, Any]
) -> None:
    changed = drawn(client, path, **fields)
    assert changed
    assert changed != plain[path]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "fields", [{"dry_sequence_breakers": ["x"]}, {"dry_base": 9}, {"dry_penalty_last_n": 2}], ids=str
)
def test_a_detail_of_dry_changes_what_it_does(client: httpx2.Client, path: str, fields: dict[str, Any]) -> None:
    # Of three texts, one of them a sequence breaker, nothing but repetitions can be made.
    few = {"logit_bias": {"\n": 50, "a": 50, "b": 50}}
    dry = {**few, "dry_multiplier": 1.0, "dry_allowed_length": 1}
    assert drawn(client, path, **dry, **fields) != drawn(client, path, **dry)


@pytest.mark.parametrize("path", ROUTES)
def test_null_and_the_defaults_change_nothing(client: httpx2.Client, plain: dict[str, str], path: str) -> None:
    defaults = {name: DEFAULT_SETTINGS[name] for name in NAMES - {"seed", "temperature"}}
    assert drawn(client, path, **defaults) == plain[path]
    assert drawn(client, path, **dict.fromkeys(NAMES - {"seed", "temperature"})) == plain[path]


@pytest.mark.parametrize("bias", [False, -1e9])
def test_a_token_can_be_forbidden(client: httpx2.Client, bias: float) -> None:
    def first(**fields: Any) -> int:
        body = {"model": "tiny", "prompt": WORDS, "temperature": 0, "max_tokens": 1, "return_tokens": True, **fields}
        (token,) = client.post("/completion", json=body).json()["tokens"]
        assert isinstance(token, int)
        return token

    favourite = first()
    assert first(logit_bias={str(favourite): bias}) != favourite
    assert first(logit_bias=[[favourite, bias]]) != favourite


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: str(fields)[:40])
def test_a_wrong_value_is_400_and_names_the_field(client: httpx2.Client, path: str, fields: dict[str, Any]) -> None:
    response = client.post(path, json={"model": "echo", **ROUTES[path], **fields})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert next(iter(fields)) in error["message"]


def test_a_token_that_the_model_does_not_have_is_400(client: httpx2.Client) -> None:
    response = client.post("/completion", json={"model": "tiny", "prompt": WORDS, "logit_bias": {"9999999": 1}})
    assert response.status_code == 400
    assert "logit_bias" in response.json()["error"]["message"]


# --- without an engine ---


def test_samplers_may_be_a_text_of_one_letter_each() -> None:
    params = parse({"samplers": "kt"}, ChatBody).to_chat_params()
    assert params.get("samplers") == ["top_k", "temperature"]
    assert parse({"samplers": ""}, ChatBody).to_chat_params().get("samplers") == []


def test_the_fields_are_those_of_the_engine() -> None:
    assert {field.name for field in msgspec.structs.fields(Sampling)} == NAMES
    assert not NAMES & set(UNSUPPORTED)


def test_every_field_becomes_the_pools_parameter() -> None:
    values = {name: DEFAULT_SETTINGS[name] for name in NAMES}
    values |= {"samplers": ["top_k"], "logit_bias": {"1": 2.5}, "n_probs": 4, "seed": 9, "dry_sequence_breakers": ["."]}
    params: ChatParams = parse(values, ChatBody).to_chat_params()
    assert {name: value for name, value in params.items() if name in NAMES} == values


def test_the_default_settings_are_the_engines() -> None:
    defaults = {name: getattr(Sampling(), name) for name in NAMES}
    assert {name: DEFAULT_SETTINGS[name] for name in NAMES} == msgspec.json.decode(msgspec.json.encode(defaults))


@pytest.mark.parametrize(
    "given",
    [
        {"270": 50, "yes": -1.5, "7": False},
        [[270, 50], ["yes", -1.5], [7, False]],
    ],
)
def test_the_settings_list_biases_as_llama_server_does(given: Any) -> None:
    settings = settings_json(parse({"logit_bias": given, "mirostat": 2}, NativeBody), {"top_k": 5, "mirostat": 1})
    assert settings == {
        **DEFAULT_SETTINGS,
        "top_k": 5,
        "mirostat": 2,
        "logit_bias": [
            {"bias": 50, "token": 270},
            {"bias": -1.5, "token": "yes"},
            {"bias": None, "token": 7},
        ],
    }
