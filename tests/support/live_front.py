"""A real server over a real pool, on an event loop in a thread of its own: tests are plain blocking clients."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

import httpx2
from openai import OpenAI

from llamaherd.http.app import create_app
from llamaherd.http.front import Front
from llamaherd.http.server import serve_app
from llamaherd.pool import ModelSpec, Pool
from patience import ended, patience, result_of

__all__ = ["DEADLINE", "LiveFront", "RawRequest", "fake", "say", "sse_data"]

#: Seconds after which a test gives up waiting; nothing here takes a tenth of it.
DEADLINE: Final = 30.0

T = TypeVar("T")


def fake(name: str, *, aliases: tuple[str, ...] = (), tags: tuple[str, ...] = (), **script: Any) -> ModelSpec:
    """Return a model of the fake engine. Without a script it answers with the prompt's own words."""
    return ModelSpec(name=name, engine="fake", aliases=aliases, tags=tags, script=script, stop_timeout=2.0)


def say(text: str, **more: Any) -> dict[str, Any]:
    """Return the body of a chat of one message."""
    return {"messages": [{"role": "user", "content": text}], **more}


def sse_data(lines: Iterable[str]) -> list[Any]:
    """Return the data of a stream's events, ``[DONE]`` as the text that it is."""
    payloads = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


class LiveFront(contextlib.AbstractContextManager["LiveFront"]):
    """Use it as a context manager.

    Args:
        models: What the pool may run.
        server: Further arguments of ``serve_app``.
        settings: Further arguments of ``create_app``.
    """

    def __init__(
        self,
        *models: ModelSpec,
        models_max: int = 4,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        server: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._models = models
        self._models_max = models_max
        self._loop_factory = loop_factory
        self._server = server or {}
        self._settings = settings
        self._ready: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, name="live front")
        self._loop: asyncio.AbstractEventLoop
        self._task: asyncio.Task[None]
        self._pool: Pool
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self.url = result_of(self._ready, DEADLINE)
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def cancel(self) -> None:
        """Cancel the server, and do not wait for it."""
        self._loop.call_soon_threadsafe(self._task.cancel)

    def shut_down(self) -> None:
        """End the server and the pool, and wait for it. Idempotent."""
        with contextlib.suppress(RuntimeError):  # the loop has closed already
            self.cancel()
        assert ended(self._thread, DEADLINE), "the server did not end"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._loop_factory) as runner, contextlib.suppress(asyncio.CancelledError):
            runner.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(self._serve())
        try:
            await self._task
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _serve(self) -> None:
        async with Pool(self._models, models_max=self._models_max) as self._pool:
            app = create_app(self._pool, **self._settings)
            self._front: Front = app.state.front
            await serve_app(app, port=0, on_ready=self._ready.set_result, **self._server)

    # --- the pool behind it ---

    def ask(self, question: Callable[[Pool], T]) -> T:
        """Return what a function says of the pool, asked on the pool's loop."""

        async def answer() -> T:
            return question(self._pool)

        return result_of(asyncio.run_coroutine_threadsafe(answer(), self._loop), DEADLINE)

    def start(self, work: Callable[[Pool], Coroutine[Any, Any, object]]) -> None:
        """Have the pool's loop begin some work, and do not wait for it."""
        asyncio.run_coroutine_threadsafe(work(self._pool), self._loop)

    def wait_until(self, condition: Callable[[Pool], bool]) -> None:
        """Wait until something holds of the pool; fail if it never does."""

        async def hold() -> None:
            async with patience(DEADLINE):
                while not condition(self._pool):  # noqa: ASYNC110 - the pool announces states, not how much work it has
                    await asyncio.sleep(0)

        result_of(asyncio.run_coroutine_threadsafe(hold(), self._loop), DEADLINE * 2)

    def held_by(self, model: str) -> int:
        """Return how many requests a model has, granted or waiting."""
        return self.ask(lambda pool: _held(pool, model))

    def wait_for_listeners(self, count: int) -> None:
        """Wait until so many clients listen to events."""
        self.wait_until(lambda _: len(self._front.listeners) == count)

    def fill_listeners(self, count: int) -> None:
        """Have so many clients listen."""
        self.ask(lambda _: [self._front.listen() for _ in range(count)])

    def wait_for_requests(self, model: str, count: int) -> None:
        """Wait until a model has so many requests."""
        self.wait_until(lambda pool: _held(pool, model) == count)

    def wait_for_state(self, model: str, state: str) -> None:
        """Wait until a model is in a state."""
        self.wait_until(lambda pool: pool.status(model).state == state)

    # --- its clients ---

    def client(self) -> httpx2.Client:
        """Return a plain HTTP client; close it."""
        return httpx2.Client(base_url=self.url, timeout=DEADLINE)

    def openai(self) -> OpenAI:
        """Return the official client, without its retries; close it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE)

    def raw(self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> "RawRequest":
        """Send a POST over a plain socket and leave the answer unread."""
        return RawRequest(self.url, path, json.dumps(body).encode(), headers=headers)


def _held(pool: Pool, model: str) -> int:
    status = pool.status(model)
    return status.in_flight + status.queued


class RawRequest(contextlib.AbstractContextManager["RawRequest"]):
    """One request on its own connection, that can be left at any moment.

    Args:
        announced: The ``Content-Length``, if it shall not be the body's own.
    """

    def __init__(
        self,
        url: str,
        path: str,
        body: bytes,
        *,
        announced: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._socket = socket.create_connection((address.hostname, address.port), DEADLINE)
        length = len(body) if announced is None else announced
        fields = {"Host": address.netloc, "Content-Length": length, **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._socket.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        self._received = b""

    def read_until(self, text: bytes) -> bytes:
        """Return all that has arrived, once it holds the text."""
        while text not in self._received:
            self.read_more()
        return self._received

    def read_more(self) -> bytes:
        """Return all that has arrived, once it is more than before."""
        chunk = self._socket.recv(65536)
        assert chunk, f"the answer ended: {self._received!r}"
        self._received += chunk
        return self._received

    def send_no_more(self) -> None:
        """Close the sending side of the connection alone."""
        self._socket.shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __exit__(self, *_: object) -> None:
        self.leave()
