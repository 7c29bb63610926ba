"""A running server, as the command line speaks to it."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import httpx2

from llamaherd.pool import PoolError

__all__ = ["Server", "ServerError"]

_TIMEOUT: Final = httpx2.Timeout(60.0, connect=5.0)
#: A stream says something every 15 s.
_STREAM_TIMEOUT: Final = httpx2.Timeout(60.0, connect=5.0)


class ServerError(PoolError):
    """A server refused, or cannot be reached."""


class Server:
    """Use it as a context manager.

    Args:
        url: Where it listens, without a path.
        key: An API key, if it wants one.
        timeout: Seconds that an answer may take; None is a minute.
    """

    def __init__(self, url: str, key: str = "", *, timeout: float | None = None) -> None:
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # The machine's proxies are for the way out, and this one is most often here.
        self._client = httpx2.Client(base_url=self._url, headers=headers, timeout=timeout or _TIMEOUT, trust_env=False)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, body: Any = None, **params: str) -> Any:
        """Return the JSON of an answer. Raises ServerError."""
        with self._explained():
            answer = self._client.request(method, path, json=body, params=params)
            return _checked(answer)

    def models(self) -> list[dict[str, Any]]:
        """Return the list of models. Raises ServerError."""
        found: list[dict[str, Any]] = self.ask("GET", "/models")["data"]
        return found

    @contextmanager
    def stream(self, path: str, **params: str) -> Generator[Iterator[dict[str, Any]]]:
        """Open a stream of events, and give an iterator over their data. Both raise ServerError."""
        with self._explained(), self._client.stream("GET", path, params=params, timeout=_STREAM_TIMEOUT) as answer:
            if answer.status_code >= 400:
                answer.read()
                _checked(answer)
            yield self._events(answer)

    def _events(self, answer: httpx2.Response) -> Iterator[dict[str, Any]]:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except httpx2.HTTPError as error:
            raise ServerError(f"{self._url} cannot be reached: {error}", code="unreachable", retry=True) from None
        except ValueError:
            raise ServerError(f"{self._url} is no llamaherd: its answer is no JSON", code="bad_answer") from None


def _checked(answer: httpx2.Response) -> Any:
    content: Any = answer.json()
    if answer.status_code < 400:
        return content
    error = cast("dict[str, Any]", content).get("error") if isinstance(content, dict) else None
    message = cast("dict[str, Any]", error).get("message") if isinstance(error, dict) else None
    raise ServerError(str(message or f"the server answered {answer.status_code}"), code=str(answer.status_code))
