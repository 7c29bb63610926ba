"""The gate over real sockets: who gets in, and what browsers are told."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from live_front import LiveFront, fake, say
from llamaherd.http.app import create_app
from llamaherd.http.gate import PUBLIC
from llamaherd.http.security import ApiKeys, Cors, Security
from llamaherd.pool import Pool

CHAT = "/v1/chat/completions"
STRANGER = {"Origin": "https://evil.example"}
NEIGHBOUR = {"Origin": "http://localhost:5173"}
INVALID_KEY = {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveFront]:
    with LiveFront(fake("echo"), security=Security(keys=ApiKeys(["alpha", "beta"]))) as front:
        yield front


@pytest.fixture(scope="module")
def unlocked() -> Iterator[LiveFront]:
    with LiveFront(fake("echo"), security=Security(own_names=("box.example",))) as front:
        yield front


def every_route() -> list[tuple[str, str]]:
    app: Starlette = create_app(Pool())
    routes = [route for route in app.routes if isinstance(route, Route)]
    return [(method, route.path) for route in routes for method in sorted(route.methods or ())]


# --- keys ---


@pytest.mark.parametrize(("method", "path"), [*every_route(), ("GET", "/no/such/route"), ("POST", "/health/x")])
def test_every_route_but_health_needs_a_key(locked: LiveFront, method: str, path: str) -> None:
    with locked.client() as client:
        response = client.request(method, path)
    if path in PUBLIC:
        assert response.status_code == 200
        return
    assert response.status_code == 401
    assert method == "HEAD" or response.json()["error"] == INVALID_KEY["error"]
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer alpha"},
        {"Authorization": "Bearer beta"},
        {"Authorization": "alpha"},
        {"X-Api-Key": "beta"},
        {"x-api-key": "Bearer beta"},
        {"Authorization": "bearer alpha"},
        {"Authorization": "BEARER beta"},
    ],
)
def test_a_key_opens(locked: LiveFront, headers: dict[str, str]) -> None:
    with locked.client() as client:
        assert client.post(CHAT, json=say("hi", model="echo"), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer gamma"},
        {"Authorization": "Basic alpha"},
        {"Authorization": "Bearer alph\xe9"},
        {"Authorization": "wrong", "X-Api-Key": "alpha"},
        {"X-Api-Key": ""},
    ],
)
def test_a_wrong_key_does_not(locked: LiveFront, headers: dict[str, str]) -> None:
    with locked.client() as client:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        assert client.get("/v1/models", headers=raw).json() == INVALID_KEY


def test_the_openai_client_gives_its_key(locked: LiveFront) -> None:
    with locked.openai() as client:
        models = client.with_options(api_key="alpha").models.list()
    assert [model.id for model in models] == ["echo"]


def test_whoever_is_refused_does_not_get_to_upload(locked: LiveFront) -> None:
    with locked.raw(CHAT, say("hi")) as request:
        answer = request.read_until(b"Invalid API Key")
        assert b"connection: close" in answer.lower()


def test_a_path_in_disguise_is_no_public_one(locked: LiveFront) -> None:
    with locked.client() as client:
        for path in ("/health/", "//health", "/health/../v1/models", "/v1/models?x=/health", "/HEALTH"):
            assert client.get(path).status_code == 401


# --- host names ---


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "[::1]:8080", "box.example", "BOX.example:1"])
def test_over_loopback_the_server_goes_by_the_names_of_this_machine(unlocked: LiveFront, host: str) -> None:
    with unlocked.client() as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/health"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example"])
def test_it_does_not_go_by_a_name_that_was_made_to_lead_here(unlocked: LiveFront, host: str, path: str) -> None:
    with unlocked.client() as client:
        response = client.get(path, headers={"Host": host})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (403, 403, "permission_error")
    assert "--allowed-host" in error["message"]


def test_any_name_can_be_allowed() -> None:
    security = Security(allowed_hosts=("*",))
    with LiveFront(fake("echo"), security=security) as front, front.client() as client:
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 200


def ask_elsewhere(security: Security, host: str) -> int:
    """Return the status of a request that does not come over loopback."""

    async def main() -> int:
        transport = httpx2.ASGITransport(create_app(Pool(), security=security))
        async with httpx2.AsyncClient(transport=transport, base_url="http://192.0.2.1") as client:
            return (await client.get("/health", headers={"Host": host})).status_code

    return asyncio.run(main())


def test_other_connections_are_checked_only_against_a_list() -> None:
    assert ask_elsewhere(Security(), "any.example") == 200
    assert ask_elsewhere(Security(allowed_hosts=("mine.example",)), "any.example") == 403
    assert ask_elsewhere(Security(allowed_hosts=("mine.example",)), "mine.example:80") == 200


# --- web pages ---


def test_a_strangers_page_can_change_nothing_and_reads_nothing(unlocked: LiveFront) -> None:
    with unlocked.client() as client:
        response = client.post(CHAT, json=say("hi", model="echo"), headers=STRANGER)
        assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")
        assert "access-control-allow-origin" not in response.headers
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=STRANGER).headers


def test_a_page_of_this_machine_can(unlocked: LiveFront) -> None:
    with unlocked.client() as client:
        response = client.post(CHAT, json=say("hi", model="echo"), headers=NEIGHBOUR)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == NEIGHBOUR["Origin"]
    assert response.headers["access-control-allow-credentials"] == "true"
    assert response.headers["vary"] == "Origin"


def test_a_page_that_the_server_sent_may_use_it() -> None:
    security = Security(allowed_hosts=("herd.example",))
    with LiveFront(fake("echo"), security=security) as front, front.client() as client:
        headers = {"Host": "herd.example", "Origin": "https://herd.example"}
        assert client.post(CHAT, json=say("hi", model="echo"), headers=headers).status_code == 200


def test_where_a_key_is_needed_every_page_may_try_and_is_told_that_it_failed(locked: LiveFront) -> None:
    with locked.client() as client:
        response = client.post(CHAT, json=say("hi", model="echo"), headers=STRANGER)
        assert response.json() == INVALID_KEY
        assert response.headers["access-control-allow-origin"] == STRANGER["Origin"]
        error = client.get("/no/such", headers={**STRANGER, "X-Api-Key": "alpha"})
    assert error.status_code == 404
    assert error.headers["access-control-allow-origin"] == STRANGER["Origin"]


def preflight(front: LiveFront, origin: dict[str, str]) -> httpx2.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with front.client() as client:
        return client.options(CHAT, headers={**origin, **asked})


def test_a_preflight_needs_no_key_and_allows_what_was_asked_for(locked: LiveFront) -> None:
    response = preflight(locked, STRANGER)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["access-control-allow-origin"] == STRANGER["Origin"]
    assert response.headers["access-control-allow-headers"] == "authorization,content-type"
    assert response.headers["access-control-allow-methods"] == "GET, POST, DELETE, OPTIONS"
    assert response.headers["access-control-allow-credentials"] == "true"


def test_a_strangers_preflight_is_not_allowed(unlocked: LiveFront) -> None:
    assert "access-control-allow-origin" not in preflight(unlocked, STRANGER).headers


@pytest.mark.parametrize(
    ("cors", "expected"),
    [
        (Cors(origins=("*",), credentials=False), {"access-control-allow-origin": "*"}),
        (
            Cors(origins=("https://evil.example",), headers="x-a", methods="GET"),
            {"access-control-allow-headers": "x-a"},
        ),
        (Cors(origins=("https://evil.example",), methods="GET"), {"access-control-allow-methods": "GET"}),
    ],
)
def test_the_answer_to_a_preflight_can_be_set(cors: Cors, expected: dict[str, Any]) -> None:
    with LiveFront(fake("echo"), security=Security(cors=cors)) as front:
        headers = preflight(front, STRANGER).headers
    assert expected.items() <= dict(headers).items()
    assert ("access-control-allow-credentials" in headers) is cors.credentials


# --- managing models ---


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
def test_clients_can_be_kept_from_managing_models(path: str) -> None:
    with LiveFront(fake("echo"), manage=False) as front, front.client() as client:
        response = client.post(path, json={"model": "echo"})
        assert (response.status_code, response.json()["error"]["type"]) == (403, "feature_disabled")
        assert client.post(CHAT, json=say("hi", model="echo")).status_code == 200
