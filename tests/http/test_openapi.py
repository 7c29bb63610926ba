"""The API's description holds: it is asked, by schemathesis, whatever it allows, and answers as it says."""

import functools
from collections.abc import Iterator
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis import checks as all_checks
from schemathesis.schemas import APIOperation
from starlette.routing import Route

from live_front import DEADLINE, LiveFront, fake
from llamaherd.http.app import create_app
from llamaherd.http.openapi import describe
from llamaherd.http.operations import OPERATIONS
from llamaherd.pool import Pool

ROUTES = [route for route in create_app(Pool()).routes if isinstance(route, Route)]
DOCUMENT = describe(ROUTES)
OPERATION_NAMES = [(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods]
#: What has no end that could be waited for, and the description itself, which schemathesis leaves out.
ALONE = (("get", "/models/sse"), ("get", "/openapi.json"))
EXAMPLES = 15
#: Those that hold for whatever is asked. The description cannot say everything that makes a request wrong.
KEPT = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


Operation = APIOperation[Any, Any, Any, Any]


def example_of(name: tuple[str, str]) -> dict[str, Any]:
    """Return the example of an operation's body; empty if it has none."""
    method, path = name
    body = DOCUMENT["paths"][path][method].get("requestBody", {}).get("content", {}).get("application/json", {})
    example: dict[str, Any] = body.get("example", {})
    return example


#: What is described is asked of all; what is not, of those whose bodies have a type.
ASKED = [
    (name, mode)
    for name in OPERATION_NAMES
    if name not in ALONE
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or example_of(name)
]


@functools.cache
def checks() -> list[Any]:
    return list(cast(Any, all_checks).CHECKS.get_by_names(list(KEPT)))


@pytest.fixture(scope="module")
def front() -> Iterator[LiveFront]:
    # A limit to the streams, so that every connection of the hundreds of requests is answered in turn.
    with LiveFront(fake("demo"), stream_ping=1.0) as live:
        yield live


@pytest.fixture(scope="module")
def described(front: LiveFront) -> dict[tuple[str, str], Operation]:
    schema = schemathesis.openapi.from_url(f"{front.url}/openapi.json")
    results: list[Any] = list(cast(Any, schema).get_all_operations())
    operations: list[Operation] = [result.ok() for result in results]
    return {(operation.method, operation.path): operation for operation in operations}


def test_it_describes_every_route() -> None:
    assert {(method, route.path_format) for route in ROUTES for method in (route.methods or set()) - {"HEAD"}} == {
        (method.upper(), path) for method, path in OPERATION_NAMES
    }
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"]["title"] == "llamaherd"


def test_every_operation_has_a_name_of_its_own_and_a_summary() -> None:
    operations = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["summary"].endswith(".") for operation in operations)


def test_what_is_described_exists() -> None:
    handlers = {getattr(route.endpoint, "func", route.endpoint).__name__ for route in ROUTES}
    assert set(OPERATIONS) <= handlers


@pytest.mark.parametrize(("name", "mode"), ASKED, ids=str)
def test_whatever_is_asked_is_answered_as_described(
    described: dict[tuple[str, str], Operation], name: tuple[str, str], mode: GenerationMode
) -> None:
    operation = cast(Any, described[name])
    example = example_of(name)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def ask(case: Any, near: bool) -> None:
        body: Any = case.body
        if type(body) is dict:
            # Few texts drawn at random are a model's name, and few bodies are nearly right.
            drawn = cast("dict[str, Any]", body)
            case.body = {**example, **_without(drawn, example)} if near else {**drawn, "model": "demo"}
        response = case.call(timeout=DEADLINE)
        case.validate_response(response, checks=checks())

    ask()


def _without(body: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in example}


@pytest.mark.parametrize("name", [name for name in OPERATION_NAMES if example_of(name)], ids=" ".join)
def test_examples_are_answered(front: LiveFront, name: tuple[str, str]) -> None:
    _, path = name
    with front.client() as client:
        client.post("/models/unload" if path.endswith("/load") else "/models/load", json={"model": "demo"})
        front.wait_for_state("demo", "unloaded" if path.endswith("/load") else "loaded")
        assert client.post(path, json=example_of(name)).status_code == 200


def test_only_what_takes_a_body_is_described_with_one() -> None:
    with_body = {
        method for methods in DOCUMENT["paths"].values() for method in methods if "requestBody" in methods[method]
    }
    assert with_body == {"post"}


def test_every_route_of_adapters_names_its_model() -> None:
    for operation in DOCUMENT["paths"]["/lora-adapters"].values():
        assert [parameter["name"] for parameter in operation["parameters"]] == ["model"]
