"""Servers under measurement: started as processes of their own, asked over HTTP, and stopped again."""

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["Server", "our_command", "running"]

#: Seconds that one answer may take, and that a server has to start and to stop.
ANSWER_SECONDS: Final = 600.0
LIFE_SECONDS: Final = 60.0


class Server:
    """A running server and how to ask it."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON answer of a POST."""
        with self._post(path, body) as response:
            return json.loads(response.read())

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[tuple[float, Any]]:
        """Yield each event of a streamed answer with the time at which it arrived, in seconds of ``perf_counter``."""
        with self._post(path, {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield time.perf_counter(), json.loads(line[6:])

    @contextmanager
    def _post(self, path: str, body: Mapping[str, Any]) -> Generator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{self.name}: status {response.status}: {response.read()[:500]!r}")
            yield response
        finally:
            connection.close()


@contextmanager
def running(command: Sequence[str], name: str) -> Generator[Server]:
    """Start a server on a free port, wait until it answers, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        _wait_healthy(port, process)
        yield Server(name, port)
    finally:
        process.terminate()
        process.wait(LIFE_SECONDS)


def our_command(*arguments: str, python: str = sys.executable) -> list[str]:
    """Return the command line of our server, as installed for an interpreter."""
    return [python, "-P", "-m", "llamaherd.http", "serve", *arguments]


def _wait_healthy(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + LIFE_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with code {process.returncode}"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise TimeoutError("the server does not answer")
