"""The listening server: uvicorn, run from code, around the application.

The socket is bound before anything else is set up, so that a taken port is one clear error. Signals are the caller's:
what they shall do to a server is to cancel it, which ends it in order.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Generator
from typing import Final

import uvicorn
from starlette.applications import Starlette

from llamaherd.http.app import create_app
from llamaherd.pool import Pool

__all__ = ["DEFAULT_HOST", "DEFAULT_PORT", "CannotListen", "PortInUse", "serve", "serve_app"]

#: Loopback: whoever wants to be reached from elsewhere has to say so.
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8080
#: Seconds that requests in flight have to end after the server was told to stop.
DRAIN_SECONDS: Final = 10
#: Seconds that an idle connection is kept: longer than proxies keep theirs, so that it is they who close.
KEEP_ALIVE_SECONDS: Final = 75
_BACKLOG: Final = 2048


class CannotListen(OSError):
    """The address cannot be listened on. The text is one line, for people."""


class PortInUse(CannotListen):
    """Another program listens there already."""


async def serve(
    pool: Pool,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    default_model: str | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an open pool until cancelled. The pool stays open.

    When cancelled, it listens no more and gives requests in flight 10 seconds to end; a second cancellation cuts that
    short. Arguments as :func:`serve_app` and :func:`~llamaherd.http.app.create_app` take them.

    Raises:
        PortInUse, CannotListen: nothing was served.
    """
    await serve_app(create_app(pool, default_model=default_model), host=host, port=port, on_ready=on_ready)


async def serve_app(
    app: Starlette,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an application made by :func:`~llamaherd.http.app.create_app` until cancelled, as :func:`serve` does.

    Args:
        port: 0 takes a free one.
        on_ready: Called with the base URL once connections are answered.

    Raises:
        PortInUse, CannotListen: nothing was served.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[("Server", "llamaherd")],
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _Server(config, app, lambda: on_ready(_url(listener)) if on_ready is not None else None)
    serving = asyncio.ensure_future(server.serve([listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            server.force_exit = True
            await serving
        raise
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """uvicorn, except that it says when it is ready, hangs up on listeners, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config, app: Starlette, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        try:
            self._on_ready()
        except BaseException:
            for server in self.servers:
                server.close()
            raise

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._app.state.front.hang_up()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise CannotListen(f"cannot listen on {host} port {port}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # only this finds out for certain whether the port is free
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PortInUse(error.errno, f"port {port} on {host} is in use by another program") from None
        raise CannotListen(f"cannot listen on {host} port {port}: {error}") from None
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
