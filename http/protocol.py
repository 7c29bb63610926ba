"""HTTP over one connection, within limits that uvicorn does not set: a head's size and time, and how many there are."""

import asyncio
import http
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ClassVar, Final, cast

import httptools
import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llamaherd.http.connection import DIRECT
from llamaherd.http.limits import Limits
from llamaherd.http.problems import INVALID_REQUEST, UNAVAILABLE, Kind, Problem

__all__ = ["BoundedProtocol", "bounded_protocol"]

#: Connections above the limit that are still told so; further ones are cut off.
_COURTESY: Final = 64
#: Most requests that one connection may send behind the one that is being answered.
_MOST_BEHIND: Final = 128
_CLOSE: Final = {"Connection": "close"}
#: Headers that say where a body ends.
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, within its limits. Trailers are dropped: nothing here reads them.

    A wish for another protocol is passed over, as HTTP allows. Java's clients wish for HTTP/2 with their requests, and
    the parser would take what comes behind such a head, the body, for the other protocol's.
    """

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._in_head = True
        self._received = 0
        self._head_size = 0
        self._timer: asyncio.TimerHandle | None = None
        #: Requests whose answers have not ended, in their order: with pipelining there are several, ``cycle`` the last.
        self._unanswered: deque[RequestResponseCycle] = deque()
        #: Whether a head is parsed that was parsed before.
        self._again = False
        super().connection_made(transport)
        surplus = len(self.connections) - self.limits.max_connections
        if surplus > _COURTESY:
            transport.abort()
            return
        if surplus > 0:
            headers = {**_CLOSE, "Retry-After": "5"}
            message = f"{self.limits.max_connections} connections are open already"
            self.app = _refuser(Problem(UNAVAILABLE, message, headers=headers))
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        # The base class tells the last request alone, and not the one that is being answered.
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if self._timer is None:
                self._start_timer()
            self._received += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
        # The parser keeps a header that has no end yet to itself, so the bytes are counted too.
        if self._in_head and self._received > self.limits.head_bytes and not self.transport.is_closing():
            self._refuse(_head_too_large(self.limits.head_bytes))

    def _parse(self, data: memoryview) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as end:
                data = data[end.args[0] :]
                framing = b"".join(b"%b: %b\r\n" % one for one in self.headers if one[0] in _FRAMING)
                self.parser = httptools.HttpRequestParser(self)
                self._again = True
                self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
            else:
                return

    def on_message_begin(self) -> None:
        if not self._again:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._again:
            self._head_size += len(url)
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self._head_size += len(name) + len(value) + len(b": \r\n")
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._again:
            self._again = False
            return
        self._stop_timer()
        size, self._head_size = self._head_size, 0
        self._in_head = False
        self._received = 0
        if size > self.limits.head_bytes:
            self.app = _refuser(_head_too_large(self.limits.head_bytes))
        super().on_headers_complete()
        # There is none where the connection is to be another protocol's.
        if getattr(self.cycle, "scope", None) is self.scope:
            cast("dict[str, Any]", self.scope)[DIRECT] = partial(_write_part, self.cycle)
            while self._unanswered and self._unanswered[0].response_complete:
                self._unanswered.popleft()
            self._unanswered.append(self.cycle)
            if self.scope["http_version"] == "1.0":
                self.cycle.chunked_encoding = False
                vars(self.cycle)["send"] = partial(_send_plain, self.cycle, self.cycle.send)
        if len(self.pipeline) > _MOST_BEHIND:
            # Each answer lets in as much as is read at a time, so what waits here would grow without end.
            self.transport.abort()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # its body is still to come
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(INVALID_REQUEST, msg, headers=_CLOSE))

    def _refuse(self, problem: Problem) -> None:
        body = msgspec.json.encode(problem.to_dict())
        status = http.HTTPStatus(problem.kind.status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nServer: llamaherd\r\nConnection: close\r\n"
            f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.head_seconds, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self.transport.is_closing():
            return
        if self._unanswered and not self._unanswered[-1].response_complete:
            # What came behind a request, be it a stray line break, must not end the answer to it.
            self._start_timer()
        elif self._received:
            message = f"the request's headers did not arrive within {self.limits.head_seconds:g} seconds"
            self._refuse(Problem(Kind(408, INVALID_REQUEST.type), message))
        else:
            self.transport.close()


def bounded_protocol(limits: Limits) -> type[BoundedProtocol]:
    """Return the protocol with these limits, for uvicorn to make one of for each connection."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})


def _write_part(cycle: RequestResponseCycle, body: bytes) -> bool:
    """Write a part of a chunked answer, as uvicorn would; see :data:`~llamaherd.http.connection.DirectWrite`."""
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


async def _send_plain(
    cycle: RequestResponseCycle, send: Callable[[Any], Awaitable[None]], message: dict[str, Any]
) -> None:
    """Send to a client of HTTP/1.0, which knows no chunks: an answer without a length ends with its connection."""
    if message["type"] == "http.response.body":
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def _refuser(problem: Problem) -> Any:
    """Return an application that has one answer for everybody."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await problem.to_response()(scope, receive, send)

    return refuse


def _head_too_large(limit: int) -> Problem:
    return Problem(
        Kind(431, INVALID_REQUEST.type), f"the request's headers are over the limit of {limit} bytes", headers=_CLOSE
    )
