"""The application around the handlers: its last resort, and what it does when a request is cancelled from outside."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llamaherd.http.app import create_app
from llamaherd.pool import Pool


def app_with(handler: Callable[[Request], Awaitable[Response]]) -> Starlette:
    """Return the application with one more route, ``/extra``."""
    app = create_app(Pool())
    app.router.routes.append(Route("/extra", handler))
    return app


def get_extra(app: Starlette) -> httpx2.Response:
    async def main() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/extra")

    return asyncio.run(main())


def test_an_error_that_nobody_expected_is_a_500_without_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    async def fault(request: Request) -> Response:
        raise RuntimeError("a secret")

    response = get_extra(app_with(fault))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (500, 500, "server_error")
    assert "secret" not in response.text
    assert "RuntimeError: a secret" in caplog.text


def test_an_error_in_the_middle_of_an_answer_is_for_the_server_to_end() -> None:
    async def fault(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"half of"
            raise RuntimeError("torn")

        return StreamingResponse(body())

    with pytest.raises(RuntimeError, match="torn"):
        get_extra(app_with(fault))


def test_a_request_that_a_shutdown_cancels_is_told_so() -> None:
    async def cancelled(request: Request) -> Response:
        raise asyncio.CancelledError

    response = get_extra(app_with(cancelled))
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "unavailable_error"


def test_a_pool_that_is_not_open_is_503() -> None:
    async def main() -> httpx2.Response:
        transport = httpx2.ASGITransport(create_app(Pool()))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/completions", json={"model": "m", "prompt": "x"})

    response = asyncio.run(main())
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "unavailable_error"
