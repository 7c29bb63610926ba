"""HTTP clients that cost little, so that what is measured is the server: one request at a time on a kept connection."""

import asyncio
import json
import time
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Connection", "closed_loop", "subscribe"]


class Connection:
    """One connection to a server; open it, and close it."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host = address.hostname or ""
        self._port = address.port or 80
        self._head = f"Host: {address.netloc}\r\nContent-Type: application/json\r\n"
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> "Connection":
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        return self

    def close(self) -> None:
        """Hang up."""
        self._writer.close()

    async def ask(self, path: str, body: dict[str, Any]) -> bytes:
        """Return the body of a whole answer."""
        length = await self._send("POST", path, json.dumps(body).encode())
        if length:
            return await self._reader.readexactly(length)
        # llama-server's router passes answers on in chunks.
        parts: list[bytes] = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            parts.append((await self._reader.readexactly(size + 2))[:-2])
        await self._reader.readexactly(2)
        return b"".join(parts)

    async def stream(self, path: str, body: dict[str, Any]) -> "list[tuple[int, int]]":
        """Return, for each read of a streamed answer, the nanoseconds at which it came and the events in it."""
        await self._send("POST", path, json.dumps(body).encode())
        reads: list[tuple[int, int]] = []
        tail = b""
        while True:
            data = await self._reader.read(1 << 16)
            if not data:
                raise ConnectionError("the stream broke off")
            count = (tail + data).count(b"data: ") - tail.count(b"data: ")
            reads.append((time.monotonic_ns(), count))
            tail = data[-16:]
            if data.endswith(b"0\r\n\r\n"):
                return reads

    async def listen(self, path: str) -> None:
        """Send a request and read the first part of an answer that has no end."""
        await self._send("GET", path, b"")
        await self._reader.readuntil(b"\n\n")

    async def _send(self, method: str, path: str, body: bytes) -> int:
        """Send a request, read the head of its answer and return the length of its body; 0 where it is streamed."""
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        try:
            answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        except (asyncio.IncompleteReadError, ConnectionError):
            # llama-server's router closes connections without saying so beforehand; a client has to come again.
            self._writer.close()
            await self.open()
            self._writer.write(head.encode() + body)
            answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if not answer.startswith(b"http/1.1 200"):
            raise ConnectionError(answer.decode())
        _, found, rest = answer.partition(b"content-length: ")
        return int(rest.partition(b"\r\n")[0]) if found else 0


async def closed_loop(url: str, clients: int, requests: int, bodies: "list[dict[str, Any]]") -> dict[str, Any]:
    """Have so many clients send so many completions each, and return their durations and how long all took."""
    durations: list[int] = []
    connections = [await Connection(url).open() for _ in range(clients)]

    async def client(number: int) -> None:
        body = bodies[number % len(bodies)]
        for _ in range(requests):
            began = time.perf_counter_ns()
            await connections[number].ask("/v1/completions", body)
            durations.append(time.perf_counter_ns() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    seconds = time.perf_counter() - began
    for connection in connections:
        connection.close()
    return {"durations": durations, "seconds": seconds}


async def subscribe(url: str, count: int) -> "list[Connection]":
    """Return so many connections that listen to the models' events."""
    connections: list[Connection] = []
    for _ in range(count):
        connection = await Connection(url).open()
        await connection.listen("/models/sse")
        connections.append(connection)
    return connections
