"""The listening server: uvicorn, run from code, around the application.

The socket is bound before anything else is set up, so that a taken port is one clear error. Signals are the caller's:
what they shall do to a server is to cancel it, which ends it in order.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import uvicorn
from starlette.applications import Starlette

from llamaherd.http.app import create_app
from llamaherd.http.front import Front
from llamaherd.http.handshakes import TlsServer
from llamaherd.http.limits import Limits
from llamaherd.http.listen import CannotListen, Listener, PortInUse, make_tls
from llamaherd.http.metrics import LoadWatch
from llamaherd.http.outflow import Lagging, watch_outflow
from llamaherd.http.protocol import BoundedProtocol, bounded_protocol
from llamaherd.http.security import Security
from llamaherd.pool import Pool

__all__ = ["DEFAULT_HOST", "DEFAULT_PORT", "CannotListen", "PortInUse", "serve", "serve_app"]

#: Loopback: whoever wants to be reached from elsewhere has to say so.
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8080
#: Seconds that an idle connection is kept: longer than proxies keep theirs, so that it is they who close.
KEEP_ALIVE_SECONDS: Final = 75


async def serve(
    pool: Pool,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    on_ready: Callable[[str], None] | None = None,
    limits: Limits | None = None,
    tls: tuple[Path, Path] | None = None,
    security: Security | None = None,
    **settings: Any,
) -> None:
    """Serve an open pool until cancelled. The pool stays open.

    When cancelled, it listens no more and gives requests in flight ``limits.drain_seconds`` to end; a second
    cancellation cuts that short. Arguments as :func:`serve_app` and :func:`~llamaherd.http.app.create_app` take them;
    the server goes by the name ``host`` too.

    Raises:
        PortInUse, CannotListen: nothing was served.
    """
    policy = security or Security()
    if policy.own_names == ():
        policy = replace(policy, own_names=(host,))
    app = create_app(pool, security=policy, **settings)
    await serve_app(app, host=host, port=port, on_ready=on_ready, limits=limits, tls=tls)


async def serve_app(
    app: Starlette,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    on_ready: Callable[[str], None] | None = None,
    limits: Limits | None = None,
    tls: tuple[Path, Path] | None = None,
) -> None:
    """Serve an application made by :func:`~llamaherd.http.app.create_app` until cancelled, as :func:`serve` does.

    Args:
        host: An address or a name, or the path of a Unix socket, which ends in ``.sock``.
        port: 0 takes a free one.
        on_ready: Called with the base URL once connections are answered.
        limits: Of connections and heads, and of the end.
        tls: The PEM files of a certificate and its private key; None speaks plain HTTP.

    Raises:
        PortInUse, CannotListen: nothing was served.
    """
    context = make_tls(*tls) if tls is not None else None
    listener = Listener(host, port, tls=context is not None)
    bounds = limits or Limits()
    server = _Server(
        app,
        bounds,
        context,
        lambda: on_ready(listener.url) if on_ready is not None else None,
    )
    front: Front = app.state.front
    watching = asyncio.ensure_future(LoadWatch(front.pool, front.tallies).run())
    outflow = asyncio.ensure_future(watch_outflow(server.open_connections, bounds.send_seconds))
    keeping = asyncio.ensure_future(front.library.run(front.pool)) if front.library is not None else None
    serving = asyncio.ensure_future(server.serve([listener.socket]))
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
        watching.cancel()
        outflow.cancel()
        if keeping is not None:
            keeping.cancel()
        listener.close()


def _config(app: Starlette, limits: Limits, protocol: type[BoundedProtocol]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[("Server", "llamaherd")],
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=limits.drain_seconds,  # type: ignore[arg-type]  # it may be any number of seconds
    )


class _Server(uvicorn.Server):
    """uvicorn, except that it says when it is ready, counts handshakes, ends listeners, and leaves signals alone."""

    def __init__(
        self, app: Starlette, limits: Limits, tls: ssl.SSLContext | None, on_ready: Callable[[], None]
    ) -> None:
        self._protocol = bounded_protocol(limits)
        super().__init__(_config(app, limits, self._protocol))
        self._app = app
        self._tls = tls
        self._on_ready = on_ready

    def open_connections(self) -> list[Lagging]:
        """Return the connections that there are now."""
        return [connection for connection in self.server_state.connections if isinstance(connection, BoundedProtocol)]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            for listener in sockets or ():
                self.servers.append(cast("asyncio.Server", TlsServer(listener, self._make_protocol, self._tls)))
        try:
            self._on_ready()
        except BaseException:
            for server in self.servers:
                server.close()
            raise

    def _make_protocol(self) -> BoundedProtocol:
        return self._protocol(self.config, self.server_state, self.lifespan.state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._app.state.front.hang_up()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield
