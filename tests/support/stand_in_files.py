"""What the stand-ins of servers of files share: a server on the loopback, contents in ranges, and how they go wrong."""

import contextlib
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, Self, TypeVar

__all__ = ["FileFault", "FileHandler", "FileRequest", "StandIn"]

_BLOCK = 16 * 1024


@dataclass
class FileFault:
    """What goes wrong. By default nothing does.

    Attributes:
        status: Of every answer about what the server has; 0 for none.
        error_code: The server's word for that.
        retry_after: The header of that name.
        cut_after: Bytes of contents after which the connection is closed, each time.
        cuts: How often it is; None for always.
        wrong_bytes: Send other bytes of the same length.
        short_by: Say, and send, so many bytes less than there are.
        ignore_range: Answer a request for a part with the whole.
        hold: Contents wait for this after each block. Set it to let them go.
    """

    status: int = 0
    error_code: str = ""
    retry_after: str = ""
    cut_after: int | None = None
    cuts: int | None = None
    wrong_bytes: bool = False
    short_by: int = 0
    ignore_range: bool = False
    hold: threading.Event | None = None


@dataclass
class FileRequest:
    """One request that was made, and how much of the contents was sent."""

    path: str
    range: str = ""
    sent: int = 0


F = TypeVar("F", bound=FileFault)


class StandIn(contextlib.AbstractContextManager["StandIn[F]"], Generic[F]):
    """A server that runs in threads of this process, from entering it as a context manager to leaving it.

    Args:
        fault: What goes wrong at first.
        handler: Answers the requests; its attribute ``stand_in`` is this server.

    Attributes:
        fault: What goes wrong from now on.
        url: Its address, without a slash at the end.
    """

    def __init__(self, fault: F, handler: type["FileHandler"]) -> None:
        self._holds: list[threading.Event] = []
        self.fault = fault
        self._server = _Server(("127.0.0.1", 0), type("Handler", (handler,), {"stand_in": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def fault(self) -> F:
        return self._fault

    @fault.setter
    def fault(self, fault: F) -> None:
        self._fault = fault
        if fault.hold is not None:
            self._holds.append(fault.hold)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for hold in self._holds:  # a thread may still wait for one of a fault that was mended
            hold.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """Ends with its connections: a thread waits for each that a client keeps, beyond the test that it served."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[Any] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)


class FileHandler(BaseHTTPRequestHandler):
    """Answers, with a body except to ``HEAD``."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class has this name
        pass

    def say(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send a whole answer. Headers without a value are left out."""
        self._begin(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_contents(
        self,
        whole: bytes,
        request: FileRequest,
        fault: FileFault,
        headers: Mapping[str, str] | None = None,
        *,
        anew: bool = False,
        sized: bool = True,
    ) -> None:
        """Send contents, or the part that was asked for, as far as nothing goes wrong.

        Args:
            anew: Send the whole in any case.
            sized: Say how much it is.
        """
        content = bytes(len(whole)) if fault.wrong_bytes else whole
        content = content[: len(content) - fault.short_by]
        start = 0 if anew or fault.ignore_range else int(request.range.removeprefix("bytes=").rstrip("-") or 0)
        if start >= len(content) > 0:
            self.say(416)
            return
        length = {"Content-Length": str(len(content) - start)} if sized else {"Connection": "close"}
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._begin(206 if start else 200, {**part, **length, **(headers or {})})
        if self.command != "HEAD":
            self._send(content[start:], request, fault)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def _send(self, content: bytes, request: FileRequest, fault: FileFault) -> None:
        cut = None
        if fault.cut_after is not None and fault.cuts != 0:
            cut = fault.cut_after
            fault.cuts = None if fault.cuts is None else fault.cuts - 1
        for start in range(0, len(content), _BLOCK):
            block = content[start : start + _BLOCK]
            if cut is not None and request.sent + len(block) > cut:
                self.wfile.write(block[: cut - request.sent])
                request.sent = cut
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(block)
            request.sent += len(block)
            if fault.hold is not None:
                self.wfile.flush()
                fault.hold.wait(30)
