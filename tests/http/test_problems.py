"""Every error has one HTTP answer, in llama-server's form, and none of them shows the inside."""

import json
import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest
from starlette.exceptions import HTTPException

from llamaherd import pool
from llamaherd.http.problems import INVALID_REQUEST, TABLE, UNAVAILABLE, Problem, problem_of
from llamaherd.pool import (
    BadRequest,
    DownloadFailed,
    LoadFailed,
    ModelNotFound,
    PoolClosed,
    PoolError,
    QueueFull,
    QueueTimeout,
    WorkerDied,
)


def tree(cls: type[PoolError]) -> Iterator[type[PoolError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from tree(sub)


def body_of(problem: Problem) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(bytes(problem.to_response().body)))


def test_the_table_knows_every_public_error_of_the_pool() -> None:
    exported = [getattr(pool, name) for name in pool.__all__]
    public = {value for value in exported if isinstance(value, type) and issubclass(value, PoolError)}
    # An error of a special kind of another is answered like that.
    assert {cls if cls.__bases__ == (PoolError,) or cls in TABLE else cls.__bases__[0] for cls in public} == set(TABLE)


@pytest.mark.parametrize("cls", list(tree(PoolError)))
def test_a_pool_error_becomes_an_error_body_in_the_reference_form(cls: type[PoolError]) -> None:
    problem = problem_of(cls("what happened"))
    status, kind = problem.kind
    assert body_of(problem) == {"error": {"code": status, "message": "what happened", "type": kind}}
    assert problem.to_response().status_code == status


def test_an_unknown_model_is_400_as_in_the_reference() -> None:
    assert problem_of(ModelNotFound("model 'x' not found")).kind == INVALID_REQUEST


def test_a_prompt_that_does_not_fit_has_a_type_of_its_own() -> None:
    problem = problem_of(BadRequest("too long", code="context_length_exceeded"))
    assert problem.kind == (400, "exceed_context_size_error")


def test_retry_after_is_in_whole_seconds_rounded_up() -> None:
    response = problem_of(QueueFull("full", retry=True, retry_after=1.2)).to_response()
    assert response.headers["retry-after"] == "2"


def test_a_request_that_waited_too_long_is_503_and_may_come_back() -> None:
    problem = problem_of(QueueTimeout("too long", retry=True, retry_after=1.0))
    assert (problem.kind, problem.headers["Retry-After"]) == ((503, "unavailable_error"), "1")


def test_retry_after_is_never_zero() -> None:
    assert problem_of(QueueFull("full", retry_after=0.0)).headers["Retry-After"] == "1"


def test_a_load_that_failed_is_500_but_503_while_the_pool_waits_to_try_again() -> None:
    assert problem_of(LoadFailed("bad file")).kind == (500, "server_error")
    assert problem_of(LoadFailed("bad file", retry_after=4.0)).kind == (503, "unavailable_error")


def test_a_download_that_failed_is_400_but_503_where_a_repeat_may_help() -> None:
    assert problem_of(DownloadFailed("no such file", code="no_such_file")).kind == INVALID_REQUEST
    assert problem_of(DownloadFailed("the hub answered 502", code="hub_error", retry=True)).kind == UNAVAILABLE
    assert problem_of(DownloadFailed("cancelled", code="cancelled", retry=True)).kind == INVALID_REQUEST


def test_errors_of_the_server_tell_clients_whether_a_retry_helps() -> None:
    assert problem_of(WorkerDied("gone", retry=True)).headers["x-should-retry"] == "true"
    assert problem_of(PoolClosed("closing")).headers["x-should-retry"] == "false"
    assert "x-should-retry" not in problem_of(BadRequest("no")).headers


def test_log_lines_of_a_worker_stay_inside() -> None:
    problem = problem_of(LoadFailed("it failed", exit_code=3, log=("/home/someone/model.gguf is bad",)))
    assert "someone" not in json.dumps(body_of(problem))


def test_an_unexpected_error_says_nothing_but_how_to_find_it_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "llamaherd.http"):
        problem = problem_of(RuntimeError("secret"))
    message = body_of(problem)["error"]["message"]
    assert problem.kind == (500, "server_error")
    assert "secret" not in message
    incident = message.split("incident ")[1].split()[0]
    assert incident in caplog.text
    assert "RuntimeError: secret" in caplog.text


def test_a_problem_names_the_field_that_is_wrong() -> None:
    problem = Problem(INVALID_REQUEST, "no", param="model")
    assert body_of(problem)["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "not_found_error"), (405, "invalid_request_error"), (400, "invalid_request_error")]
)
def test_errors_of_the_router_take_the_same_form(status: int, kind: str) -> None:
    error = body_of(problem_of(HTTPException(status, headers={"Allow": "GET"})))["error"]
    assert (error["code"], error["type"]) == (status, kind)


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("cannot open /home/me/models/a.gguf: no such file", "cannot open a.gguf: no such file"),
        ("last log lines: '/srv/x/y.gguf' | /a/b/c", "last log lines: 'y.gguf' | c"),
        ("see https://example.org/a/b and 3/4 of n/a", "see https://example.org/a/b and 3/4 of n/a"),
    ],
)
def test_what_broke_is_told_without_the_folders_of_its_files(told: str, shown: str) -> None:
    assert problem_of(LoadFailed(told)).message == shown
    assert problem_of(WorkerDied(told)).message == shown
    assert problem_of(BadRequest(told)).message == told
