"""The gate that every request passes before anything else sees it: host name, origin, key, in this order."""

from collections.abc import MutableMapping
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaherd.http.grants import CURRENT, Grant
from llamaherd.http.problems import AUTHENTICATION, PERMISSION, Problem
from llamaherd.http.security import ANY, Security, is_loopback
from llamaherd.http.shapes import problem_response

__all__ = ["PUBLIC", "Gate"]

#: What needs no key. Monitors ask for it, and it tells nothing.
PUBLIC: Final = frozenset({"/health", "/v1/health"})
#: Methods that change nothing. The answer to a stranger's page is kept from it by its browser.
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """Refuses what the policy forbids, answers preflights, and adds the headers that browsers ask for.

    A refused request closes its connection, so that nobody uploads what nobody reads.
    """

    def __init__(self, app: ASGIApp, security: Security) -> None:
        self._app = app
        self._security = security
        self._cors = security.cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        extra = self._cors_headers(headers)

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add(message, extra)
            await send(message)

        if (problem := self._wrong_host(scope, headers)) is not None:
            await problem_response(problem, scope["path"])(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await self._preflight(headers)(scope, receive, send_with_cors)
        elif (problem := self._wrong_origin(scope, headers)) is not None:
            await problem_response(problem, scope["path"])(scope, receive, send_with_cors)
        else:
            grant = self._grant_of(scope, headers)
            if isinstance(grant, Problem):
                await problem_response(grant, scope["path"])(scope, receive, send_with_cors)
                return
            CURRENT.set(grant)
            await self._app(scope, receive, send_with_cors)

    # --- what is refused ---

    def _wrong_host(self, scope: Scope, headers: Headers) -> Problem | None:
        server = scope.get("server")
        local = server is not None and is_loopback(server[0])
        if not (local or self._security.allowed_hosts):
            return None
        # No browser leaves Host out, and only browsers can be led here by a name.
        for host in headers.getlist("host"):
            if not self._security.answers_to(host):
                return _refusal(f"the host name {host[:100]!r} is not one of this server's; --allowed-host adds names")
        return None

    def _wrong_origin(self, scope: Scope, headers: Headers) -> Problem | None:
        origin = headers.get("origin")
        if origin is None or scope["method"] in _SAFE or self._allows(origin, headers):
            return None
        return _refusal(f"pages of {origin[:100]!r} may not use this server; --cors-origins adds origins")

    def _grant_of(self, scope: Scope, headers: Headers) -> Grant | Problem:
        if scope["path"] in PUBLIC:
            return Grant()
        given = headers.get("authorization") or headers.get("x-api-key") or ""
        grant = self._security.keys.admit(given.encode("latin-1"))
        if grant is not None:
            return _refusal("this key may only read") if grant.read_only and scope["method"] not in _SAFE else grant
        return Problem(AUTHENTICATION, "Invalid API Key", headers={"WWW-Authenticate": "Bearer", "Connection": "close"})

    # --- what browsers are told ---

    def _allows(self, origin: str, headers: Headers) -> bool:
        own = origin.partition("://")[2] == headers.get("host")
        return own or self._security.allows(origin)

    def _cors_headers(self, headers: Headers) -> MutableMapping[str, str]:
        origin = headers.get("origin")
        if origin is None or not self._allows(origin, headers):
            return {"Vary": "Origin"}
        extra = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if self._cors.credentials:
            extra["Access-Control-Allow-Credentials"] = "true"
        elif ANY in self._security.origins:
            extra["Access-Control-Allow-Origin"] = ANY
        return extra

    def _preflight(self, headers: Headers) -> Response:
        # The wildcard does not cover Authorization, nor anything at all where credentials are allowed.
        asked = headers.get("access-control-request-headers", ANY)
        allowed = {
            "Access-Control-Allow-Methods": self._cors.methods,
            "Access-Control-Allow-Headers": asked if self._cors.headers == ANY else self._cors.headers,
        }
        return Response(headers=allowed, media_type="text/html")


def _refusal(message: str) -> Problem:
    return Problem(PERMISSION, message, headers={"Connection": "close"})


def _add(message: MutableMapping[str, Any], extra: MutableMapping[str, str]) -> None:
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    for name, value in extra.items():
        headers[name] = value
