"""Whatever is sent as a body, the answer is a clean 4xx, and the next request is served."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from live_front import LiveFront, RawRequest, fake, say
from llamaherd.http.body import MAX_CONTAINERS

CHAT = "/v1/chat/completions"
LIMIT = 100_000


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    with LiveFront(fake("echo"), max_body_bytes=LIMIT) as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http
        # whatever a test has sent, the server is as well as before
        assert http.post(CHAT, json=say("still here", model="echo")).json()["choices"][0]["finish_reason"] == "stop"


def refusal(client: httpx2.Client, raw: bytes, status: int = 400, path: str = CHAT) -> str:
    response = client.post(path, content=raw)
    error = response.json()["error"]
    assert response.status_code == status
    assert error["code"] == status
    assert error["type"] in ("invalid_request_error", "not_supported_error")
    message: str = error["message"]
    assert "Traceback" not in message
    return message


def chat_of(content: str) -> bytes:
    """Return a chat whose one message has this JSON as its content."""
    return b'{"model":"echo","messages":[{"role":"user","content":%b}]}' % content.encode()


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/models/load", "/models/unload"])
@pytest.mark.parametrize(
    ("raw", "evidence"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"nonsense", "not valid JSON"),
        (b'{"model":"echo"} and more', "not valid JSON"),
        (b'{"model":"\xff"}', "not valid JSON"),
        (b'{"model":"\\ud800"}', "not valid JSON"),
        (b'{"model":NaN}', "not valid JSON"),
        (b'{"model":Infinity}', "not valid JSON"),
        (b'{"model":1e999}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"echo"', "must be a JSON object"),
        (b'{"model":' + b"[" * 101 + b"]" * 101 + b"}", "nested deeper"),
        (b'{"model":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "nested deeper"),
        (b'{"model":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}", "nested deeper"),
        (b'{"model":["echo"]}', "model: expected"),
    ],
)
def test_what_is_no_proper_object_is_400(client: httpx2.Client, path: str, raw: bytes, evidence: str) -> None:
    assert evidence in refusal(client, raw, path=path)


def test_a_byte_order_mark_is_passed_over(client: httpx2.Client) -> None:
    assert client.post(CHAT, content=b"\xef\xbb\xbf" + chat_of('"hi"')).status_code == 200
    assert "not valid JSON" in refusal(client, b"\xef\xbb\xbf\xef\xbb\xbf" + chat_of('"hi"'))


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, identity", "x" * 1000])
def test_a_compressed_body_is_refused_as_such(client: httpx2.Client, coding: str) -> None:
    response = client.post(CHAT, content=b"\x1f\x8b\x08", headers={"Content-Encoding": coding})
    assert response.status_code == 415
    assert "Content-Encoding" in response.json()["error"]["message"]
    assert client.post(CHAT, content=chat_of('"hi"'), headers={"Content-Encoding": "Identity"}).status_code == 200


WRONG_CHATS: list[dict[str, Any]] = [
    {"max_tokens": -2},
    {"max_tokens": 2**31},
    {"max_tokens": 10**30},
    {"temperature": "hot"},
    {"temperature": 10**400},
    {"top_p": 1.5},
    {"top_p": -0.1},
    {"min_p": 2},
    {"top_k": -2},
    {"seed": 1.5},
    {"stop": ["x"] * 65},
    {"stop": "x" * 1025},
    {"stop": {"a": 1}},
    {"messages": None},
    {"messages": []},
    {"messages": "hello"},
    {"messages": ["hello"]},
    {"messages": [{}]},
    {"messages": [{"role": 1, "content": "x"}]},
    {"messages": [{"role": "user", "content": 1}]},
    {"messages": [{"role": "user", "content": {"type": "text"}}]},
    {"chat_template_kwargs": []},
    {"stream": "true"},
    {"n": 17},
    {"n": 0},
    {"n": "x"},
]


@pytest.mark.parametrize("fields", WRONG_CHATS)
def test_a_chat_with_a_wrong_value_is_400(client: httpx2.Client, fields: dict[str, Any]) -> None:
    assert refusal(client, json.dumps({**say("hi", model="echo"), **fields}).encode())


@pytest.mark.parametrize("prompt", [None, [], {}, 1, [1.5], [-1], [2**31], ["a", 1.5], [["a"], [-1]], [[-1]], [None]])
def test_a_completion_with_a_wrong_prompt_is_400(client: httpx2.Client, prompt: Any) -> None:
    assert refusal(client, json.dumps({"model": "echo", "prompt": prompt}).encode(), path="/v1/completions")


def test_a_token_that_the_model_does_not_know_is_400(client: httpx2.Client) -> None:
    raw = json.dumps({"model": "echo", "prompt": [70_000]}).encode()
    assert "token ids" in refusal(client, raw, path="/v1/completions")


@pytest.mark.parametrize(
    "name", ["\x00", "a\nb", "\x1b[31mred", "../../etc/passwd", "x" * 10_000, "\u202eecho", "ECHO"]
)
def test_a_strange_model_name_is_an_unknown_model(client: httpx2.Client, name: str) -> None:
    message = refusal(client, json.dumps(say("hi", model=name)).encode())
    assert message.isprintable()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('"a\\u0000b"', "a\0b"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ('"\\u2028"', ""),
        ('"\\r\\ndata: [DONE]"', "data: [DONE]"),
    ],
)
def test_strange_but_valid_text_is_served(client: httpx2.Client, content: str, said: str) -> None:
    answer = client.post(CHAT, content=chat_of(content)).json()
    assert answer["choices"][0]["message"]["content"] == said


@pytest.mark.parametrize("content", ['"\\ud800"', '"\\udc00"', '"\\ud800x"', '"\\ude00\\ud83d"'])
def test_a_lone_surrogate_is_400(client: httpx2.Client, content: str) -> None:
    assert "not valid JSON" in refusal(client, chat_of(content))


def test_numbers_of_any_length_in_unknown_fields_harm_nobody(client: httpx2.Client) -> None:
    raw = b'{"model":"echo","messages":[{"role":"user","content":"hi","odd":%b}]}' % (b"9" * 400)
    assert client.post(CHAT, content=raw).status_code in (200, 400)


def test_a_body_at_the_limit_is_served(client: httpx2.Client) -> None:
    raw = chat_of('"hi"')
    assert client.post(CHAT, content=raw + b" " * (LIMIT - len(raw))).status_code == 200


def test_a_body_over_the_limit_is_413_and_closes_the_connection(client: httpx2.Client) -> None:
    response = client.post(CHAT, content=b" " * (LIMIT + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413
    assert response.headers["connection"] == "close"


def test_a_body_over_the_limit_is_413_also_when_its_length_is_not_announced(client: httpx2.Client) -> None:
    chunks = iter([b" " * 1000] * (LIMIT // 1000 + 1))
    assert client.post(CHAT, content=chunks).status_code == 413


def test_an_absurd_announced_length_is_refused_before_a_byte_of_it(front: LiveFront) -> None:
    with RawRequest(front.url, CHAT, b"", announced=10**18) as request:
        request.read_until(b"413 ")


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(front: LiveFront, client: httpx2.Client) -> None:
    with RawRequest(front.url, CHAT, b'{"model":', announced=1000) as request:
        request.leave()
    assert client.get("/health").status_code == 200


def test_a_body_of_very_many_small_things_is_refused_before_it_is_read() -> None:
    with LiveFront(fake("echo")) as live, live.client() as client:
        for small in (b"[],", b"{},"):
            raw = b'{"model":"echo","messages":[%b[]]}' % (small * MAX_CONTAINERS)
            assert "more than 2,000,000 objects and lists" in refusal(client, raw)
        many = say("[" * 100_000, model="echo", metadata=[[]] * 100_000)
        assert client.post(CHAT, json=many).status_code == 200
