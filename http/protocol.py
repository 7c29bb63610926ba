"""HTTP over one connection, within limits that uvicorn does not set: of heads, of answers, and how many there are."""

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
from llamaherd.http.outflow import Outflow
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
    #: None until the connection is made.
    _outflow: Outflow | None = None

    def expect(self) -> bool:
        """Count this connection from now on, before it is made; False if there are far too many.

        A connection that is counted and not made is to be given up.
        """
        if self._is_one_of_far_too_many(len(self.connections) + 1):
            return False
        self.connections.add(self)
        return True

    def give_up(self) -> None:
        """Do nothing if the connection was made, else forget it."""
        if self._outflow is None:
            self.connections.discard(self)

    def _is_one_of_far_too_many(self, count: int) -> bool:
        return count > self.limits.max_connections + _COURTESY

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._in_head = True
        self._received = 0
        self._head_size = 0
        self._timer: asyncio.TimerHandle | None = None
        #: Requests whose answers have not ended, in their order: with pipelining there are several, ``cycle`` the last.
        self._unanswered: deque[RequestResponseCycle] = deque()
        #: Whether a head is parsed that was parsed before.
        self._again = False
        #: What is said when the answers before it have ended; nothing more is read then.
        self._refusal: Problem | None = None
        self._outflow = Outflow(transport, self.limits.send_seconds)
        super().connection_made(transport)
        if self._is_one_of_far_too_many(len(self.connections)):
            transport.abort()
            return
        if len(self.connections) > self.limits.max_connections:
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

    def look(self, now: float) -> None:
        """Cut the client off if it has taken nothing of its answer for too long. ``now`` is the loop's time."""
        if self._outflow is not None:
            self._outflow.look(now)

    def resume_writing(self) -> None:
        if self._outflow is not None:
            self._outflow.drained()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
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
            return
        # The parser keeps a header that has no end yet to itself, so the bytes are counted too.
        if self._in_head and self._received > self.limits.head_bytes and not self.transport.is_closing():
            self._refuse(_head_too_large(self.limits.head_bytes))
        elif self._timer is None and not self._is_answering() and not self.transport.is_closing():
            # The body of a request that was answered without it. uvicorn has stopped its own clock for what came.
            self._start_timer()

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
        if self._timer is not None:
            # It was the body's; what comes next has a time of its own.
            self._stop_timer()
            self._received = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(INVALID_REQUEST, msg, headers=_CLOSE))

    def shutdown(self) -> None:
        if self._outflow is not None:
            super().shutdown()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refusal is not None and not self._is_answering() and not self.transport.is_closing():
            self._say(self._refusal)

    def _is_answering(self) -> bool:
        return any(not cycle.response_complete for cycle in self._unanswered)

    def _refuse(self, problem: Problem) -> None:
        """Say what is wrong with what has come, behind the answers that are under way, and end the connection."""
        self._refusal = problem
        self._stop_timer()
        last = self._unanswered[-1] if self._unanswered else None
        if last is not None and last.more_body and not last.response_complete:
            # It is the body of this request that is wrong, so this is its answer, unless it has one already.
            if last.response_started:
                self.transport.close()
                return
            self._unanswered.pop()
            last.disconnected = True
            last.message_event.set()
            if self.pipeline and self.pipeline[0][0] is last:
                self.pipeline.popleft()
        if not self._is_answering():
            self._say(problem)

    def _say(self, problem: Problem) -> None:
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
